"""Record how a score was made: model and weights, processor, decoding, data and versions."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .digests import digest
from .evaluation_set import EvaluationSet


PACKAGES = ("clipcap-hf", "torch", "transformers", "open_clip_torch", "pillow", "numpy", "pycocoevalcap", "fugashi")
# Where a configuration came from, which changes no caption.
ORIGIN = ("_name_or_path", "_commit_hash", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def model_record(model, name: str) -> dict[str, Any]:
    """Record a model's name, Hub revision, variant and precision, and digests of its weights and settings."""
    from ..model.hashing_clipcap import weights_hash

    config = model.config
    return {
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "weights_sha256": weights_hash(model.state_dict().values()),
        "config_sha256": digest(_without_origin(config.to_dict())),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "mapping_type": config.mapping_type,
        "prefix_length": config.prefix_length,
        "freeze_language_model": config.freeze_language_model,
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }


def processor_record(processor) -> dict[str, Any]:
    """Record the image transform, the prompt template and a digest of the tokenizer."""
    image_processor = processor.image_processor
    return {
        "image_transform": None if image_processor is None else _plain(image_processor.to_dict()),
        "prompt_template": processor.prompt_template,
        "caption_start": processor.caption_start,
        "prefix_length": processor.prefix_length,
        "tokenizer_sha256": digest(_tokenizer_settings(processor.tokenizer)),
    }


def _tokenizer_settings(tokenizer) -> dict[str, Any]:
    """Collect everything that turns text into tokens and back."""
    settings = {
        "class": type(tokenizer).__name__,
        "special_tokens": tokenizer.special_tokens_map,
        "padding_side": tokenizer.padding_side,
        "vocabulary": tokenizer.get_vocab(),
        "clean_up": getattr(tokenizer, "clean_up_tokenization_spaces", None),
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Each call sets padding and truncation.
        settings["backend"] = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    return _plain(settings)


def _without_origin(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(name): _without_origin(value) for name, value in settings.items() if name not in ORIGIN}
    return _plain(settings)


def _plain(content: Any) -> Any:
    """Convert settings to what JSON can hold."""
    return json.loads(json.dumps(content, default=str))


def decoding_record(model, generate_kwargs: dict) -> dict[str, Any]:
    """Record the settings of the model's generation config, with the overrides of this run."""
    settings = {**model.generation_config.to_diff_dict(), **generate_kwargs}
    settings.pop("transformers_version", None)
    if (rerank := settings.get("rerank")) is not None:
        settings["rerank"] = rerank.record()
    return {name: getattr(value, "__name__", value) for name, value in sorted(settings.items())}


def data_record(data: EvaluationSet) -> dict[str, Any]:
    """Record the source and number of the references, and a digest of ids, references and domains."""
    domains: Sequence[str | None] = data.domains or [None] * len(data)
    content = sorted(zip(map(str, data.ids), data.references, domains), key=lambda image: image[0])
    return {
        "source": data.source,
        "images": len(data),
        "references": sum(map(len, data.references)),
        "sha256": digest(content),
    }


def versions() -> dict[str, str]:
    """Find the versions of Python and of the packages that affect a score."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
