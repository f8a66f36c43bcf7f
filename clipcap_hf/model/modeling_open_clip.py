"""Any image tower of open_clip as a transformers model."""

import difflib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel
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
    trained, in; `image_embeds` (batch, embed_dim) out, as from [`~transformers.CLIPVisionModelWithProjection`]. With
    `output_patches=True`, `last_hidden_state` (batch, patches, config.hidden_size) are the patch tokens of the last layer
    without class and register tokens, before any pooling, or the places of a convolutional tower's feature map.
    """

    config: OpenClipVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ResidualAttentionBlock"]

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        self.visual = _build_visual(config)
        if config.hidden_size is None:  # of timm's architectures only they know
            config.hidden_size = self.visual.trunk.num_features
        self.supports_gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # timm keeps some tables (rotary embeddings, attention masks) as buffers outside the checkpoint; built under
        # the meta device they hold rubbish until they are computed again. Without this EVA is silently wrong.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(
        self, pixel_values: torch.Tensor, output_patches: bool = False, return_dict: bool | None = None, **kwargs
    ) -> CLIPVisionModelOutput:
        pixel_values = pixel_values.to(self.dtype)
        tokens = None
        if output_patches:
            image_embeds, tokens = self._embeds_and_patches(pixel_values)
        else:
            image_embeds = self.visual(pixel_values)
            if isinstance(image_embeds, (tuple, list)):  # towers with `output_tokens`: (pooled, tokens)
                image_embeds, tokens = image_embeds
        output = CLIPVisionModelOutput(image_embeds=image_embeds, last_hidden_state=tokens)
        return output.to_tuple() if return_dict is False else output

    def _embeds_and_patches(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(self.visual, "trunk"):
            outputs = self.visual.forward_intermediates(pixel_values, indices=1)
            return outputs["image_features"], outputs["image_intermediates"][-1].flatten(2).transpose(1, 2)
        trunk = self.visual.trunk
        features = trunk.forward_features(pixel_values)
        image_embeds = self.visual.head(trunk.forward_head(features))
        if features.ndim == 3:
            return image_embeds, features[:, getattr(trunk, "num_prefix_tokens", 0) :]
        if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
            return image_embeds, features.flatten(1, 2)
        return image_embeds, features.flatten(2).transpose(1, 2)

    def to_clip_vision_model(self) -> CLIPVisionModelWithProjection:
        """The same tower as a class of transformers, which gives the same `image_embeds` without open_clip.

        Raises:
            ValueError: If it is no plain ViT; the message says what transformers' CLIP does not have.
        """
        if obstacle := clip_vision_obstacle(self.config):
            raise ValueError(f"This open_clip tower cannot become a CLIPVisionModelWithProjection: it has {obstacle}.")
        cfg, state = self.config.vision_cfg, self.visual.state_dict()
        width = self.config.hidden_size
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            projection_dim=self.config.embed_dim,
            num_hidden_layers=cfg.get("layers", 12),
            num_attention_heads=width // cfg.get("head_width", 64),
            image_size=self.config.image_size,
            patch_size=cfg.get("patch_size", 16),
            hidden_act="quick_gelu" if self.config.quick_gelu else "gelu",
            layer_norm_eps=(cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
        )
        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(config)
        state = _clip_vision_state_dict(state)
        # Made by its own rule, as it is in no checkpoint.
        positions = {
            name: torch.arange(buffer.shape[-1]).expand(buffer.shape) for name, buffer in model.named_buffers()
        }
        model.load_state_dict(state, assign=True)
        for name, buffer in positions.items():
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = buffer.contiguous().to(self.device)
        return model.train(self.training)

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
        model = cls(_vision_config(model_cfg))
        visual = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
        try:
            model.visual.load_state_dict(visual)
        except RuntimeError as error:
            raise ValueError(f"The weights of {name} do not fit its configuration: {error}") from error
        return model if dtype in (None, "auto") else model.to(dtype)


def clip_vision_obstacle(config: OpenClipVisionConfig) -> str | None:
    """What keeps a tower from being a [`~transformers.CLIPVisionModelWithProjection`], or `None` for plain ViTs."""
    cfg = config.vision_cfg
    if "timm_model_name" in cfg:
        return f"an architecture of timm, {cfg['timm_model_name']}"
    if isinstance(cfg.get("layers", 12), (list, tuple)):
        return "the layers of a ResNet"
    if cfg.get("pool_type", "tok") != "tok":
        return f"`pool_type` {cfg['pool_type']!r}"
    if not isinstance(cfg.get("image_size", 224), int) or not isinstance(cfg.get("patch_size", 16), int):
        return "images or patches that are not square"
    if set(cfg.get("norm_kwargs") or {}) - {"eps"}:
        return f"`norm_kwargs` {cfg['norm_kwargs']}"
    plain = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pool_type", "norm_kwargs"}
    # With one token to pool it is all the same whether the norm comes before; tables of positions are weights.
    harmless = {"final_ln_after_pool", "pos_embed_type", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
    others = [
        key for key, value in cfg.items() if value and key not in plain | harmless and not key.startswith("timm_")
    ]
    return f"`{others[0]}` {cfg[others[0]]!r}" if others else None


def _clip_vision_state_dict(visual: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of open_clip's plain ViT under the names of transformers' CLIP."""
    renamed = {
        "vision_model.embeddings.class_embedding": visual["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": visual["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": visual["positional_embedding"],
        "visual_projection.weight": visual["proj"].T,
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for key, value in visual.items():
        path, _, kind = key.rpartition(".")
        if path in ("ln_pre", "ln_post"):
            # "pre_layrnorm" is spelled so in transformers.
            renamed[f"vision_model.{'pre_layrnorm' if path == 'ln_pre' else 'post_layernorm'}.{kind}"] = value
        elif path.startswith("transformer.resblocks."):
            layer, _, part = path.removeprefix("transformer.resblocks.").partition(".")
            prefix = f"vision_model.encoder.layers.{layer}"
            if part == "attn":  # in_proj_weight and in_proj_bias: query, key and value above one another
                for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3)):
                    renamed[f"{prefix}.self_attn.{name}.{kind.removeprefix('in_proj_')}"] = third
            else:
                renamed[f"{prefix}.{parts[part]}.{kind}"] = value
    # Copies: views of one tensor cannot be saved as safetensors.
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in renamed.items()}


