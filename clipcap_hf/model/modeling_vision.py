"""Vision towers: their classes, loading by name, and the features that the mapping network reads."""

import difflib
import math
from typing import Any

import torch
from transformers import (
    AutoModel,
    CLIPVisionModelWithProjection,
    MetaClip2VisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .checkpoints_open_clip import is_open_clip_name, list_open_clip_names
from .configuration_clipcap import PROJECTED_TOWERS, check_config_sizes, clip_embed_dim_of
from .damage_clipcap import load_config, named, naming
from .modeling_detector import DetectorVisionModel
from .modeling_open_clip import OpenClipVisionModel, clip_vision_obstacle, load_open_clip_config
from .modeling_xclip import XCLIPVideoModel


# AutoModel would omit CLIP's projection and X-CLIP's integration of frames.
_TOWER_CLASSES = {
    "clip_vision_model": CLIPVisionModelWithProjection,
    "metaclip_2_vision_model": MetaClip2VisionModelWithProjection,
    "open_clip_vision_model": OpenClipVisionModel,
    "xclip_vision_model": XCLIPVideoModel,
    "detector_vision_model": DetectorVisionModel,
}

# Towers that take images of one size; others, such as DINOv2 and ConvNeXt, take any.
_FIXED_SIZE = (
    *("clip_vision_model", "metaclip_2_vision_model", "siglip_vision_model", "open_clip_vision_model"),
    *("xclip_vision_model", "blip_vision_model", "vit", "deit", "beit"),
)

# For suggestions only: the Hub offers no search for similar names.
_POPULAR_TOWERS = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "google/siglip-base-patch16-224",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224",
    "google/siglip2-so400m-patch14-384",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "google/vit-base-patch16-224-in21k",
    "microsoft/xclip-base-patch32",
)


def vision_tower_class(model_type: str) -> Any:
    """Return the class of a tower; by name, since remote code has its own configuration classes."""
    return _TOWER_CLASSES.get(model_type, AutoModel)


