"""Let people without this package load a checkpoint: its code lies beside the weights."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.dynamic_module_utils import get_relative_import_files


# transformers copies a module with what it imports, and a captioner that was loaded without this package needs all of its
# code to be saved again.
if TYPE_CHECKING:
    from .configuration_clipcap import ClipCapConfig  # noqa: F401
    from .modeling_clipcap import ClipCapForConditionalGeneration  # noqa: F401
    from .pipeline_clipcap import ImageCaptioningPipeline  # noqa: F401
    from .processing_clipcap import ClipCapProcessor  # noqa: F401

_AUTO_MAP = {
    "AutoConfig": "configuration_clipcap.ClipCapConfig",
    "AutoModel": "modeling_clipcap.ClipCapForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_clipcap.ClipCapForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_clipcap.ClipCapForConditionalGeneration",
}
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_clipcap.ClipCapProcessor"}
_PIPELINES = {
    "image-captioning": {
        "impl": "pipeline_clipcap.ImageCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


def add_code(folder: str | os.PathLike) -> list[Path]:
    r"""
    Put the code of a saved captioner beside its weights, so that people who do not have this package can load it with
    `trust_remote_code=True`. With the package imported, its own code is used and no trust is asked for.

    Args:
        folder (`str` or `os.PathLike`): Where model and processor were saved.

    Returns:
        `list[Path]`: The files of code.

    Raises:
        ValueError: If the folder holds no captioner.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from clipcap_hf import EMOJI_MINI

    >>> captioner = pipeline("image-captioning", model=EMOJI_MINI)
    >>> captioner.push_to_hub("me/my-captioner", with_code=True)  # doctest: +SKIP

    ```"""
    folder = Path(folder)
    config = read_captioner_config(folder)
    here = Path(__file__).parent
    needed = set()
    for module in ("configuration_clipcap", "modeling_clipcap", "processing_clipcap", "pipeline_clipcap"):
        needed |= {here / f"{module}.py", *map(Path, get_relative_import_files(here / f"{module}.py"))}
    written = []
    for source in sorted(needed):
        if source.parent.resolve() != folder.resolve():
            shutil.copyfile(source, folder / source.name)
        written.append(folder / source.name)
    # The code first, the references to it last: what is interrupted here still loads with the package.
    if (processor_file := folder / "processor_config.json").is_file():
        processor = json.loads(processor_file.read_text(encoding="utf-8"))
        _write_json(processor_file, {**processor, "auto_map": _PROCESSOR_AUTO_MAP})
    _write_json(folder / "config.json", {**config, "auto_map": _AUTO_MAP, "custom_pipelines": _PIPELINES})
    return written


def read_captioner_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a saved captioner.

    Raises:
        ValueError: If there is none, or it is that of another kind of model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no captioner there, config.json is missing. Save the model into the folder first."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "clipcap":
        raise ValueError(
            f"{folder}: its config.json is of a `{config.get('model_type')}`, not of a clipcap captioner."
        )
    return config


def _write_json(path: Path, value: dict[str, Any]):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


__all__ = ["add_code"]
