"""Any open_clip image tower as a transformers model."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput
from transformers.utils import can_return_tuple

from .checkpoints_open_clip import is_open_clip_name, load_open_clip_checkpoint  # noqa: F401  (also imported from here)
from .configuration_clipcap import OpenClipVisionConfig


# Far above every published tower; a damaged configuration could use up all memory.
_LARGEST = {"width": 65_536, "layers": 1024, "image_size": 8192, "patch_size": 1024, "mlp_ratio": 64}


def _check_sizes(vision_cfg: dict):
    for name, largest in _LARGEST.items():
        values = vision_cfg.get(name, 1)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and not (isinstance(value, (int, float)) and 0 < value <= largest):
                raise ValueError(f"open_clip's `vision_cfg` has `{name}` {values!r}: it must be from 1 to {largest}.")


def _build_visual(config: OpenClipVisionConfig) -> Any:  # towers of open_clip and timm have no common interface
    # Not with open_clip's `create_model`: it downloads, and fails on the meta device that `from_pretrained` uses. The
    # public `CLIP` needs a text tower, so it gets the smallest possible.
    try:
        from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise ImportError("This model needs open_clip for its image tower: `pip install open_clip_torch`.") from error
    unknown = sorted(set(config.vision_cfg) - set(CLIPVisionCfg.__dataclass_fields__))
    if unknown:
        raise ValueError(f"open_clip's `vision_cfg` has unknown fields: {', '.join(unknown)}.")
    _check_sizes(config.vision_cfg)
    text_cfg = CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    vision_cfg = CLIPVisionCfg(**config.vision_cfg)
    return CLIP(config.embed_dim, vision_cfg, text_cfg, quick_gelu=config.quick_gelu).visual


class OpenClipVisionModel(PreTrainedModel):
    r"""
    Embed images with the image tower of an open_clip model.

    Takes `pixel_values` (batch, 3, height, width), normalised as in the tower's training, and returns `image_embeds`
    (batch, embed_dim), like [`~transformers.CLIPVisionModelWithProjection`]. With `output_patches=True`, it also
    returns `last_hidden_state` (batch, patches, config.hidden_size): the last layer's patch tokens before pooling,
    without class and register tokens, or the positions of a convolutional tower's feature map.
    """

    config: OpenClipVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["ResidualAttentionBlock"]

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        self.visual = _build_visual(config)
        if config.hidden_size is None:  # only timm knows the width of its architectures
            config.hidden_size = self.visual.trunk.num_features
        self.supports_gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # timm keeps some tables (rotary embeddings, attention masks) as buffers outside the checkpoint; built on the
        # meta device they hold garbage until computed again. Without this, EVA gives wrong embeddings silently.
        if compute_buffers := getattr(module, "init_non_persistent_buffers", None):
            compute_buffers()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_patches: bool = False, **kwargs) -> CLIPVisionModelOutput:
        self._check_size(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        tokens = None
        if output_patches:
            image_embeds, tokens = self._embeds_and_patches(pixel_values)
        else:
            image_embeds = self.visual(pixel_values)
            if isinstance(image_embeds, (tuple, list)):  # towers with `output_tokens`: (pooled, tokens)
                image_embeds, tokens = image_embeds
        return CLIPVisionModelOutput(image_embeds=image_embeds, last_hidden_state=tokens)

    def _check_size(self, pixel_values: torch.Tensor):
        # Convolutional towers accept any image size, but silently give worse embeddings.
        size = self.config.vision_cfg.get("image_size", 224)
        expected = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"This tower takes images of {expected[0]} x {expected[1]} pixels, got {pixel_values.shape[-2]} x "
                f"{pixel_values.shape[-1]}: use the tower's own image processor."
            )

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
        """Convert the tower to transformers' CLIP, which gives the same `image_embeds` without open_clip.

        Raises:
            ValueError: If the tower is not a plain ViT; the message names what transformers' CLIP lacks.
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
        # Computed here, since no checkpoint holds it.
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
            name (`str`): One of:

                - `"ARCHITECTURE/TAG"` from `open_clip.list_pretrained()`, for example `"ViT-B-32/openai"`;
                - `"hf-hub:ORG/REPO"` or a folder, with `open_clip_config.json` and `open_clip_model.safetensors`;
                - `"ARCHITECTURE/FILE"`, with a weight file or a training checkpoint of open_clip;
                - a training checkpoint of open_clip in the folder of its run (which has a `params.txt`).
            kwargs: `dtype` of the weights, and `revision`, `token` and `cache_dir` for the Hub.

        Raises:
            ValueError: If the checkpoint's weights do not fit its configuration.
        """
        dtype = kwargs.pop("dtype", None)
        model_cfg, _, weights = load_open_clip_checkpoint(name, with_weights=True, **kwargs)
        config = _vision_config(model_cfg)
        try:
            model = cls(config)
        except ValueError as error:
            raise ValueError(f"The configuration of {name} is damaged or unknown: {error}") from error
        visual = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
        try:
            model.visual.load_state_dict(visual)
        except RuntimeError as error:
            raise ValueError(f"The weights of {name} do not fit its configuration: {error}") from error
        return model if dtype in (None, "auto") else model.to(dtype)


def clip_vision_obstacle(config: OpenClipVisionConfig) -> str | None:
    """Say why a tower cannot be a [`~transformers.CLIPVisionModelWithProjection`]; `None` for plain ViTs."""
    cfg = config.vision_cfg
    if "timm_model_name" in cfg:
        return f"a timm architecture, {cfg['timm_model_name']}"
    if isinstance(cfg.get("layers", 12), (list, tuple)):
        return "the layers of a ResNet"
    if cfg.get("pool_type", "tok") != "tok":
        return f"`pool_type` {cfg['pool_type']!r}"
    if not isinstance(cfg.get("image_size", 224), int) or not isinstance(cfg.get("patch_size", 16), int):
        return "images or patches that are not square"
    if set(cfg.get("norm_kwargs") or {}) - {"eps"}:
        return f"`norm_kwargs` {cfg['norm_kwargs']}"
    plain = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pool_type", "norm_kwargs"}
    # The order of norm and pooling does not matter for a single token; position tables are weights.
    harmless = {"final_ln_after_pool", "pos_embed_type", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
    others = [
        key for key, value in cfg.items() if value and key not in plain | harmless and not key.startswith("timm_")
    ]
    return f"`{others[0]}` {cfg[others[0]]!r}" if others else None


def _clip_vision_state_dict(visual: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of open_clip's plain ViT as transformers' CLIP names them."""
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
            # transformers does spell it "pre_layrnorm".
            renamed[f"vision_model.{'pre_layrnorm' if path == 'ln_pre' else 'post_layernorm'}.{kind}"] = value
        elif path.startswith("transformer.resblocks."):
            layer, _, part = path.removeprefix("transformer.resblocks.").partition(".")
            prefix = f"vision_model.encoder.layers.{layer}"
            if part == "attn":  # in_proj_weight and in_proj_bias: query, key and value stacked
                for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3)):
                    renamed[f"{prefix}.self_attn.{name}.{kind.removeprefix('in_proj_')}"] = third
            else:
                renamed[f"{prefix}.{parts[part]}.{kind}"] = value
    # Copies: views of one tensor cannot be saved as safetensors.
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in renamed.items()}


def load_open_clip_config(name: str, **hub_kwargs) -> OpenClipVisionConfig:
    """Load the configuration of an open_clip checkpoint's image tower, without its weights."""
    return _vision_config(load_open_clip_checkpoint(name, with_weights=False, **hub_kwargs)[0])


def _vision_config(model_cfg: dict) -> OpenClipVisionConfig:
    _check_sizes(model_cfg["vision_cfg"])
    return OpenClipVisionConfig(
        embed_dim=model_cfg["embed_dim"],
        vision_cfg=model_cfg["vision_cfg"],
        quick_gelu=model_cfg.get("quick_gelu", False),
    )


__all__ = ["OpenClipVisionModel"]