def build_vision_tower(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights from its configuration."""
    tower_class = vision_tower_class(vision_config.model_type)
    if tower_class is not AutoModel:
        return tower_class(vision_config)
    try:
        return AutoModel.from_config(vision_config)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers' AutoModel does not support `{vision_config.model_type}`: choose another tower."
        ) from None


def load_vision_config(name: str, **kwargs) -> PreTrainedConfig:
    """Load a tower's configuration by any name that [`load_vision_tower`] accepts, without the weights.

    Raises:
        ValueError: If there is no such tower; the message suggests similar names.
    """
    if is_open_clip_name(name):
        return load_open_clip_config(name, **_hub_kwargs(kwargs))
    try:
        config = load_config(name, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        if name in _POPULAR_TOWERS:
            raise ValueError(f"Could not load the vision tower {name!r}: {error}") from error
        raise ValueError(f"There is no vision tower {name!r}{_suggestion(name)} ({error})") from error
    if config.model_type == "clipcap":
        raise ValueError(f"{name} is a captioner, not a vision tower: pass the name of its vision tower.")
    # The configuration of a complete CLIP contains its tower's.
    vision_config = getattr(config, "vision_config", None) or config
    if vision_config.model_type in PROJECTED_TOWERS:
        # A complete CLIP uses its own, not the tower's.
        vision_config.projection_dim = getattr(config, "projection_dim", vision_config.projection_dim)
    check_config_sizes(f"vision tower {name}", vision_config)
    return vision_config


def load_vision_tower(
    name: str, dtype: torch.dtype | str | None = None, vision_feature: str = "pooled", **kwargs
) -> PreTrainedModel:
    """Load a pretrained vision tower.

    Plain ViTs of open_clip become [`~transformers.CLIPVisionModelWithProjection`], which gives the same embeddings and
    makes the captioner loadable without open_clip; its other towers are [`OpenClipVisionModel`].

    Args:
        name (`str`): The Hub id or folder of a tower or of a model with a `vision_config`
            (`"openai/clip-vit-base-patch32"`), or an open_clip checkpoint (`"ViT-B-32/openai"`, `"hf-hub:ORG/REPO"` or
            a folder with `open_clip_config.json`).
        dtype (`torch.dtype`, *optional*): The dtype of the weights.
        vision_feature (`str`): As in [`ClipCapConfig`]; `"patches"` needs no weights of a pooling layer.
        kwargs: Arguments of the tower's `from_pretrained` (`revision`, `token`, ...).

    Raises:
        ValueError: If there is no such tower, or its checkpoint lacks weights, which would be random.
    """
    kwargs.setdefault("trust_remote_code", False)  # otherwise transformers asks on standard input
    vision_config = load_vision_config(name, **kwargs)
    if is_open_clip_name(name):
        tower = OpenClipVisionModel.from_open_clip(name, dtype=dtype, **_hub_kwargs(kwargs))
        return tower if clip_vision_obstacle(tower.config) else tower.to_clip_vision_model()
    tower_class = vision_tower_class(vision_config.model_type)
    with named(name), naming(f"The weights in {name}"):
        tower, info = tower_class.from_pretrained(
            name, config=vision_config, dtype=dtype, output_loading_info=True, **kwargs
        )
    missing = sorted(info["missing_keys"])
    if vision_feature == "patches":
        missing = [key for key in missing if "pool" not in key and "head" not in key]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of its `{vision_config.model_type}` tower, for example "
            f"{missing[0]}, which would be random. Choose a checkpoint that has them"
            + ('; `vision_feature="patches"` needs no pooling layer.' if "pool" in missing[0] else ".")
        )
    return tower


def _hub_kwargs(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}


def _suggestion(name: str) -> str:
    # The official code's "ViT-B/32" is "ViT-B-32/openai" here.
    known = {known.lower(): known for known in (*list_open_clip_names(), *_POPULAR_TOWERS) if known != name}
    names = (name.lower(), f"{name.lower().replace('/', '-')}/openai")
    near = [known[found] for text in names for found in difflib.get_close_matches(text, known, n=2, cutoff=0.75)]
    near.sort(key=lambda found: -max(difflib.SequenceMatcher(None, found.lower(), text).ratio() for text in names))
    near = list(dict.fromkeys(near)) or [known[text] for text in known if name.lower() in text]  # "siglip"
    return f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else "."


def vision_feature_dim(vision_config: PreTrainedConfig, vision_feature: str) -> int:
    """Find the width of a tower's feature by a forward pass on the meta device, without weights.

    Raises:
        ValueError: If the tower cannot give this feature.
    """
    if vision_config.model_type in _TOWER_CLASSES:
        return clip_embed_dim_of(vision_config, vision_feature)
    size = getattr(vision_config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.device("meta"), torch.no_grad():
            tower = build_vision_tower(vision_config).eval()
            if tower.main_input_name != "pixel_values":
                raise TypeError(f"it takes `{tower.main_input_name}`")
            embeds, _ = embed_pixels(tower, torch.zeros(1, 3, height, width), vision_feature)
    except NotImplementedError:  # an operation that the meta device cannot run
        return clip_embed_dim_of(vision_config, vision_feature)
    except TypeError as error:
        raise ValueError(f"A `{vision_config.model_type}` is not an encoder of plain images: {error}") from error
    return embeds.shape[-1]


def embed_pixels(
    tower: PreTrainedModel, pixel_values: torch.Tensor, vision_feature: str = "pooled", **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Embed images or videos, for the mapping network to read.

    Args:
        tower ([`~transformers.PreTrainedModel`]): The vision tower.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)` or `(batch, frames, 3, height, width)`):
            Preprocessed images or videos. Image towers embed each frame, and the embeddings are averaged.
        vision_feature (`str`): `"pooled"`: the projected or pooled embedding, or the mean of the patch tokens where a
            tower has neither. `"patches"`: the last hidden state of each patch, without class and register tokens.
        kwargs: Arguments of the tower's `forward`.

    Returns:
        Embeddings of shape `(batch, dim)`, or `(batch, patches, dim)` for patches, and the tower's outputs.
    """
    model_type = tower.config.model_type
    if pixel_values.ndim not in (4, 5):
        raise ValueError(
            "`pixel_values` must be images (batch, 3, height, width) or videos (batch, frames, 3, height, width), got "
            f"the shape {tuple(pixel_values.shape)}."
        )
    if model_type == "open_clip_vision_model" and vision_feature == "patches":
        kwargs["output_patches"] = True
    _check_size(pixel_values, tower.config, kwargs)
    frames = pixel_values.shape[1] if pixel_values.ndim == 5 and model_type != "xclip_vision_model" else None
    if frames is not None:
        pixel_values = pixel_values.flatten(0, 1)
    outputs = tower(pixel_values=pixel_values.to(tower.dtype), return_dict=True, **kwargs)
    if vision_feature == "patches":
        embeds = _patch_tokens(outputs, tower.config, pixel_values.shape[-2:])
    else:
        embeds = _pooled_embeds(outputs, tower.config, pixel_values.shape[-2:])
    if frames is not None:
        embeds = embeds.unflatten(0, (-1, frames)).mean(1)
    return embeds, outputs


def _check_size(pixel_values: torch.Tensor, config: PreTrainedConfig, kwargs: dict):
    size = getattr(config, "image_size", None)
    if config.model_type not in _FIXED_SIZE or size is None or kwargs.get("interpolate_pos_encoding"):
        return
    wanted, found = (size, size) if isinstance(size, int) else tuple(size), tuple(pixel_values.shape[-2:])
    if found != wanted:
        raise ValueError(
            f"The images are {found[0]} x {found[1]} pixels, but the vision tower takes {wanted[0]} x {wanted[1]}: "
            "the image processor (in processor_config.json or preprocessor_config.json) belongs to another tower."
        )


def place_pixels(
    pixel_values: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Move images to a device in the memory format that makes convolutional towers twice as fast: channels last."""
    memory_format = torch.channels_last if pixel_values.ndim == 4 else torch.preserve_format
    return pixel_values.to(device=device, dtype=dtype, memory_format=memory_format)


def _pooled_embeds(outputs: ModelOutput, config: PreTrainedConfig, image_size: tuple[int, int]) -> torch.Tensor:
    for name in ("image_embeds", "pooler_output"):
        if (embeds := outputs.get(name)) is not None:
            return embeds.flatten(1)  # convolutional towers pool to (batch, channels, 1, 1)
    return _patch_tokens(outputs, config, image_size).mean(1)


def _patch_tokens(outputs: ModelOutput, config: PreTrainedConfig, image_size: tuple[int, int]) -> torch.Tensor:
    hidden_states = outputs.get("last_hidden_state")
    if hidden_states is None or config.model_type == "vit_mae":
        reason = "gives no `last_hidden_state`" if hidden_states is None else "hides patches at random"
        raise ValueError(f"A `{config.model_type}` tower {reason}, so it has no patch tokens to read.")
    if hidden_states.ndim == 4:  # a feature map
        return hidden_states.flatten(2).transpose(1, 2)
    # Class, distillation and register tokens come first.
    patch_size = getattr(config, "patch_size", None) or 1
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size[-2:]
    patches = (image_size[0] // patch_height) * (image_size[1] // patch_width)
    tokens = hidden_states.shape[1]
    if patches > tokens and image_size[0] == image_size[1]:  # a pyramid: its last stage is coarser than its patches
        patches = math.isqrt(tokens) ** 2
    return hidden_states[:, -patches:]
