"""Arguments that several commands share, and how to load the devices, captioners and data that they name."""

import argparse
import os
import sys

from ..ranges import BEAMS, COUNT, COUNT_OR_NONE, SEED, WORKERS, number


DTYPES = ("float32", "bfloat16", "float16")
#: The names of `clipcap_hf.data.READERS`, whose import takes seconds.
DATA_FORMATS = (
    "karpathy",
    "coco",
    "stair",
    "nocaps",
    "official",
    "conceptual",
    "flickr8k",
    "imagefolder",
    "webdataset",
    "hub",
)


# What the packaged captioners were made for.
_ABOUT = {"emoji-mini": "drawings of emoji", "photo-mini": "photographs of everyday things"}


positive, not_negative = number(int, COUNT), number(int, COUNT_OR_NONE)
beams, workers, seed = number(int, BEAMS), number(int, WORKERS), number(int, SEED)


def add_model_argument(parser: argparse.ArgumentParser, default: str | None = None, **kwargs):
    what = "captioner: a folder, a Hub id, photo-mini (knows photographs) or emoji-mini (knows drawings of emoji)"
    default_text = f" (default: {default})" if default else ""
    parser.add_argument("--model", default=default, metavar="NAME", help=what + default_text, **kwargs)


def add_beams_argument(parser, default: int | str, reranks: bool = False):
    """Add `--beams`; a command that can re-rank leaves it None, since re-ranking has another default."""
    parser.add_argument(
        "--beams",
        type=beams,
        default=None if reranks else default,
        metavar="N",
        help=f"beam search with N beams; 1 is greedy (default: {default}{'; 10 with --rerank' if reranks else ''})",
    )


def add_speed_arguments(parser: argparse.ArgumentParser, batch_size: int = 32, dtype: str = "as stored"):
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="N", help="images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=workers,
        metavar="N",
        help="processes that read images (default: by their number, the device and the cores)",
    )
    add_device_arguments(parser, dtype)


def add_device_arguments(
    parser: argparse.ArgumentParser, default: str = "as stored", default_dtype: str | None = None
):
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: an accelerator if available)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default_dtype,
        help=f"type of the arithmetic (default: {default}); 16 bits are several times as fast on GPUs, and bfloat16 "
        "on CPUs with AMX",
    )


def add_reduce_jpeg_argument(parser):
    parser.add_argument(
        "--reduce-jpeg",
        action="store_true",
        help="read large JPEG files at a half, a quarter or an eighth of their size where that is twice what the "
        "vision tower needs: faster, and nearly the same",
    )


def add_rerank_arguments(parser):
    parser.add_argument(
        "--rerank",
        action="store_true",
        help="choose among the captions of the beam search (10 beams unless --beams says otherwise) by the text tower "
        "of the captioner's CLIP: the one saved with the captioner, or the CLIP that its configuration names",
    )
    parser.add_argument(
        "--text-tower",
        metavar="NAME",
        help="re-rank by the text tower of this CLIP: a Hub id, folder or open_clip name",
    )
    parser.add_argument(
        "--rerank-weight",
        type=number(float, COUNT_OR_NONE),
        metavar="W",
        help="weight of the cosine of image and text, added to the mean log-probability (default: the text tower's, "
        "or 10)",
    )


def check_rerank(arguments) -> bool:
    """Tell whether to re-rank; refuse settings that cannot, before anything is loaded."""
    reranks = arguments.rerank or arguments.text_tower is not None
    if arguments.rerank_weight is not None and not reranks:
        raise ValueError("--rerank-weight goes with --rerank or --text-tower")
    if reranks and arguments.beams == 1:
        raise ValueError("--rerank chooses among the captions of several beams: give --beams of 2 or more, or none")
    return reranks


def load_reranker(arguments, model, processor):
    from ..assets import resolve
    from ..model.reranking_clipcap import CaptionReranker

    text_tower = None if arguments.text_tower is None else resolve(arguments.text_tower)
    return CaptionReranker.from_pretrained(model, processor, text_tower, arguments.rerank_weight)


def reading_workers(workers: int | None, images: int, device) -> int:
    """Return the number of processes that read images: as requested, or depending on images and device."""
    from ..processes import default_workers

    return default_workers(images, device=device) if workers is None else workers


def load_captioner(name: str, device: str | None, dtype: str | None = None, prepack: bool = True):
    """
    Return the model, ready to caption, and the processor. Code in the model's folder never runs.

    On a CPU with memory to spare the model also keeps its weights as the processor multiplies by them (`prepack`).
    """
    from transformers.utils import logging

    from .. import ClipCapForConditionalGeneration, ClipCapProcessor
    from ..assets import resolve
    from ..model.damage_clipcap import load_config
    from ..prepacking import prepack_where_it_fits

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name in _ABOUT:
        print(f"clipcap: {name} knows {_ABOUT[name]} only; --model takes other captioners", file=sys.stderr)
    picked = pick_device(device)
    name = os.path.expanduser(resolve(name))
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"{name}: no such folder; --model takes a folder, a Hub id, emoji-mini or photo-mini")
    try:
        config = load_config(name, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"Could not load the captioner {name!r}: {error}") from error
    if config.model_type != "clipcap":
        raise ValueError(f"{name} is a {config.model_type} model, not a ClipCap captioner")
    model = ClipCapForConditionalGeneration.from_pretrained(name, dtype=dtype or "auto")
    model = model.to(picked).eval()
    if prepack and picked.type == "cpu":
        prepack_where_it_fits(model)
    return model, ClipCapProcessor.from_pretrained(name)


def pick_device(name: str | None):
    """Return the named device; by default an accelerator if available, or under torchrun this process's device."""
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


def add_data_arguments(parser):
    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="?", metavar="DATA", help=argparse.SUPPRESS)  # as it was called at first
    data.add_argument(
        "--data",
        dest="data_option",
        metavar="DATA",
        help="annotation file, folder, shards or Hub id, depending on --data-format",
    )
    data.add_argument(
        "--data-format",
        choices=DATA_FORMATS,
        default="hub",
        help="format of DATA; hub, the default, is anything that `datasets.load_dataset` takes",
    )
    data.add_argument("--images", metavar="DIR", help="image folder (default: the folder of DATA)")
    data.add_argument("--split", metavar="NAME", help="use one split (default: all)")
    more = parser.add_more_arguments("more about the data")
    more.add_argument(
        "--missing",
        choices=["error", "skip"],
        help="what to do with listed images that do not exist (default: skip for conceptual, else error)",
    )
    for name, what in (("image", "images"), ("caption", "captions"), ("id", "image ids")):
        more.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {what}, if DATA has named columns")
    more.add_argument(
        "--streaming", action="store_true", help="read a Hub data set while using it, without storing it"
    )


def load_data(arguments):
    from ..data import load_captions

    if (arguments.data is None) == (arguments.data_option is None):
        raise ValueError("give the data once: DATA or --data DATA")
    columns = {name: getattr(arguments, name) for name in ("image_column", "caption_column", "id_column")}
    columns = {name: value for name, value in columns.items() if value is not None}
    if columns.get("caption_column"):
        columns["caption_column"] = columns["caption_column"].split(",")
    if arguments.streaming:
        columns["streaming"] = True
    return load_captions(
        arguments.data_format,
        arguments.data if arguments.data_option is None else arguments.data_option,
        images=arguments.images,
        split=arguments.split,
        missing=arguments.missing,
        **columns,
    )
