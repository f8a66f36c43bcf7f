"""What several commands take."""

import argparse
import os
import sys


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_captioner(name: str, device: str | None):
    import torch
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
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {device} here: {str(error).splitlines()[0]}") from error
    name = os.path.expanduser(name)
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"{name}: no such folder; --model takes a folder, a Hub id, emoji-mini or photo-mini")
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "clipcap":
        raise ValueError(f"{name} is a {config.model_type} model, not a ClipCap captioner")
    model = ClipCapForConditionalGeneration.from_pretrained(name).to(device).eval()
    return model, ClipCapProcessor.from_pretrained(name)
