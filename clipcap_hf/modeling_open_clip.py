"""Any image tower of open_clip as a transformers model."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

from .configuration_clipcap import OpenClipVisionConfig


def _build_visual(config: OpenClipVisionConfig) -> nn.Module:
    # The tower is built from its configuration alone: open_clip's `create_model` also builds the text tower, wants to
    # download, and fails under the meta device that `from_pretrained` uses.
    try:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    except ImportError as error:
        raise ImportError("This model has an open_clip image tower: `pip install open_clip_torch`.") from error
    unknown = sorted(set(config.vision_cfg) - set(CLIPVisionCfg.__dataclass_fields__))
    if unknown:
        raise ValueError(f"open_clip's `vision_cfg` has no such fields: {', '.join(unknown)}.")
    return _build_vision_tower(config.embed_dim, config.vision_cfg, quick_gelu=config.quick_gelu)


class OpenClipVisionModel(PreTrainedModel):
    r"""
    The image tower of an open_clip model: `pixel_values` (batch, 3, height, width), normalised as the tower was
    trained, in; `image_embeds` (batch, embed_dim) out, as from [`~transformers.CLIPVisionModelWithProjection`].
    """

    config: OpenClipVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ResidualAttentionBlock"]

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        self.visual = _build_visual(config)
        self.supports_gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # timm keeps some tables (rotary embeddings, attention masks) as buffers outside the checkpoint; built under
        # the meta device they hold rubbish until they are computed again. Without this EVA is silently wrong.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs) -> CLIPVisionModelOutput:
        image_embeds = self.visual(pixel_values.to(self.dtype))
        if isinstance(image_embeds, (tuple, list)):  # towers with `output_tokens`: (pooled, tokens)
            image_embeds, tokens = image_embeds
        else:
            tokens = None
        output = CLIPVisionModelOutput(image_embeds=image_embeds, last_hidden_state=tokens)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def from_open_clip(cls, name: str, **kwargs) -> "OpenClipVisionModel":
        """
        Load the image tower of an open_clip checkpoint.

        Args:
            name (`str`): A folder with `open_clip_config.json` and `open_clip_model.safetensors`, `"hf-hub:ORG/REPO"`
                with the same two files, or `"ARCHITECTURE/TAG"` from `open_clip.list_pretrained()`, for example
                `"ViT-B-32/openai"`.
            kwargs: `dtype` of the weights, and `revision`, `token` and `cache_dir` for the Hub.

        Raises:
            ValueError: If the checkpoint's weights are not those of the tower that its configuration describes.
        """
        dtype = kwargs.pop("dtype", None)
        model_cfg, _, weights = load_open_clip_checkpoint(name, with_weights=True, **kwargs)
        config = OpenClipVisionConfig(
            embed_dim=model_cfg["embed_dim"],
            vision_cfg=model_cfg["vision_cfg"],
            quick_gelu=model_cfg.get("quick_gelu", False),
        )
        model = cls(config)
        visual = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
        try:
            model.visual.load_state_dict(visual)
        except RuntimeError as error:
            raise ValueError(f"The weights of {name} do not fit its configuration: {error}") from error
        return model if dtype in (None, "auto") else model.to(dtype)


def is_open_clip_name(name: str) -> bool:
    """Whether a name means an open_clip checkpoint: see [`OpenClipVisionModel.from_open_clip`]."""
    if name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file():
        return True
    architecture, _, tag = name.partition("/")
    if not tag or Path(name).is_dir():
        return False
    try:
        from open_clip import list_models
    except ImportError:
        return False
    return architecture in list_models()


def load_open_clip_checkpoint(name: str, with_weights: bool = True, **hub_kwargs) -> tuple[dict, dict, dict]:
    """Configuration, preprocessing and weights of an open_clip checkpoint, as open_clip itself names them.

    Returns:
        `(model_cfg, preprocess_cfg, state_dict)`; the state dict is empty without `with_weights`.
    """
    if name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file():
        return _load_published(name, with_weights, hub_kwargs)
    return _load_by_tag(name, with_weights, hub_kwargs)


def _load_published(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    def fetch(filename: str) -> Path:
        if name.startswith("hf-hub:"):
            return Path(hf_hub_download(name.removeprefix("hf-hub:"), filename, **hub_kwargs))
        return Path(name) / filename

    config = json.loads(fetch("open_clip_config.json").read_text(encoding="utf-8"))
    weights = load_file(fetch("open_clip_model.safetensors")) if with_weights else {}
    return config["model_cfg"], config.get("preprocess_cfg", {}), weights


def _load_by_tag(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{name} is an open_clip model: `pip install open_clip_torch`.") from error
    architecture, _, tag = name.partition("/")
    pretrained_cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not pretrained_cfg:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}. It has: {tags}.")
    model_cfg = open_clip.get_model_config(architecture)
    # The tag, not the architecture, says which activation its weights were trained with.
    quick_gelu = bool(pretrained_cfg.get("quick_gelu", model_cfg.get("quick_gelu", False)))
    model_cfg = {**model_cfg, "quick_gelu": quick_gelu}
    weights = {}
    if with_weights:
        model = open_clip.create_model(
            architecture, pretrained=tag, force_quick_gelu=quick_gelu, cache_dir=hub_kwargs.get("cache_dir")
        )
        weights = model.state_dict()
    preprocess_cfg = {
        key: pretrained_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in pretrained_cfg
    }
    return model_cfg, {"size": model_cfg["vision_cfg"].get("image_size", 224), **preprocess_cfg}, weights


__all__ = ["OpenClipVisionModel"]
