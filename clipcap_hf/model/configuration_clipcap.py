"""Configuration of ClipCap captioners and of open_clip image towers."""

from .versions_clipcap import CACHE  # noqa: I001  (first: it refuses releases that the rest would fail with)

import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_detector import DetectorVisionConfig


IMAGE_TOKEN = "<image>"

_IS_REMOTE_CODE = __name__.startswith("transformers_modules.")

# Classes of transformers that project the pooled output to the embedding that CLIP compares with texts.
PROJECTED_TOWERS = ("clip_vision_model", "metaclip_2_vision_model")


_NO_EMBEDDINGS = "takes no embeddings (`inputs_embeds`), and the prefix is made of them"
_NO_CACHE = "has no cache of keys and values, which decoding needs"
_RECURRENT = "carries a recurrent state instead of keys and values, which beam search and padding need"
# Language models that captioners cannot use, and why.
UNSUITED_LANGUAGE_MODELS = {
    "cpmant": _NO_EMBEDDINGS,
    "openai-gpt": _NO_CACHE,
    "reformer": _NO_CACHE,
    "xlm": _NO_CACHE,
    "xlnet": _NO_CACHE,
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"), _RECURRENT),
}

# Language models whose positions begin after the id of the padding token, and which so have fewer than their table.
_COUNT_FROM_PADDING = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xmod"}
_COUNT_FROM_PADDING |= {"xlm-roberta", "xlm-roberta-xl"}