def list_open_clip_names() -> list[str]:
    """All `"ARCHITECTURE/TAG"` names of pretrained open_clip models; none where open_clip is not installed."""
    try:
        from open_clip import list_pretrained
    except ImportError:
        return []
    return [f"{architecture}/{tag}" for architecture, tag in list_pretrained()]


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


def load_open_clip_config(name: str, **hub_kwargs) -> OpenClipVisionConfig:
    """Configuration of the image tower of an open_clip checkpoint; of a published one, no weights are fetched."""
    return _vision_config(load_open_clip_checkpoint(name, with_weights=False, **hub_kwargs)[0])


def _vision_config(model_cfg: dict) -> OpenClipVisionConfig:
    return OpenClipVisionConfig(
        embed_dim=model_cfg["embed_dim"],
        vision_cfg=model_cfg["vision_cfg"],
        quick_gelu=model_cfg.get("quick_gelu", False),
    )


def load_open_clip_checkpoint(name: str, with_weights: bool = True, **hub_kwargs) -> tuple[dict, dict, dict]:
    """Configuration, preprocessing and weights of an open_clip checkpoint, as open_clip itself names them.

    Returns:
        `(model_cfg, preprocess_cfg, state_dict)`; the state dict is empty without `with_weights`.
    """
    published = name.startswith("hf-hub:") or (Path(name) / "open_clip_config.json").is_file()
    load = _load_published if published else _load_by_tag
    model_cfg, preprocess_cfg, weights = load(name, with_weights, hub_kwargs)
    # As in open_clip, the size is always the tower's.
    return model_cfg, {**preprocess_cfg, "size": model_cfg["vision_cfg"].get("image_size", 224)}, weights


def _load_published(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*filenames: str) -> Path | None:
        """The first of these files that there is."""
        if not name.startswith("hf-hub:"):
            return next((path for file in filenames if (path := Path(name) / file).is_file()), None)
        unreachable = None
        for filename in filenames:
            try:
                return Path(hf_hub_download(name.removeprefix("hf-hub:"), filename, **hub_kwargs))
            except LocalEntryNotFoundError as error:  # an EntryNotFoundError, too, but nobody was asked
                unreachable = error
            except EntryNotFoundError:
                pass
        if unreachable is not None:
            raise OSError(
                f"{name} could not be reached, and its {' or '.join(filenames)} is not in the cache: check the connection "
                "and `HF_HUB_OFFLINE`, or pass a folder."
            ) from unreachable
        return None

    path = fetch("open_clip_config.json")
    if path is None:
        raise ValueError(f"{name} is not an open_clip repository: it has no open_clip_config.json.")
    config = json.loads(path.read_text(encoding="utf-8"))
    weights = _read_weights(name, fetch) if with_weights else {}
    return config["model_cfg"], config.get("preprocess_cfg", {}), weights


def _read_weights(name: str, fetch) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = fetch("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if path is None:
        raise ValueError(f"{name} has neither open_clip_model.safetensors nor open_clip_pytorch_model.bin.")
    if path.suffix == ".safetensors":
        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _load_by_tag(name: str, with_weights: bool, hub_kwargs: dict) -> tuple[dict, dict, dict]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{name} is an open_clip model: `pip install open_clip_torch`.") from error
    architecture, _, tag = name.partition("/")
    pretrained_cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not pretrained_cfg:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f" Did you mean '{architecture}/{near[0]}'?" if near else ""
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}. It has: {', '.join(tags)}.{hint}")
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
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color", "mode")
    preprocess_cfg = {key: pretrained_cfg[key] for key in names if pretrained_cfg.get(key) is not None}
    return model_cfg, preprocess_cfg, weights


__all__ = ["OpenClipVisionModel"]
