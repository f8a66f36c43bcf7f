"""What names of models stand for: embedded captioners, parts of captioners, GGUF files and Python packages."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .assets import resolve
from .model.modeling_clipcap import ClipCapForConditionalGeneration
from .model.packages_clipcap import donor_folder
from .model.processing_clipcap import ClipCapProcessor


def vision_source(name: str) -> tuple[str | PreTrainedModel, Any]:
    """Return the name of a vision tower and None, or for a captioner its tower and its image processor."""
    name = os.path.expanduser(resolve(name))
    if not is_captioner(name):
        return name, None
    tower = ClipCapForConditionalGeneration.from_pretrained(name).vision_tower
    if tower is None:
        raise ValueError(f"The captioner {name} works on embeddings alone and has no vision tower.")
    return tower, ClipCapProcessor.from_pretrained(name).image_processor


@dataclass
class TextSource:
    """
    A language model and its tokenizer, with the arguments for loading them.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): Its name, or the loaded model.
        tokenizer (`str`): Name of its tokenizer.
        model_kwargs (`dict`): For loading the model by its name.
        tokenizer_kwargs (`dict`): For loading the tokenizer.
    """

    model: str | PreTrainedModel
    tokenizer: str
    model_kwargs: dict[str, str] = field(default_factory=dict)
    tokenizer_kwargs: dict[str, str] = field(default_factory=dict)


def text_source(name: str) -> TextSource:
    """Find a language model by name.

    Args:
        name (`str`): A Hub id or folder, a GGUF file, `"package:NAME"` for an installed Python package, or a
            captioner, whose language model is used.
    """
    name = os.path.expanduser(resolve(name))
    if name.endswith(".gguf"):
        folder, file = os.path.split(name)
        return TextSource(folder or ".", folder or ".", {"gguf_file": file}, {"gguf_file": file})
    folder = donor_folder(name)
    if not is_captioner(folder):
        kwargs = _only_gguf(Path(folder))
        return TextSource(name, name, kwargs, kwargs)
    donor = (AutoConfig.from_pretrained(folder).donors or {}).get("language_model")
    if donor:  # frozen, and loaded from where it comes from
        return TextSource(
            donor["name"], folder, {key: donor[key] for key in ("gguf_file", "revision") if key in donor}
        )
    return TextSource(ClipCapForConditionalGeneration.from_pretrained(folder).language_model, folder)


def is_captioner(name: str) -> bool:
    """Tell whether a folder holds a captioner. Nothing is asked of the Hub."""
    if not (Path(name) / "config.json").is_file():
        return False
    settings, _ = PreTrainedConfig.get_config_dict(name)
    return settings.get("model_type") == "clipcap"


def check_folder(name: str | None, option: str):
    """Refuse the name of a folder that does not exist, before it is taken for a Hub id."""
    if name is not None and name.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(name)):
        raise ValueError(f"{option}: there is no file or folder {name}")


def _only_gguf(folder: Path) -> dict[str, str]:
    """Return the GGUF file that holds the weights of a folder without other weights."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files or (folder / "config.json").is_file():
        return {}
    if len(files) > 1:
        raise ValueError(f"{folder} has several GGUF files, {', '.join(files)}: name one, {folder / files[0]}.")
    return {"gguf_file": files[0]}
