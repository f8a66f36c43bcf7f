"""Weights and configurations of open_clip, from published models and from its training runs."""

import ast
import difflib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .damage_clipcap import check_archive, is_expanded


_WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")


def list_open_clip_names() -> list[str]:
    """List all pretrained open_clip models as `"ARCHITECTURE/TAG"`; none if open_clip is not installed."""
    try:
        from open_clip import list_pretrained
    except ImportError:
        return []
    return [f"{architecture}/{tag}" for architecture, tag in list_pretrained()]


def is_open_clip_name(name: str) -> bool:
    """Tell whether a name means an open_clip checkpoint, see [`OpenClipVisionModel.from_open_clip`]."""
    if name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file() or _is_weight_file(name):
        return True
    architecture, _, tag = name.partition("/")
    if not tag or Path(name).is_dir():
        return False
    return architecture in _architectures()


def _architectures() -> set[str]:
    """Name open_clip's architectures; without importing it, which takes longer than loading a small tower."""
    if (open_clip := sys.modules.get("open_clip")) is not None:
        return set(open_clip.list_models())  # there may be more by now (`open_clip.add_model_config`)
    spec = importlib.util.find_spec("open_clip")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return {path.stem for folder in folders for path in (Path(folder) / "model_configs").glob("*.json")}


def absolute_name(name: str) -> str:
    """Make the path in a name absolute; other names stay unchanged."""
    if os.path.isdir(name) or _is_weight_file(name):
        return os.path.abspath(name)
    architecture, _, path = name.partition("/")
    return f"{architecture}/{os.path.abspath(path)}" if _is_weight_file(path) else name


def _is_weight_file(name: str) -> bool:
    path = Path(name)
    return path.suffix in _WEIGHT_FILES and (path.is_file() or path.is_absolute())


def load_open_clip_checkpoint(name: str, with_weights: bool = True, **hub_kwargs) -> tuple[dict, dict, dict]:
    """Load configuration, preprocessing and weights of an open_clip checkpoint, with open_clip's own names.

    Returns:
        `(model_cfg, preprocess_cfg, state_dict)`; the state dict is empty without `with_weights`.
    """
    if _is_weight_file(name):
        load = _load_training_run
    elif name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file():
        load = _load_published
    else:
        load = _load_by_architecture
    model_cfg, preprocess_cfg, weights = load(name, with_weights, hub_kwargs)
    # As in open_clip, the tower sets the size.
    return model_cfg, {**preprocess_cfg, "size": model_cfg["vision_cfg"].get("image_size", 224)}, weights


def _load_training_run(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    """Load a weight file, and its architecture from open_clip_config.json or from a training run's params.txt."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name}: no such file.")
    weights = read_weights(path) if with_weights else {}
    if (beside := path.parent / "open_clip_config.json").is_file():
        return *_read_config(beside), weights
    # open_clip writes RUN/params.txt and RUN/checkpoints/epoch_N.pt.
    for params_file in (path.parent / "params.txt", path.parent.parent / "params.txt"):
        if params_file.is_file():
            return *_read_params(params_file), weights
    raise ValueError(
        f"{name} holds weights, but not their architecture: write 'ARCHITECTURE/{name}' with a name from "
        f"`open_clip.list_models()`, for example 'ViT-B-32/{name}', or put an open_clip_config.json or the training "
        "run's params.txt next to it."
    )


def _read_params(path: Path) -> tuple[dict, dict]:
    """Read architecture and preprocessing from the `NAME: VALUE` lines of a training run's params.txt."""
    lines = (line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines())
    params = {key: value for key, _, value in lines}
    model_cfg = _architecture(params.get("model", ""), str(path))
    if params.get("force_quick_gelu") == "True":
        model_cfg["quick_gelu"] = True
    if size := _value(params, "force_image_size"):
        size = size[0] if isinstance(size, list) and len(size) == 1 else size
        model_cfg["vision_cfg"] = {**model_cfg["vision_cfg"], "image_size": size}
    given = {
        "mean": _value(params, "image_mean"),
        "std": _value(params, "image_std"),
        "interpolation": _value(params, "image_interpolation"),
        "resize_mode": _value(params, "image_resize_mode"),
    }
    return model_cfg, {key: value for key, value in given.items() if value is not None}


def _value(params: dict[str, str], name: str):
    try:
        return ast.literal_eval(params.get(name, "None"))
    except (SyntaxError, ValueError):
        return params[name]  # a word


def _open_clip(source: str):
    try:  # outside a `try`, transformers' remote code would require open_clip of everybody
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"{source} is an open_clip model, which needs open_clip: `pip install open_clip_torch`."
        ) from error
    return open_clip


