"""Hugging Face-native ClipCap: image captioning by a CLIP prefix (Mokady et al. 2021)."""

# ruff: noqa: F403, F405  (the names of `_public` are listed once, in `__all__`)

import sys
from pathlib import Path

from .assets import EMOJI_MINI, PHOTO_MINI


__version__ = "0.2.0"

# transformers' Trainer takes seconds to import.
_LAZY = {"CaptioningCollator": "training.collator", "ClipCapTrainer": "training.trainer"}


def _is_command_line() -> bool:
    """Tell whether Python was started as `clipcap` or `python -m clipcap_hf`."""
    if sys.argv[:1] == ["-m"]:  # what Python puts there while it looks for the module to run
        start = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else len(sys.orig_argv)
        return sys.orig_argv[start : start + 1] in (["clipcap_hf"], ["clipcap_hf.cli"])
    return bool(sys.argv) and Path(sys.argv[0]).name in ("clipcap", "clipcap.exe")


# The command line answers `--help` without waiting for torch; it imports this before it runs a command.
if not _is_command_line():
    from ._public import *


def __getattr__(name: str):
    if name in __all__:
        from importlib import import_module

        from . import _public  # first: it prepares what the others import

        return getattr(import_module(f".{_LAZY[name]}", __name__) if name in _LAZY else _public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EMOJI_MINI",
    "PHOTO_MINI",
    "CaptionMemory",
    "CaptionReranker",
    "CaptioningCollator",
    "ClipCapCausalLMOutputWithPast",
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapModel",
    "ClipCapModelOutputWithPast",
    "ClipCapPreTrainedModel",
    "ClipCapProcessor",
    "ClipCapTrainer",
    "ClipCapVideoProcessor",
    "DetectorVisionConfig",
    "DetectorVisionModel",
    "ImageCaptioningPipeline",
    "OpenClipImageProcessor",
    "OpenClipVisionConfig",
    "OpenClipVisionModel",
    "PillowImageProcessor",
    "add_code",
    "official_beam_search",
    "prepack_weights",
    "warm_start_mapper",
    "write_model_card",
]