# Sizes beyond those of any model. A larger one is a mistake or a damaged file, and memory would be taken for it.
_LARGEST = {
    "clip_embed_dim": 2**18,
    "clip_length": 2**14,
    "embed_dim": 2**18,
    "hidden_size": 2**18,
    "image_size": 2**13,
    "intermediate_size": 2**22,
    "layers": 2**12,
    "mapping_num_heads": 2**12,
    "mapping_num_layers": 2**12,
    "max_position_embeddings": 2**25,
    "num_attention_heads": 2**14,
    "num_hidden_layers": 2**12,
    "patch_size": 2**13,
    "prefix_length": 2**14,
    "projection_dim": 2**18,
    "vocab_size": 2**24,
    "width": 2**18,
    **dict.fromkeys(("n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 2**22),
}
_LARGEST_OTHER = 2**28  # of any other whole number but ids and the bases of rotary positions


def check_sizes(owner: str, sizes: dict[str, Any]):
    """Refuse sizes that no model has, before memory is taken for them.

    Args:
        owner (`str`): Whose sizes they are, for the message.
        sizes (`dict`): Sizes by name; a size may be a list, such as height and width.

    Raises:
        ValueError: If a size is not a whole number from 0 to what models have.
    """
    for name, largest in _LARGEST.items():
        value = sizes.get(name)
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if size is None or name == "max_position_embeddings" and size == -1:  # XLNet: no limit
                continue
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= largest:
                raise ValueError(
                    f"`{name}` of the {owner} must be a whole number up to {largest:,}, got {str(value)[:80]}."
                )
    for name, value in sizes.items():
        if isinstance(value, int) and abs(value) > _LARGEST_OTHER and not name.endswith(("_id", "theta")):
            raise ValueError(f"`{name}` of the {owner} is larger than in any model: {str(value)[:80]}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` of the {owner} must be a number, but is {value}.")


def check_config_sizes(owner: str, config: PreTrainedConfig):
    """Refuse a configuration with sizes that no model has, see [`check_sizes`]."""
    config = config.get_text_config() if owner == "language model" else config
    check_sizes(owner, {**vars(config), **{name: getattr(config, name, None) for name in _LARGEST}})


def clip_embed_dim_of(vision_config: PreTrainedConfig, vision_feature: str = "pooled") -> int:
    """Tell the width of what the tower gives to the mapping network: an embedding, or patch tokens."""
    if vision_config.model_type == "xclip_vision_model":
        return vision_config.mit_hidden_size
    # CLIP's towers are used with their projection (paper, section 3), others by their pooled output.
    if vision_feature == "pooled" and vision_config.model_type in PROJECTED_TOWERS:
        return vision_config.projection_dim
    if vision_feature == "pooled" and vision_config.model_type == "open_clip_vision_model":
        return vision_config.embed_dim
    if (hidden_size := getattr(vision_config, "hidden_size", None)) is None:
        raise ValueError(
            f"Cannot tell the embedding width of a `{vision_config.model_type}` tower: its configuration has no "
            "`hidden_size`. Pass `clip_embed_dim=` to ClipCapConfig."
        )
    return hidden_size


def check_language_model(text_config: PreTrainedConfig):
    """Check before loading any weights that language models of this kind can write captions.

    Captioning needs a prefix of embeddings, and keys and values that beams can reorder.

    Raises:
        ValueError: If this kind of language model lacks one of these.
    """
    model_type = text_config.get_text_config().model_type
    if (lacks := UNSUITED_LANGUAGE_MODELS.get(model_type)) is not None:
        raise ValueError(
            f"A `{model_type}` cannot be a captioner's language model: it {lacks}. Choose another, such as GPT-2, "
            "Llama, Qwen or OPT."
        )


def context_length(text_config: PreTrainedConfig) -> int | None:
    """Find how many tokens the language model of this configuration can read; `None` if it has no limit."""
    text_config = text_config.get_text_config()
    # MPT has a name of its own. XLNet says -1 for no limit.
    for name in ("max_position_embeddings", "max_seq_len"):
        if (length := getattr(text_config, name, None)) is not None:
            if text_config.model_type in _COUNT_FROM_PADDING:
                length -= text_config.pad_token_id + 1
            return length if length > 0 else None
    return None


@strict
class OpenClipVisionConfig(PreTrainedConfig):
    r"""
    Configure an image tower of open_clip, see [`OpenClipVisionModel`].

    Args:
        embed_dim (`int`): Width of the image embedding, as in open_clip's `model_cfg["embed_dim"]`.
        vision_cfg (`dict`): open_clip's `model_cfg["vision_cfg"]`, unchanged.
        quick_gelu (`bool`): Whether the tower uses QuickGELU. OpenAI's weights need it, though the model config of
            the same name may not say so; the wrong activation gives embeddings that are only slightly wrong.
        hidden_size (`int`, *optional*): Width of the patch tokens. Taken from `vision_cfg`; for a tower of timm, the
            model takes it from the tower.

    Example:

    ```python
    >>> from clipcap_hf import OpenClipVisionConfig, OpenClipVisionModel

    >>> config = OpenClipVisionConfig(
    ...     embed_dim=32, vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
    ... )
    >>> OpenClipVisionModel(config).config.image_size
    32

    ```
    """

    model_type = "open_clip_vision_model"
    base_config_key = "vision_config"

    embed_dim: int = 512
    vision_cfg: dict[str, Any] = field(default_factory=dict)
    quick_gelu: bool = False
    hidden_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # open_clip's own defaults are those of ViT-B/16 at 224 pixels.
        self.vision_cfg = dict(self.vision_cfg)
        check_sizes("open_clip tower", {"embed_dim": self.embed_dim, **self.vision_cfg})
        # Weights come from the checkpoint; timm must not download its own first.
        if "timm_model_name" in self.vision_cfg:
            self.vision_cfg["timm_model_pretrained"] = False
        elif self.hidden_size is None:
            width = self.vision_cfg.get("width", 768)
            is_resnet = isinstance(self.vision_cfg.get("layers"), (list, tuple))
            self.hidden_size = 32 * width if is_resnet else width
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square images that the tower takes (the height if they are not square)."""
        size = self.vision_cfg.get("image_size", 224)
        return size[0] if isinstance(size, (list, tuple)) else size


@strict
class ClipCapConfig(PreTrainedConfig):
    r"""
    Configure a [`ClipCapForConditionalGeneration`]: a vision tower, a mapping network and a language model.

    The model is described in Mokady et al. 2021, "ClipCap: CLIP Prefix for Image Captioning", arXiv 2111.09734.

    Args:
        vision_config (`dict` or [`PreTrainedConfig`], *optional*): The vision tower. With `None` the captioner takes
            CLIP embeddings only (`clip_embeds`).
        text_config (`dict` or [`PreTrainedConfig`], *optional*): The language model; GPT-2 small by default.
        mapping_type (`str`): `"mlp"` (section 3.2: two layers with tanh), `"transformer"` (section 3.3) or `"linear"`
            (one linear layer, which only the official code has).
        prefix_length (`int`): Number of vectors in the prefix.
        vision_feature (`str`): What the mapping network reads. `"pooled"`: the image's embedding, as in the paper.
            `"patches"`: the tower's patch tokens, averaged to `clip_length` tokens, for the transformer mapping only.
        clip_length (`int`, *optional*): Number of tokens that the transformer mapping makes from one embedding, or
            from all patches, see [`~clipcap_hf.model.modeling_mapping.pool_patches`]; `prefix_length` by default. The
            other mappings do not use it.
        clip_embed_dim (`int`, *optional*): Width of the CLIP embedding, or of each patch token. Taken from
            `vision_config`; without one it is 512, as in ViT-B/32.
        normalize_clip_embeds (`bool`): Divide each embedding by its L2 norm first (`--normalize_prefix` of the
            official code, which its transformer notebook does and its README command does not).
        mapping_num_layers (`int`): Layers of the transformer mapping.
        mapping_num_heads (`int`): Attention heads of the transformer mapping.
        mapping_mlp_ratio (`float`): Width of the transformer mapping's feed-forward layers, as a multiple of the
            language model's width.
        mapping_layer_norm_eps (`float`): Epsilon of the transformer mapping's layer norms.
        image_token_id (`int`, *optional*): Id of the `<image>` placeholder. By default the first id beyond the
            language model's vocabulary, so that it can never be generated and the vocabulary is not resized.
        freeze_vision (`bool`): Do not train the vision tower (the paper's setting).
        freeze_language_model (`bool`): Do not train the language model (the paper's light variant).
        lora (`dict`, *optional*): Train LoRA adapters on the language model and freeze its own weights. The dictionary
            holds arguments of `peft.LoraConfig`, for example `{"r": 8, "lora_alpha": 16}`. Needs `pip install peft`.
        save_frozen (`bool`): Whether checkpoints hold the frozen parts too. With `False` they hold only the trained
            weights and say where the frozen parts come from, so that `from_pretrained` can load those, too.
        donors (`dict`, *optional*): Where `"vision_tower"` and `"language_model"` were loaded from, set by
            [`ClipCapForConditionalGeneration.from_vision_text_pretrained`]. A part without an entry is always saved.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, GPT2Config
    >>> from clipcap_hf import ClipCapConfig

    >>> config = ClipCapConfig(
    ...     vision_config=CLIPVisionConfig(), text_config=GPT2Config(), mapping_type="transformer"
    ... )
    >>> config.clip_embed_dim, config.clip_length, config.image_token_id
    (512, 10, 50257)

    ```
    """

    model_type = "clipcap"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }
    keys_to_ignore_at_inference = [CACHE, "image_hidden_states", "image_outputs"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    mapping_type: Literal["mlp", "transformer", "linear"] = "mlp"
    vision_feature: Literal["pooled", "patches"] = "pooled"
    prefix_length: int = 10
    clip_length: int | None = None
    clip_embed_dim: int | None = None
    normalize_clip_embeds: bool = False
    mapping_num_layers: int = 8
    mapping_num_heads: int = 8
    mapping_mlp_ratio: float = 2.0
    mapping_layer_norm_eps: float = 1e-5
    image_token_id: int | None = None
    freeze_vision: bool = True
    freeze_language_model: bool = False
    lora: dict[str, Any] | None = None
    save_frozen: bool = True
    donors: dict[str, dict[str, Any]] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not _IS_REMOTE_CODE:
            # The package needs no code from the repository, and saves none.
            for name in ("auto_map", "custom_pipelines"):
                kwargs.pop(name, None)
        super().__post_init__(**kwargs)
        self._check_sizes()
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"The language model must be a causal one, but `{self.text_config.model_type}` is an encoder-decoder."
            )
        # The language model's head is tied by the language model's own rules; this class ties nothing.
        if self.vision_feature == "patches" and self.mapping_type != "transformer":
            raise ValueError(
                f'`vision_feature="patches"` needs `mapping_type="transformer"`: a {self.mapping_type!r} mapping '
                "reads one embedding, not several tokens."
            )
        if self.vision_feature == "patches" and getattr(self.vision_config, "model_type", "") == "xclip_vision_model":
            raise ValueError('X-CLIP\'s video encoder gives no patch tokens: use `vision_feature="pooled"`.')
        self._set_clip_embed_dim()
        if self.mapping_type == "transformer" and self.clip_length is None:
            self.clip_length = self.prefix_length
        for name in ("prefix_length", "clip_length", "clip_embed_dim", "mapping_num_layers", "mapping_num_heads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._check_language_model()
        if self.image_token_id is None:
            self.image_token_id = self.language_config.vocab_size

    @property
    def language_config(self) -> PreTrainedConfig:
        """The language model's own configuration; a multimodal one keeps that of its text inside."""
        return self.get_text_config().get_text_config()

    def _check_sizes(self):
        parts = {"captioner": self, "vision tower": self.vision_config, "language model": self.text_config}
        for owner, config in parts.items():
            if config is not None:
                check_config_sizes(owner, config)
        for name, largest in (("mapping_mlp_ratio", 1000.0), ("mapping_layer_norm_eps", 1.0)):
            if not (math.isfinite(value := getattr(self, name)) and 0 < value <= largest):
                raise ValueError(f"`{name}` must be above 0 and at most {largest:g}, got {value}.")
        if self.image_token_id is not None and not 0 <= self.image_token_id <= _LARGEST["vocab_size"]:
            raise ValueError(f"`image_token_id` must be a token id, got {self.image_token_id}.")

    def _set_clip_embed_dim(self):
        from_tower = None
        if self.vision_config is not None:
            try:
                from_tower = clip_embed_dim_of(self.vision_config, self.vision_feature)
            except ValueError:
                if self.clip_embed_dim is None:
                    raise
        if self.clip_embed_dim is None:
            self.clip_embed_dim = 512 if from_tower is None else from_tower
        elif from_tower not in (None, self.clip_embed_dim):
            raise ValueError(
                f"`clip_embed_dim` is {self.clip_embed_dim}, but the vision tower gives embeddings of width "
                f"{from_tower}. Leave `clip_embed_dim` out, or choose the tower that the mapping network was made for "
                "(ViT-B/32 gives 512, RN50x4 640)."
            )

    def _check_language_model(self):
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        text_config = self.language_config
        if not hasattr(text_config, "vocab_size"):
            raise ValueError(f"A `{text_config.model_type}` is not a causal language model: it has no vocabulary.")
        check_language_model(text_config)
        # Encoders such as BERT see the words that they must predict, unless they are set up as decoders.
        is_encoder = text_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if is_encoder and getattr(text_config, "is_decoder", True) is False:
            raise ValueError(
                f"A `{text_config.model_type}` is an encoder, which sees the words that it must predict: choose a "
                "causal language model, or load it with `is_decoder=True` and pass the model itself."
            )
        context = context_length(text_config)
        if context is not None and context <= self.prefix_length:
            raise ValueError(
                f"`prefix_length` is {self.prefix_length}, but the language model's context is {context} and must "
                "also hold the caption: choose a shorter prefix."
            )
        embedding_width = getattr(text_config, "word_embed_proj_dim", None)
        if embedding_width not in (None, text_config.hidden_size):
            raise ValueError(
                f"The embeddings of this `{text_config.model_type}` (`word_embed_proj_dim` {embedding_width}) are not "
                f"as wide as its layers (`hidden_size` {text_config.hidden_size}), which the mapping networks need: "
                "choose another one."
            )
        if self.mapping_type == "transformer" and text_config.hidden_size % self.mapping_num_heads:
            raise ValueError(
                f"The language model's hidden size {text_config.hidden_size} is not divisible by "
                f"`mapping_num_heads` = {self.mapping_num_heads}: choose a number of heads that divides it."
            )


if _IS_REMOTE_CODE:
    # `auto_map` of a repository names the captioner's classes only, not its tower's.
    for _tower_config in (OpenClipVisionConfig, DetectorVisionConfig):
        if _tower_config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(_tower_config.model_type, _tower_config)


__all__ = ["ClipCapConfig", "OpenClipVisionConfig"]