def _architecture(architecture: str, source: str) -> dict:
    model_cfg = _open_clip(source).get_model_config(architecture)
    if model_cfg is None:
        raise ValueError(f"{source}: open_clip has no architecture {architecture!r}, see `open_clip.list_models()`.")
    return dict(model_cfg)


def _load_published(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*filenames: str) -> Path | None:
        """Return the first of these files that exists."""
        if not name.startswith("hf-hub:"):
            return next((path for file in filenames if (path := Path(name) / file).is_file()), None)
        unreachable = None
        for filename in filenames:
            try:
                return Path(hf_hub_download(name.removeprefix("hf-hub:"), filename, **hub_kwargs))
            except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, but the Hub was not asked
                unreachable = error
            except EntryNotFoundError:
                pass
        if unreachable is not None:
            raise OSError(
                f"{name} could not be reached, and its {' or '.join(filenames)} is not in the cache: check the "
                "connection and `HF_HUB_OFFLINE`, or pass a folder."
            ) from unreachable
        return None

    path = fetch("open_clip_config.json")
    if path is None:
        raise ValueError(f"{name} is not an open_clip repository: it has no open_clip_config.json.")
    weights = {}
    if with_weights:
        weight_file = fetch("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        if weight_file is None:
            raise ValueError(f"{name} has neither open_clip_model.safetensors nor open_clip_pytorch_model.bin.")
        weights = read_weights(weight_file)
    return *_read_config(path), weights


def _read_config(path: Path) -> tuple[dict, dict]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_cfg = config["model_cfg"]
        if not isinstance(model_cfg["vision_cfg"], dict) or not isinstance(model_cfg["embed_dim"], int):
            raise TypeError("`vision_cfg` must be a mapping and `embed_dim` a number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a configuration of open_clip ({type(error).__name__}: {error}).") from error
    return model_cfg, config.get("preprocess_cfg") or {}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file or training checkpoint, without running any code in it.

    open_clip's own `load_checkpoint` also needs the text tower, and knows only one of these prefixes.

    Raises:
        ValueError: If the file is a Git LFS pointer, damaged, or holds more than weights.
    """
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository.")
    try:
        check_archive(path)
        weights: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        # Without the error's text, which may suggest `weights_only=False`: that runs code from the file.
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged or incomplete, or holds a "
            "whole pickled or TorchScript model. Copy or download it again, or save its `state_dict()`."
        ) from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    # `torch.compile` and DistributedDataParallel add prefixes to the names.
    named = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in weights.items()}
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights.")
    if any(map(is_expanded, tensors.values())):
        raise ValueError(f"{path} is damaged: its tensors are larger than what is stored of them.")
    return tensors


def _unpickle(path: Path):
    # Training scripts often store losses and scores with the weights, as numpy scalars.
    scalars = [np.float64(0), np.float32(0), np.int64(0), np.int32(0), np.bool_(0)]
    harmless = [scalars[0].__reduce__()[0], np.dtype, *(type(scalar.dtype) for scalar in scalars)]
    with torch.serialization.safe_globals(harmless):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_by_architecture(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    """Load a published model by `"ARCHITECTURE/TAG"`, or your own weights by `"ARCHITECTURE/FILE"`."""
    architecture, _, tag = name.partition("/")
    model_cfg = _architecture(architecture, name)
    if Path(tag).suffix in _WEIGHT_FILES:
        if not Path(tag).is_file():
            raise ValueError(f"{tag}: no such file.")
        return model_cfg, {}, read_weights(Path(tag)) if with_weights else {}
    open_clip = _open_clip(name)
    pretrained_cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not pretrained_cfg:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f" Did you mean '{architecture}/{near[0]}'?" if near else ""
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}. It has: {', '.join(tags)}.{hint}")
    # The weights' activation belongs to the tag, not to the architecture.
    quick_gelu = bool(pretrained_cfg.get("quick_gelu", model_cfg.get("quick_gelu", False)))
    model_cfg = {**model_cfg, "quick_gelu": quick_gelu}
    weights = {}
    if with_weights:
        model = open_clip.create_model(
            architecture, pretrained=tag, force_quick_gelu=quick_gelu, cache_dir=hub_kwargs.get("cache_dir")
        )
        weights = model.state_dict()
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color", "mode")
    preprocess_cfg = {key: pretrained_cfg[key] for key in names if pretrained_cfg.get(key) is not None}
    return model_cfg, preprocess_cfg, weights


__all__ = ["is_open_clip_name", "load_open_clip_checkpoint"]
