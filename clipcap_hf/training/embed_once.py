"""Encode each image once before training, if that is no more work than encoding it during training."""

import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import concatenate_datasets
from datasets.fingerprint import Hasher

from ..data import embed
from ..data.embed import data_fingerprint
from ..data.embeddings import describe_tower
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from .arguments import CaptioningArguments, DataArguments


def pays_to_embed(
    train, model: ClipCapForConditionalGeneration, data_args: DataArguments, args: CaptioningArguments
) -> bool:
    """Return whether to encode the images before training: as `embed_once` says, or if it saves work.

    Raises:
        ValueError: If `embed_once` is set for a tower that is trained.
    """
    if data_args.embed_once and not model.config.freeze_vision:
        raise ValueError("`embed_once` needs a frozen tower: leave it out, or leave out `freeze_vision False`.")
    if data_args.embed_once is not None:
        return data_args.embed_once
    if not hasattr(train, "select") or "clip_embeds" in train.column_names or model.vision_tower is None:
        return False
    if not model.config.freeze_vision:
        return False
    return reads_all_images(train, data_args, args)


def reads_all_images(train, data_args: DataArguments, args: CaptioningArguments) -> bool:
    """Return whether the run shows as many images as a data set with random access holds."""
    return hasattr(train, "select") and _images_shown(train, data_args, args) >= len(train)


def _images_shown(train, data_args: DataArguments, args: CaptioningArguments) -> float:
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = len(train)
    if data_args.references == "all" and args.objective == "cross_entropy":
        rows = sum(len(texts) for texts in train["captions"])
    return args.num_train_epochs * rows


def embed_once(
    data, split: str, model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, args: CaptioningArguments
):
    """Return the data with the embedding of each image. All processes share the work.

    An interrupted run continues. The embeddings are stored in `_embeddings` in `output_dir`, a name that `push_to_hub`
    skips. Images that cannot be read are left out, with a warning. Training data keeps only embeddings and captions.
    """
    tower = model.vision_tower
    if data is None or tower is None or "clip_embeds" in data.column_names:
        return data
    if split == "train":
        images = data.select_columns(["image", "captions", *({"image_id"} & set(data.column_names))])
    else:
        images = data.select_columns("image").add_column("row", list(range(len(data))))
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else tower.dtype  # as in training
    out = Path(args.output_dir) / "_embeddings" / f"{split}-{_name(data, model, processor, dtype)}"
    progress = not args.disable_tqdm and sys.stderr.isatty()
    embedded = embed(model.to(args.device).eval(), images, out, processor, dtype=dtype, progress=progress)
    embedded = embedded.remove_columns("image_path")
    if split == "train":
        return embedded
    # Keep the images too: some are drawn with their captions at the end.
    rows = embedded["row"][:]
    if len(rows) < len(data):
        data = data.select(rows)
    return concatenate_datasets([data, embedded.select_columns("clip_embeds")], axis=1)


def _name(data, model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, dtype: torch.dtype) -> str:
    """Return a name that is the same for the same images and tower, and in all processes."""
    tower = describe_tower(model.vision_tower, model.config.vision_feature)
    transform = processor.image_processor.to_json_string()
    name = Hasher.hash([data_fingerprint(data, "image"), tower["weights_sha256"], transform, str(dtype)])
    return broadcast_object_list([name])[0]
