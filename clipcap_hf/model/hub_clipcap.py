"""Copy the code of a captioner next to its weights, so that people without this package can load it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


_AUTO_MAP = {
    "AutoConfig": "captioner.ClipCapConfig",
    "AutoModel": "captioner.ClipCapModel",
    "AutoModelForImageTextToText": "captioner.ClipCapForConditionalGeneration",
    "AutoModelForMultimodalLM": "captioner.ClipCapForConditionalGeneration",
}
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "captioner.ClipCapProcessor"}
_IMAGE_PROCESSORS = ("OpenClipImageProcessor", "PillowImageProcessor")
_PIPELINES = {
    "image-captioning": {
        "impl": "captioner.ImageCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


def add_code(folder: str | os.PathLike) -> list[Path]:
    r"""
    Copy the code of a saved captioner next to its weights.

    People without this package can then load the captioner with `trust_remote_code=True`. Where the package is
    imported, its own code is used and no trust is needed.

    Args:
        folder (`str` or `os.PathLike`): The folder of the saved model and processor.

    Returns:
        `list[Path]`: The code files.

    Raises:
        ValueError: If the folder holds no captioner.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from clipcap_hf import EMOJI_MINI

    >>> captioner = pipeline("image-captioning", model=EMOJI_MINI)
    >>> captioner.push_to_hub("me/my-captioner", with_code=True)  # doctest: +SKIP

    ```
    """
    folder = Path(folder)
    config = read_captioner_config(folder)
    written = [
        Path(shutil.copyfile(module, folder / module.name))
        for module in sorted(Path(__file__).parent.glob("[!_]*.py"))
    ]
    # Code first, references to it last: if this is interrupted, the folder still loads with the package.
    if (processor_file := folder / "processor_config.json").is_file():
        processor = json.loads(processor_file.read_text(encoding="utf-8"))
        image_processor = processor.get("image_processor") or {}
        if (kind := image_processor.get("image_processor_type")) in _IMAGE_PROCESSORS:
            image_processor["auto_map"] = {"AutoImageProcessor": f"captioner.{kind}"}
        if video_processor := processor.get("video_processor"):
            video_processor["auto_map"] = {"AutoVideoProcessor": "captioner.ClipCapVideoProcessor"}
        _write_json(processor_file, {**processor, "auto_map": _PROCESSOR_AUTO_MAP})
    _write_json(folder / "config.json", {**config, "auto_map": _AUTO_MAP, "custom_pipelines": _PIPELINES})
    return written


def read_captioner_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the `config.json` of a saved captioner.

    Raises:
        ValueError: If the file is missing, damaged or belongs to another kind of model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no captioner there, config.json is missing. Save the model into the folder first."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again.") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "clipcap":
        raise ValueError(f"{folder}: its config.json is of a `{model_type}`, not of a clipcap captioner.")
    return config


def _write_json(path: Path, value: dict[str, Any]):
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str):
    """Write a UTF-8 file; until it is complete, the old one stays."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


__all__ = ["add_code"]
