"""Train `emoji-mini`, the embedded captioner of emoji drawings, on the tower of `train_emoji_tower.py`.

The tower is frozen. Each training drawing is embedded as it is and, with --views, in augmented views (with the
augmentation of the tower's training). Training shifts each embedding as if another designer had drawn the image
(`clipcap_hf.demo.DesignShift`).

    python examples/embedded/train_emoji_tower.py --output build/emoji-tower
    python examples/embedded/train_emoji_mini.py --tower build/emoji-tower --out build/emoji-mini

writes the captioner, with weights in half precision, and scores.json: exact match and CIDEr on both test splits, next
to the baselines of `clipcap demo`.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, OpenClipVisionModel
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import (
    PREFIX_LENGTH,
    caption_and_score,
    embed_splits,
    new_captioner,
    train,
    train_tokenizer,
    training_data,
)
from clipcap_hf.files import write_text
from clipcap_hf.model.image_processing_open_clip import image_processor_from_open_clip
from torch.nn import functional as F
from tqdm import tqdm
from train_emoji_tower import augment


logger = logging.getLogger("train_emoji_mini")


@torch.inference_mode()
def embed_views(tower: OpenClipVisionModel, images, views: int, mean, std, seed: int) -> torch.Tensor:
    """Embed augmented views of the images: normalised, (views, images, embed_dim)."""
    import numpy as np

    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    generator = torch.Generator().manual_seed(seed)
    embeds = []
    for view in range(views):
        batches = []
        for batch in tqdm(pixels.split(128), desc=f"view {view + 1} of {views}"):
            augmented = augment(batch.float() / 255, batch.shape[-1], generator)
            batches.append(F.normalize(tower((augmented - mean) / std).image_embeds, dim=-1))
        embeds.append(torch.cat(batches))
    return torch.stack(embeds) if embeds else torch.empty(0, len(pixels), tower.config.embed_dim)


def save_half(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, out: Path):
    """Save the weights in half precision; `config.dtype` makes loading turn them to single precision."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    if not all(value.isfinite().all() for value in halves.values()):
        raise ValueError("Some weights of this model do not fit into half precision")
    model.save_pretrained(out, state_dict=halves)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True, help="folder that train_emoji_tower.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner and scores.json")
    parser.add_argument("--views", type=int, default=0, help="augmented views of each training image")
    parser.add_argument("--epochs", type=float, default=20, help="passes over all views")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of noise on the embeddings")
    parser.add_argument("--prefix-length", type=int, default=PREFIX_LENGTH)
    parser.add_argument("--hidden-size", type=int, default=192, help="hidden size of the GPT-2")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GPT-2")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--beams", type=int, default=3, help="beams of the scored captions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from clipcap_hf.model.modeling_open_clip import load_open_clip_checkpoint
    from transformers import set_seed

    set_seed(arguments.seed)
    tower = OpenClipVisionModel.from_open_clip(arguments.tower).eval()
    _, preprocess_cfg, _ = load_open_clip_checkpoint(arguments.tower, with_weights=False)
    data = load_emoji()
    names = [captions[0] for captions in data["train"]["captions"]]
    processor = ClipCapProcessor(
        image_processor_from_open_clip(preprocess_cfg), train_tokenizer(names), prefix_length=arguments.prefix_length
    )
    model = new_captioner(tower, processor, arguments.hidden_size, arguments.layers)

    embeds = embed_splits(model, processor, data)
    views = embed_views(
        tower, data["train"]["image"], arguments.views, preprocess_cfg["mean"], preprocess_cfg["std"], arguments.seed
    )
    captions = list(data["train"]["captions"]) * (arguments.views + 1)
    train(
        model,
        processor,
        training_data(torch.cat([embeds["train"], views.flatten(0, 1)]), captions),
        epochs=arguments.epochs,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        embeds_noise=arguments.noise,
    )
    save_half(model, processor, arguments.out)

    # Score the saved weights, since those are shipped.
    model = ClipCapForConditionalGeneration.from_pretrained(arguments.out).eval()
    _, scores = caption_and_score(model, processor, data, embeds, "en", num_beams=arguments.beams)
    for split, found in scores.items():
        logger.info("%s: %s", split, json.dumps(found))
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "tower")}
    write_text(arguments.out / "scores.json", json.dumps({"settings": settings, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
