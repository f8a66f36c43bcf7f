r"""Train `emoji-mini`, the embedded captioner of emoji drawings, on the tower of `continue_emoji_tower.py`.

The tower is frozen. Each training drawing is embedded as it is and, with --views, in augmented views (with the
augmentation of the tower's training). Training shifts each embedding as if another designer had drawn the image
(`clipcap_hf.demo.DesignShift`). It trains as `clipcap demo` does, and on the drawings of `fetch_icons.py` besides.

    python examples/embedded/train_emoji_mini.py --tower build/tower-3 --out build/emoji-mini --epochs 12 \
        --further build/icons.parquet

writes the captioner, with weights in half precision, and prints the exact matches on the validation split.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, OpenClipVisionModel
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import (
    PREFIX_LENGTH,
    new_captioner,
    train,
    train_tokenizer,
    training_data,
)
from clipcap_hf.files import write_text
from clipcap_hf.model.image_processing_open_clip import image_processor_from_open_clip
from clipcap_hf.model.reranking_clipcap import DEFAULT_BEAMS
from torch.nn import functional as F
from tqdm import tqdm
from train_emoji_tower import augment, hold_out, with_further


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
    weights = model.state_dict()
    # By address, so that weights that are tied stay tied and are saved once.
    halves = {value.data_ptr(): value.half() if value.is_floating_point() else value for value in weights.values()}
    if not all(value.isfinite().all() for value in halves.values()):
        raise ValueError("Some weights of this model do not fit into half precision")
    model.save_pretrained(out, state_dict={name: halves[value.data_ptr()] for name, value in weights.items()})
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder that train_emoji_tower.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument("--views", type=int, default=0, help="augmented views of each training image")
    parser.add_argument("--hold-out-design", help="train without this design, to choose settings on it")
    parser.add_argument("--further", type=Path, help="also train on the drawings that fetch_icons.py wrote")
    parser.add_argument("--epochs", type=float, default=20, help="passes over all views")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of noise on the embeddings")
    parser.add_argument("--prefix-length", type=int, default=PREFIX_LENGTH)
    parser.add_argument("--hidden-size", type=int, default=192, help="hidden size of the GPT-2")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GPT-2")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from clipcap_hf.model.modeling_open_clip import load_open_clip_checkpoint
    from transformers import set_seed

    set_seed(arguments.seed)
    tower = OpenClipVisionModel.from_open_clip(str(arguments.tower)).eval()
    _, preprocess_cfg, _ = load_open_clip_checkpoint(str(arguments.tower), with_weights=False)
    data = {split: load_emoji(split) for split in ("train", "validation")}
    if arguments.hold_out_design:
        data["train"], _ = hold_out(data["train"], arguments.hold_out_design)
    names = {split: [captions[0] for captions in rows["captions"]] for split, rows in data.items()}
    data["train"] = with_further(data["train"], arguments.further)
    processor = ClipCapProcessor(
        image_processor_from_open_clip(preprocess_cfg),
        train_tokenizer(names["train"]),
        prefix_length=arguments.prefix_length,
    )
    model = new_captioner(tower, processor, arguments.hidden_size, arguments.layers)

    embeds = {
        split: F.normalize(embed_images(model, processor, rows["image"], desc=split), dim=-1)
        for split, rows in data.items()
    }
    views = embed_views(
        tower, data["train"]["image"], arguments.views, preprocess_cfg["mean"], preprocess_cfg["std"], arguments.seed
    )
    train(
        model,
        processor,
        training_data(
            torch.cat([embeds["train"], views.flatten(0, 1)]), list(data["train"]["captions"]) * (arguments.views + 1)
        ),
        epochs=arguments.epochs,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        embeds_noise=arguments.noise,
    )
    save_half(model, processor, arguments.out)

    # Score the saved weights, since those are shipped.
    model = ClipCapForConditionalGeneration.from_pretrained(arguments.out).eval()
    found = caption_embeds(model, processor, embeds["validation"], num_beams=DEFAULT_BEAMS)
    right = sum(caption == name for caption, name in zip(found, names["validation"]))
    logger.info("validation: exact %.1f %%", 100 * right / len(found))


if __name__ == "__main__":
    main()
