"""What several commands take."""

import argparse
import os
import sys


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_device_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of weights and arithmetic (default: as the weights are stored); 16 bits are several times as fast on GPUs, and "
        "bfloat16 on CPUs with AMX",
    )


def not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def load_captioner(name: str, device: str | None, dtype: str | None = None):
    from transformers import AutoConfig
    from transformers.utils import logging

    from .. import EMOJI_MINI, PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name == "emoji-mini":
        print("clipcap: emoji-mini knows drawings of emoji only; --model takes other captioners", file=sys.stderr)
        name = EMOJI_MINI
    elif name == "photo-mini":
        name = PHOTO_MINI
    device = pick_device(device)
    name = os.path.expanduser(name)
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"{name}: no such folder; --model takes a folder, a Hub id, emoji-mini or photo-mini")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(f"There is no captioner {name!r} to be had: {error}") from error
    if config.model_type != "clipcap":
        raise ValueError(f"{name} is a {config.model_type} model, not a ClipCap captioner")
    model = ClipCapForConditionalGeneration.from_pretrained(name, dtype=dtype or "auto").to(device).eval()
    return model, ClipCapProcessor.from_pretrained(name)


def pick_device(name: str | None):
    """The device of that name; by default an accelerator if there is one, under torchrun that of this process."""
    import torch

    if name is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from ..processes import process_state

        return process_state().device
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name} here: {str(error).splitlines()[0]}") from error
    return device


def add_data_arguments(parser: argparse.ArgumentParser):
    from ..data import READERS

    data = parser.add_argument_group("data")
    data.add_argument("data", metavar="DATA", help="annotation file, folder, shards or Hub id, as --data-format says")
    data.add_argument(
        "--data-format",
        choices=list(READERS),
        default="hub",
        help="what DATA is; hub, the default, is all that `datasets.load_dataset` takes",
    )
    data.add_argument("--images", metavar="DIR", help="folder of the images (default: that of DATA)")
    data.add_argument("--split", metavar="NAME", help="one split (default: all)")
    data.add_argument(
        "--missing",
        choices=["error", "skip"],
        help="what to do with images that are listed but not there (default: skip for conceptual, else error)",
    )
    for name, what in (("image", "images"), ("caption", "captions"), ("id", "image ids")):
        data.add_argument(
            f"--{name}-column", metavar="NAME", help=f"column of the {what}, where DATA has named columns"
        )
    data.add_argument(
        "--streaming", action="store_true", help="read a Hub data set while it is used, without storing it"
    )


def load_data(arguments):
    from ..data import load_captions

    columns = {name: getattr(arguments, name) for name in ("image_column", "caption_column", "id_column")}
    columns = {name: value for name, value in columns.items() if value is not None}
    if columns.get("caption_column"):
        columns["caption_column"] = columns["caption_column"].split(",")
    if arguments.streaming:
        columns["streaming"] = True
    return load_captions(
        arguments.data_format,
        arguments.data,
        images=arguments.images,
        split=arguments.split,
        missing=arguments.missing,
        **columns,
    )
