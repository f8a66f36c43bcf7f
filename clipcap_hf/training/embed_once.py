"""Images of a training run are encoded once, before it, where that is less work."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from .arguments import CaptioningArguments, DataArguments, ModelArguments


def pays_to_embed(
    train,
    model: ClipCapForConditionalGeneration,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
) -> bool:
    """Whether the images are to be encoded before training: as `embed_once` says, or where that is less work.

    Raises:
        ValueError: If `embed_once` is asked for a tower that is trained.
    """
    if data_args.embed_once and not model.config.freeze_vision:
        raise ValueError("`embed_once` is for a tower that stays as it is: leave it out, or `freeze_vision False`.")
    if data_args.embed_once is not None:
        return data_args.embed_once
    if not hasattr(train, "select") or data_args.embeds_column in train.column_names or model.vision_tower is None:
        return False
    if not model.config.freeze_vision or model.config.vision_feature == "patches":  # patches fill disks
        return False
    if model_args.warm_start:
        return True
    shown = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        rows = len(train)
        if data_args.references == "all" and args.objective == "cross_entropy":
            rows = sum(1 if isinstance(texts, str) else len(texts) for texts in train[data_args.caption_column])
        shown = args.num_train_epochs * rows
    return shown > len(train)


def embed_once(
    data,
    split: str,
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    columns: dict[str, str],
    args: CaptioningArguments,
):
    """The data with the embedding of each image, which all processes make together and which an interrupted run goes on with.

    It is kept in `_embeddings` in `output_dir`, a name that `push_to_hub` passes over. Images that cannot be read are left
    out, with a warning; data for training are left with embeddings and captions.
    """
    from datasets import concatenate_datasets
    from datasets.fingerprint import Hasher

    from ..data import embed
    from ..data.embed import data_fingerprint
    from ..data.embeddings import describe_tower

    image, captions, embeds = (columns[f"{name}_column"] for name in ("image", "caption", "embeds"))
    if data is None or embeds in data.column_names:
        return data
    tower = describe_tower(model.vision_tower, model.config.vision_feature)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.vision_tower.dtype  # as in training
    # A name that is the same for the same images and tower, and in all processes.
    transform = processor.image_processor.to_json_string()
    name = Hasher.hash([data_fingerprint(data, image), tower["weights_sha256"], transform, str(dtype)])
    out = Path(args.output_dir) / "_embeddings" / f"{split}-{broadcast_object_list([name])[0]}"
    if split == "train":
        images = data.select_columns([image, captions, *({"image_id"} & set(data.column_names) - {image, captions})])
    else:
        images = data.select_columns(image).add_column("row", list(range(len(data))))
    images = images.rename_columns({image: "image"})
    embedded = embed(model.to(args.device).eval(), images, out, processor, dtype=dtype, progress=not args.disable_tqdm)
    embedded = embedded.rename_columns({"clip_embeds": embeds}).remove_columns("image_path")
    if split == "train":
        return embedded
    # Beside the images, of which some are drawn with their captions in the end.
    rows = embedded["row"][:]
    if len(rows) < len(data):
        data = data.select(rows)
    return concatenate_datasets([data, embedded.select_columns(embeds)], axis=1)
