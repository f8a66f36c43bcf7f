"""The ClipCap network (Mokady et al. 2021), in the order of the data.

1. features: the vision tower embeds each image (`get_clip_embeds`), unless embeddings are given;
2. mapping: the mapping network turns an embedding into a prefix of `prefix_length` vectors (`get_image_features`);
3. scatter: the prefix takes the place of the placeholders among the embedded tokens (`forward`);
4. language model: it reads prefix and tokens and predicts each next token;
5. loss: cross entropy of the caption's tokens; placeholders have none.

Loading and saving are in `pretrained_clipcap.py`, `generate()` in `generation_clipcap.py`, freezing in
`freezing_clipcap.py`.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_clipcap import ClipCapConfig
from .freezing_clipcap import FreezesParts
from .generation_clipcap import GeneratesCaptions
from .interpretation_clipcap import InterpretsPrefix
from .lora_clipcap import MergesLora, add_lora
from .model_card_clipcap import PushesModelCard
from .modeling_mapping import MAPPING_NETWORKS, ClipCapTransformerMappingNetwork, pool_patches
from .modeling_text import fuse_gelu
from .modeling_vision import build_vision_tower, embed_pixels
from .pretrained_clipcap import LoadsAndSaves
from .versions_clipcap import CACHE, one_cache


@dataclass
class ClipCapCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`ClipCapForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*): Next-token cross entropy over the positions with a label.
        logits (`torch.Tensor` of shape `(batch, sequence, vocabulary)`): Scores before softmax.
        cache ([`~transformers.Cache`], *optional*): The language model's keys and values; before transformers 5.24 it
            is `past_key_values`.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Of the language model, `(batch, sequence, hidden)` each.
        attentions (`tuple(torch.Tensor)`, *optional*): Of the language model.
        image_hidden_states (`torch.Tensor` of shape `(batch, prefix_length, hidden)`, *optional*): The prefix.
        image_outputs ([`~transformers.modeling_outputs.BaseModelOutputWithPooling`], *optional*): All that
            `get_image_features` returns.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class ClipCapPreTrainedModel(PreTrainedModel):
    config: ClipCapConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ClipCapMappingLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Only the mapping network is ours to initialise; as in the official code it starts from torch's defaults.
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, ClipCapTransformerMappingNetwork):
            init.normal_(module.prefix_const)
        else:
            super()._init_weights(module)


class ClipCapForConditionalGeneration(
    PushesModelCard,
    LoadsAndSaves,
    GeneratesCaptions,
    FreezesParts,
    InterpretsPrefix,
    MergesLora,
    ClipCapPreTrainedModel,
    GenerationMixin,
):
    r"""
    Caption images by a CLIP prefix (Mokady et al. 2021).

    A vision tower embeds the image, the mapping network turns the embedding into a prefix of `prefix_length` vectors,
    and a language model writes the caption.

    In `input_ids`, `prefix_length` placeholders `config.image_token_id` stand for the prefix. [`ClipCapProcessor`]
    writes them, so that `generate()` works as for a text model.

    Args:
        config ([`ClipCapConfig`]): The configuration.
        vision_tower ([`~transformers.PreTrainedModel`], *optional*): A ready tower in place of a newly built one.
        language_model ([`~transformers.PreTrainedModel`], *optional*): A ready language model likewise.

    Example:

    ```python
    >>> import torch
    >>> from transformers import GPT2Config
    >>> from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration

    >>> text_config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=99, eos_token_id=99)
    >>> model = ClipCapForConditionalGeneration(ClipCapConfig(text_config=text_config, clip_embed_dim=16))
    >>> captions = model.generate(clip_embeds=torch.randn(2, 16), max_new_tokens=5, pad_token_id=99)
    >>> captions.shape[0]
    2

    ```
    """

    def __init__(
        self,
        config: ClipCapConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if vision_tower is None and config.vision_config is not None:
            vision_tower = build_vision_tower(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_tower = vision_tower
        self.mapping_network = MAPPING_NETWORKS[config.mapping_type](config)
        self.language_model = language_model
        fuse_gelu(language_model)
        if config.lora is not None:
            add_lora(language_model, config.lora)
        self._donor_hashes: dict[str, str] = {}  # of the parts that are known to equal their donors
        # The parts hold the very configurations that are saved with the whole.
        config.text_config = language_model.config
        if vision_tower is not None:
            config.vision_config = vision_tower.config
        self._freeze()
        self.post_init()
        # FSDP and device maps look these classes up in this very model: MLP mappings have no layers, for example.
        here = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in here}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, clip_embeds: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Compute the prefix of each image.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*): Preprocessed images; or
                videos, `(batch, frames, 3, height, width)`.
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Embeddings from the same
                tower, as [`get_clip_embeds`](#get_clip_embeds) returns them, in place of pixels; with
                `vision_feature="patches"` patch tokens of shape `(batch, patches, clip_embed_dim)`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is the prefix, of shape
            `(batch, prefix_length, hidden)`; the rest comes from the vision tower (for videos, from each frame unless
            the tower takes whole videos).
        """
        if (pixel_values is None) == (clip_embeds is None):
            raise ValueError("Pass exactly one of `pixel_values` and `clip_embeds`.")
        vision_outputs = {}
        if clip_embeds is None:
            clip_embeds, vision_outputs = self._embed_pixels(pixel_values, **kwargs)
        else:
            self._check_clip_embeds(clip_embeds)
        return BaseModelOutputWithPooling(
            pooler_output=self._map(clip_embeds),
            last_hidden_state=vision_outputs.get("last_hidden_state"),
            hidden_states=vision_outputs.get("hidden_states"),
            attentions=vision_outputs.get("attentions"),
        )

    def get_clip_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed preprocessed images (batch, 3, height, width) or videos (batch, frames, 3, height, width).

        Returns:
            `torch.Tensor` of shape `(batch, clip_embed_dim)`, not normalised; with `vision_feature="patches"` patch
            tokens, pooled to `(batch, clip_length, clip_embed_dim)`.
        """
        return self._embed_pixels(pixel_values)[0]

    def _embed_pixels(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        if self.vision_tower is None:
            raise ValueError(
                "This captioner has no vision tower (`vision_config` is None): pass `clip_embeds` instead of "
                "`pixel_values`."
            )
        clip_embeds, outputs = embed_pixels(self.vision_tower, pixel_values, self.config.vision_feature, **kwargs)
        if self.config.vision_feature == "patches":
            clip_embeds = pool_patches(clip_embeds, self.config.clip_length)
        return clip_embeds, outputs

    def _check_clip_embeds(self, clip_embeds: torch.Tensor):
        patches = self.config.vision_feature == "patches"
        if clip_embeds.ndim != 2 + patches or clip_embeds.shape[-1] != self.config.clip_embed_dim:
            shape = f"(batch, {'patches, ' * patches}{self.config.clip_embed_dim})"
            raise ValueError(
                f"`clip_embeds` must have the shape {shape} that this model's mapping network takes (`vision_feature` "
                f"is {self.config.vision_feature!r}), got {tuple(clip_embeds.shape)}. Do they come from another CLIP?"
            )

    def _map(self, clip_embeds: torch.Tensor) -> torch.Tensor:
        # Quantised weights are integers, to which the embeddings must not be cast.
        parameters = list(self.mapping_network.parameters())
        weight = next((weight for weight in parameters if weight.is_floating_point()), clip_embeds)
        clip_embeds = clip_embeds.to(weight.device, weight.dtype)
        if self.config.vision_feature == "patches":
            clip_embeds = pool_patches(clip_embeds, self.config.clip_length)
        if self.config.normalize_clip_embeds:
            clip_embeds = F.normalize(clip_embeds, dim=-1)
        return self.mapping_network(clip_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        clip_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prefix_index: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ClipCapCausalLMOutputWithPast:
        r"""
        Predict each next token, and compute the loss if there are labels.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): Tokens, with `prefix_length` placeholders
                `config.image_token_id` for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`, *optional*): Preprocessed images;
                or videos, `(videos, frames, 3, height, width)`.
            clip_embeds (`torch.FloatTensor` of shape `(images, clip_embed_dim)`, *optional*): Embeddings of the
                images, in place of their pixels; or patch tokens, `(images, patches, clip_embed_dim)`.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 where there is padding. Or of
                shape `(batch, 1, sequence, sequence)` and type `bool`: True where a position (third) may see another.
            cache ([`~transformers.Cache`], *optional*): The language model's keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden)`, *optional*): Embedded tokens,
                instead of `input_ids`. Images then need a placeholder that has an embedding (`image_token_id` in the
                vocabulary).
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Like `input_ids`, with -100 where no
                loss is wanted. Placeholders count as -100. Mark padding by `attention_mask`, not by the padding token,
                which may be the end token.
            logits_to_keep (`int` or `torch.Tensor`): Compute logits only for this many last positions, or for these
                positions.
            mm_encoder_outputs (`dict`, *optional*): `{"image": output of get_image_features}`, instead of pixels and
                embeddings.
            prefix_index (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which vector of the images'
                prefixes, counted over all images, stands at each placeholder, row by row. By default each stands once,
                in order. Rows that hold several captions of an image repeat some.
            past_key_values ([`~transformers.Cache`], *optional*): The older name of `cache`.
            kwargs: Further arguments of the language model and of the loss.

        Raises:
            TypeError: If neither this model nor its language model has such an argument.
        """
        cache = one_cache(cache, past_key_values)
        shift_labels = kwargs.pop("shift_labels", None)  # labels that the trainer has shifted, for parallel sequences
        self._check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or clip_embeds is not None:
            if image_outputs is not None:
                raise ValueError("Pass either images or `mm_encoder_outputs`, not both.")
            image_outputs = self.get_image_features(pixel_values, clip_embeds, return_dict=True)

        prefix = None
        if image_outputs is not None or input_ids is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)
        if image_outputs is not None:
            prefix = image_outputs.pooler_output
            if prefix_index is None:
                self._check_placeholders(placeholders, prefix)
        if input_ids is not None:
            # The placeholder's id may lie outside the language model's vocabulary.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
        if prefix is not None:
            prefix = prefix.to(inputs_embeds.device, inputs_embeds.dtype)
            vectors = prefix if prefix_index is None else prefix.flatten(0, 1)[prefix_index]
            inputs_embeds = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), vectors)
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = self._four_dimensional(attention_mask, inputs_embeds.dtype)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )

        loss = None
        if labels is not None:
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)
            labels = labels[:, kept]
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels.masked_fill(shift_labels == self.config.image_token_id, -100)
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            vocab_size = self.config.text_config.get_text_config().vocab_size
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)

        return ClipCapCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # language models without attention have none
            image_hidden_states=prefix,
            image_outputs=image_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )

    def _check_arguments(self, kwargs: dict):
        # Language models silently ignore arguments that they do not know.
        if not kwargs or torch.compiler.is_compiling():
            return
        known = {*inspect.signature(self.language_model.forward).parameters, *TransformersKwargs.__optional_keys__}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise TypeError(
                f"Neither the captioner nor its language model, a `{self.config.text_config.model_type}`, has the "
                f"argument `{unknown[0]}`: leave it out."
            )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None = None
    ) -> torch.BoolTensor:
        """Find the placeholders, (batch, sequence), in token ids, or in embeddings if the placeholder has one."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        embeddings = self.get_input_embeddings()
        if self.config.image_token_id >= embeddings.weight.shape[0]:
            raise ValueError(
                "Images need `input_ids` with placeholders: the placeholder of this captioner has no embedding, so "
                "`inputs_embeds` cannot say where they go. For `generate`, pass both."
            )
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == embeddings(token)).all(-1)

    def _four_dimensional(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # The "eager" attention adds the mask to the scores; the others take True and False.
        if attention_mask.dtype != torch.bool or self.language_model.config._attn_implementation != "eager":
            return attention_mask
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)

    def _check_placeholders(self, placeholders: torch.Tensor, prefix: torch.Tensor):
        if torch.compiler.is_compiling():
            return
        expected = prefix.shape[0] * prefix.shape[1]
        # Counting waits for the device, but a scatter of the wrong size would be silent.
        if (found := int(placeholders.sum())) != expected:
            raise ValueError(
                f"`input_ids` hold {found} image placeholders (id {self.config.image_token_id}), but "
                f"{prefix.shape[0]} images with a prefix of {prefix.shape[1]} vectors need {expected}. "
                f"ClipCapProcessor writes them: are its `prefix_length` ({self.config.prefix_length}) and "
                f"`image_token_id` ({self.config.image_token_id}) the model's?"
            )


__all__ = ["ClipCapCausalLMOutputWithPast", "ClipCapForConditionalGeneration", "ClipCapPreTrainedModel"]
