"""The ClipCap network (Mokady et al. 2021), in the order of the data.

1. features: the vision tower embeds each image (`get_clip_embeds`), unless embeddings are given;
2. mapping: the mapping network turns an embedding into a prefix of `prefix_length` vectors (`get_image_features`);
3. scatter: the prefix takes the place of the placeholders among the embedded tokens;
4. language model: it reads prefix and tokens; its hidden states are the output of `ClipCapModel`, the base model;
5. head: it predicts each next token, in `ClipCapForConditionalGeneration`;
6. loss: cross entropy of the caption's tokens; placeholders have none.

Steps 1 to 3, which both classes share, are in `inputs_clipcap.py`, loading and saving in `pretrained_clipcap.py`,
`generate()` in `generation_clipcap.py`, freezing in `freezing_clipcap.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_clipcap import ClipCapConfig
from .freezing_clipcap import FreezesParts
from .generation_clipcap import GeneratesCaptions
from .inputs_clipcap import EmbedsInputs
from .interpretation_clipcap import InterpretsPrefix
from .lora_clipcap import MergesLora, add_lora
from .model_card_clipcap import PushesModelCard
from .modeling_mapping import MAPPING_NETWORKS, ClipCapTransformerMappingNetwork
from .modeling_text import fuse_gelu, has_limited_positions
from .modeling_vision import build_vision_tower
from .pretrained_clipcap import LoadsAndSaves
from .versions_clipcap import CACHE, one_cache


@dataclass
class ClipCapModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`ClipCapModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, hidden)`): Of the language model, before its
            head.
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


class ClipCapPreTrainedModel(LoadsAndSaves, FreezesParts, EmbedsInputs, PreTrainedModel):
    r"""
    What [`ClipCapModel`] and [`ClipCapForConditionalGeneration`] share: the parts, loading and saving.

    Args:
        config ([`ClipCapConfig`]): The configuration.
    """

    config: ClipCapConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ClipCapMappingLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self):
        super().post_init()
        self._donor_hashes: dict[str, str] = {}  # of the parts that are known to equal their donors
        self._positions_are_limited = has_limited_positions(self.language_model)
        # FSDP and device maps look these classes up in this very model: MLP mappings have no layers, for example.
        here = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in here}

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

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)


class ClipCapModel(ClipCapPreTrainedModel):
    r"""
    The base model of [`ClipCapForConditionalGeneration`]: hidden states in place of next tokens.

    It has the same parts, the language model's head among them, and so the same weights under the same names.

    Args:
        config ([`ClipCapConfig`]): The configuration.
        vision_tower ([`~transformers.PreTrainedModel`], *optional*): A ready tower in place of a newly built one.
        language_model ([`~transformers.PreTrainedModel`], *optional*): A ready language model likewise.

    Example:

    ```python
    >>> import torch
    >>> from clipcap_hf import EMOJI_MINI, ClipCapModel, ClipCapProcessor

    >>> model, processor = ClipCapModel.from_pretrained(EMOJI_MINI), ClipCapProcessor.from_pretrained(EMOJI_MINI)
    >>> inputs = processor(clip_embeds=torch.randn(2, model.config.clip_embed_dim), return_tensors="pt")
    >>> hidden = model(**inputs).last_hidden_state
    >>> hidden.shape == (2, model.config.prefix_length, model.config.text_config.hidden_size)
    True

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
        self.register_module("vision_tower", vision_tower)
        self.mapping_network = MAPPING_NETWORKS[config.mapping_type](config)
        # A whole language model, for only its own class knows how its head is tied, scaled or capped.
        self.language_model = language_model
        fuse_gelu(language_model)
        if config.lora is not None:
            add_lora(language_model, config.lora)
        # The parts hold the very configurations that are saved with the whole.
        config.text_config = language_model.config
        if vision_tower is not None:
            config.vision_config = vision_tower.config
        self._freeze()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        clip_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prefix_index: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ClipCapModelOutputWithPast:
        r"""
        Compute the language model's hidden states, of which its head predicts each next token.

        Args:
            input_ids, pixel_values, clip_embeds, attention_mask, position_ids, cache, inputs_embeds, use_cache,
                mm_encoder_outputs, prefix_index, past_key_values, kwargs: As in
                [`ClipCapForConditionalGeneration`](#clipcapforconditionalgeneration).

        Raises:
            TypeError: If neither this model nor its language model has such an argument.
            ValueError: If the input is longer than the context of a language model that stores its positions.
        """
        body = self.language_model.base_model
        cache = one_cache(cache, past_key_values)
        self._check_arguments(body, kwargs)
        embeds, prefix, image_outputs = self._embed_inputs(
            input_ids, inputs_embeds, pixel_values, clip_embeds, mm_encoder_outputs, prefix_index
        )
        self._check_context(embeds.shape[1], position_ids, cache)
        outputs = body(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(attention_mask, embeds.dtype),
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        return ClipCapModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # language models without attention have none
            image_hidden_states=prefix,
            image_outputs=image_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


class ClipCapForConditionalGeneration(
    PushesModelCard,
    GeneratesCaptions,
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
        base_model = ClipCapModel(config, vision_tower, language_model)
        # Not a module of this one: both share their table of modules. So weights have the same names in both, those of
        # all checkpoints since 0.1.0, and a part that is replaced in one is replaced in the other.
        self.__dict__["model"] = base_model
        self._modules = base_model._modules
        self.post_init()

    def train(self, mode: bool = True):
        self.model.training = mode
        return super().train(mode)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        clip_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prefix_index: torch.Tensor | None = None,
        predictor_index: torch.Tensor | None = None,
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
                instead of `input_ids`. Images then need a placeholder in the vocabulary (`config.image_token_id`).
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Like `input_ids`, with -100 where no
                loss is wanted. Placeholders count as -100. Mark padding by `attention_mask`, not by the padding token,
                which may be the end token.
            logits_to_keep (`int` or `torch.Tensor`): Compute logits only for this many last positions, or for these.
            mm_encoder_outputs (`dict`, *optional*): `{"image": output of get_image_features}`, instead of images.
            prefix_index (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which vector of the images'
                prefixes, counted over all images, stands at each placeholder, row by row; by default once, in order.
            predictor_index (`torch.LongTensor` of shape `(labels,)`, *optional*): The position that predicts each
                label, counted over all rows. `labels` then have the shape `(labels,)`, and a position can have
                several, as the end of a prompt has that several captions share.
            past_key_values ([`~transformers.Cache`], *optional*): The older name of `cache`.
            kwargs: Further arguments of the language model and of the loss.

        Raises:
            TypeError: If neither this model nor its language model has such an argument.
            ValueError: If the input is longer than the context of a language model that stores its positions.
        """
        cache = one_cache(cache, past_key_values)
        shift_labels = kwargs.pop("shift_labels", None)  # labels that the trainer has shifted, for parallel sequences
        self._check_arguments(self.language_model, kwargs)
        embeds, prefix, image_outputs = self._embed_inputs(
            input_ids, inputs_embeds, pixel_values, clip_embeds, mm_encoder_outputs, prefix_index
        )
        self._check_context(embeds.shape[1], position_ids, cache)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(attention_mask, embeds.dtype),
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
            logits = outputs.logits
            if predictor_index is not None:
                logits, shift_labels = logits.flatten(0, 1)[predictor_index], labels
            else:
                labels = labels[:, kept]
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels.masked_fill(shift_labels == self.config.image_token_id, -100)
            labels = labels.masked_fill(labels.eq(self.config.image_token_id), -100)
            vocab_size = self.config.language_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

        return ClipCapCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # language models without attention have none
            image_hidden_states=prefix,
            image_outputs=image_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


__all__ = [
    "ClipCapCausalLMOutputWithPast",
    "ClipCapForConditionalGeneration",
    "ClipCapModel",
    "ClipCapModelOutputWithPast",
    "ClipCapPreTrainedModel",
]
