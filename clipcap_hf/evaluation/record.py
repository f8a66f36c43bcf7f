"""What made a number: the model and its weights, decoding, data, versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .coco_files import digest
from .protocol import EvaluationSet


PACKAGES = ("clipcap-hf", "torch", "transformers", "open_clip_torch", "pillow", "numpy", "pycocoevalcap", "fugashi")


def model_record(model, name: str) -> dict[str, Any]:
    """A model's name, revision on the Hub, variant, weights (wherever they were loaded from) and precision."""
    from ..model.donors_clipcap import weights_hash

    config = model.config
    return {
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "weights_sha256": weights_hash(model.state_dict().values()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mapping_type": config.mapping_type,
        "prefix_length": config.prefix_length,
        "freeze_language_model": config.freeze_language_model,
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }


def decoding_record(model, generate_kwargs: dict) -> dict[str, Any]:
    """What the model's generation config sets, and what was asked for beside it."""
    settings = {**model.generation_config.to_diff_dict(), **generate_kwargs}
    settings.pop("transformers_version", None)
    return {name: getattr(value, "__name__", value) for name, value in sorted(settings.items())}


def data_record(data: EvaluationSet) -> dict[str, Any]:
    """Where the references are from, how many, and a digest of ids, references and domains."""
    domains = data.domains or [None] * len(data)
    content = sorted(zip(map(str, data.ids), data.references, domains), key=lambda image: image[0])
    return {
        "source": data.source,
        "images": len(data),
        "references": sum(map(len, data.references)),
        "sha256": digest(content),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that have a say in a score."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
