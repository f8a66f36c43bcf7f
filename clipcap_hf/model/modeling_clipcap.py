"""ClipCap: an image tower, a mapping network and a causal language model."""

import copy
import dataclasses
import difflib
import inspect
import math
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_clipcap import ClipCapConfig
from .donors_clipcap import donor_folder, donor_record, leaving_out_frozen, remember_donors, with_donors
from .generation_clipcap import CannotSearchFast, fast_beam_search, may_search_fast, setting
from .interpretation_clipcap import PrefixInterpretation, nearest_tokens
from .lora_clipcap import add_lora, freeze_beside_lora, merge_lora
from .model_card_clipcap import PushesModelCard
from .modeling_mapping import MAPPING_NETWORKS, ClipCapTransformerMappingNetwork, pool_patches
from .modeling_text import caption_generation_config, fuse_gelu, load_language_model, load_tokenizer, placeholder_id
from .modeling_vision import (
    build_vision_tower,
    embed_pixels,
    load_vision_config,
    load_vision_tower,
    vision_feature_dim,
)
from .versions_clipcap import CACHE, READS_IN_CHUNKS, keep_weights


@dataclass
class ClipCapCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`ClipCapForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*): Next-token cross entropy over the positions with a label.
        logits (`torch.Tensor` of shape `(batch, sequence, vocabulary)`): Scores before softmax.
        cache ([`~transformers.Cache`], *optional*): The language model's keys and values; before transformers 5.24 it is
            `past_key_values`.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Of the language model, `(batch, sequence, hidden)` each.
        attentions (`tuple(torch.Tensor)`, *optional*): Of the language model.
        image_hidden_states (`torch.Tensor` of shape `(batch, prefix_length, hidden)`, *optional*): The prefix.
    """

    image_hidden_states: torch.Tensor | None = None


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


class ClipCapForConditionalGeneration(PushesModelCard, ClipCapPreTrainedModel, GenerationMixin):
    r"""
    Image captioning by a CLIP prefix (Mokady et al. 2021): a vision tower embeds the image, the mapping network turns
    the embedding into `prefix_length` vectors, and the language model continues them with the caption.

    In `input_ids` the prefix is held by `prefix_length` placeholders `config.image_token_id`, which
    [`ClipCapProcessor`] writes, so that what `generate()` can do works as for a text model.

    Args:
        config ([`ClipCapConfig`]): The configuration.
        vision_tower ([`~transformers.PreTrainedModel`], *optional*): A ready tower in place of a newly built one.
        language_model ([`~transformers.PreTrainedModel`], *optional*): Likewise.

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

    ```"""

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
        self._donor_hashes = {}  # of the parts that are known to be as their donors are
        # The parts hold the very configurations that are saved with the whole.
        config.text_config = language_model.config
        if vision_tower is not None:
            config.vision_config = vision_tower.config
        self._freeze()
        self.post_init()

    def _freeze(self):
        if self.config.freeze_vision and self.vision_tower is not None:
            self.vision_tower.requires_grad_(False)
        if self.config.lora is not None:
            freeze_beside_lora(self.language_model)
        elif self.config.freeze_language_model:
            self.language_model.requires_grad_(False)
            # A frozen language model works without dropout. `eval()` would say the same, but it also switches gradient
            # checkpointing off without a word.
            for module in self.language_model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name, value in vars(module).items():
                    if "drop" in name and isinstance(value, float):  # also OPT's `layerdrop`
                        setattr(module, name, 0.0)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_vision and self.vision_tower is not None:
            self.vision_tower.eval()  # the running statistics of ResNet towers would drift
        return self

    def parameter_counts(self) -> dict[str, tuple[int, int]]:
        """Numbers of `(trainable, all)` parameters of each part and in `"total"`, tied weights counted once."""
        parts = {name: list(part.parameters()) for name, part in self.named_children()}
        counts = {
            name: (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
            for name, parameters in parts.items()
        }
        trainable, everything = zip(*counts.values())
        return {**counts, "total": (sum(trainable), sum(everything))}

    def merge_lora(self):
        """Add the LoRA adapters to the language model's weights and take them out: captions stay as they are, to rounding.

        The language model is then no longer the one that was loaded, so checkpoints hold it.
        """
        if self.config.lora is None:
            raise ValueError("This captioner has no LoRA adapters (`config.lora` is None).")
        merge_lora(self.language_model)
        self.config.lora = None
        (self.config.donors or {}).pop("language_model", None)

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
        The prefix of each image.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*): Preprocessed images; or
                videos, `(batch, frames, 3, height, width)`.
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Embeddings from the same tower,
                as [`get_clip_embeds`](#get_clip_embeds) returns them, in place of pixels; with
                `vision_feature="patches"` patch tokens of shape `(batch, patches, clip_embed_dim)`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is the prefix, of shape
            `(batch, prefix_length, hidden)`; the rest is the vision tower's, of each frame where it takes images.
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

    @torch.no_grad()
    def interpret_prefix(
        self,
        pixel_values: torch.Tensor | None = None,
        clip_embeds: torch.Tensor | None = None,
        *,
        prefix: torch.Tensor | None = None,
        k: int = 1,
        tokenizer=None,
    ) -> PrefixInterpretation:
        r"""
        Read the prefix as words: the vocabulary tokens whose embeddings are nearest to each prefix vector (figure 6 of the
        paper). They tell most where the language model was trained, too; for a frozen one they are hard to read.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*): Preprocessed images.
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Their embeddings instead.
            prefix (`torch.Tensor` of shape `(batch, prefix_length, hidden)`, *optional*): Or their prefix.
            k (`int`): Number of tokens for each vector.
            tokenizer (*optional*): The tokenizer or the processor, for the texts of the tokens.

        Returns:
            [`PrefixInterpretation`]: `token_ids` and `cosines`, both (batch, prefix_length, k), and `tokens`.
        """
        if prefix is None:
            images = self.get_image_features(pixel_values=pixel_values, clip_embeds=clip_embeds, return_dict=True)
            prefix = images.pooler_output
        return nearest_tokens(prefix, self.get_input_embeddings().weight, k, tokenizer)

    def get_clip_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """CLIP embeddings (batch, clip_embed_dim) of preprocessed images (batch, 3, height, width) or videos (batch,
        frames, 3, height, width), not normalised; with `vision_feature="patches"` patch tokens, pooled to (batch,
        clip_length, clip_embed_dim)."""
        return self._embed_pixels(pixel_values)[0]

    def _embed_pixels(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        if self.vision_tower is None:
            raise ValueError(
                "This captioner has no vision tower (`vision_config` is None): pass `clip_embeds` in place of "
                "`pixel_values`."
            )
        clip_embeds, outputs = embed_pixels(self.vision_tower, pixel_values, self.config.vision_feature, **kwargs)
        if self.config.vision_feature == "patches":
            clip_embeds = pool_patches(clip_embeds, self.config.clip_length)
        return clip_embeds, outputs

    def _check_clip_embeds(self, clip_embeds: torch.Tensor):
        patches = self.config.vision_feature == "patches"
        if clip_embeds.ndim != 2 + patches or clip_embeds.shape[-1] != self.config.clip_embed_dim:
            shape = (
                f"(batch, patches, {self.config.clip_embed_dim})"
                if patches
                else f"(batch, {self.config.clip_embed_dim})"
            )
            raise ValueError(
                f"`clip_embeds` must have the shape {shape} that this model's mapping network takes (`vision_feature` is "
                f"{self.config.vision_feature!r}), got {tuple(clip_embeds.shape)}. Were they made by another CLIP?"
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
        **kwargs,
    ) -> tuple | ClipCapCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): Tokens, with `prefix_length` placeholders
                `config.image_token_id` for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`, *optional*): Preprocessed images; or
                videos, `(videos, frames, 3, height, width)`.
            clip_embeds (`torch.FloatTensor` of shape `(images, clip_embed_dim)`, *optional*): Embeddings of the images,
                in place of their pixels; or patch tokens, `(images, patches, clip_embed_dim)`.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 where there is padding. Or of shape
                `(batch, 1, sequence, sequence)` and type `bool`: True where a position (third) may look at another.
            cache ([`~transformers.Cache`], *optional*): The language model's keys and values of what came before.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Like `input_ids`, with -100 where no
                loss is wanted: on the prefix and on padding (by `attention_mask`: the padding token may be a real one).
            logits_to_keep (`int` or `torch.Tensor`): Compute logits only for the last so many positions, or for these.
            mm_encoder_outputs (`dict`, *optional*): `{"image": output of get_image_features}`, in place of both pixels
                and embeddings.
            prefix_index (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which vector of the images' prefixes,
                counted over all images, stands at each placeholder, row by row. By default each stands once, in order.
                Rows that hold several captions of an image repeat some.
            past_key_values ([`~transformers.Cache`], *optional*): The older name of `cache`.
            kwargs: Further arguments of the language model and of the loss.

        Raises:
            TypeError: If neither this model nor its language model has such an argument.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("`past_key_values` is the older name of `cache`: pass one of them.")
        self._check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or clip_embeds is not None:
            if image_outputs is not None:
                raise ValueError("Pass either images or `mm_encoder_outputs`, not both.")
            image_outputs = self.get_image_features(pixel_values, clip_embeds, return_dict=True)

        prefix = None
        if inputs_embeds is None:
            # The placeholder's id may lie outside the language model's vocabulary.
            placeholders = input_ids == self.config.image_token_id
            if image_outputs is not None and prefix_index is None:
                self._check_placeholders(placeholders, image_outputs.pooler_output)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
            if image_outputs is not None:
                prefix = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
                vectors = prefix if prefix_index is None else prefix.flatten(0, 1)[prefix_index]
                inputs_embeds = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), vectors)
        elif image_outputs is not None:
            raise ValueError("Images need `input_ids` with placeholders; `inputs_embeds` cannot say where they go.")

        if (
            attention_mask is not None
            and attention_mask.ndim == 4
            and self.language_model.config._attn_implementation == "eager"
        ):
            # The other implementations take True and False; this one adds the mask to the scores.
            lowest = torch.finfo(inputs_embeds.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype).masked_fill(
                ~attention_mask, lowest
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: cache if cache is not None else past_key_values},
            **kwargs,
        )

        loss = None
        if labels is not None:
            if isinstance(logits_to_keep, torch.Tensor):
                labels = labels[:, logits_to_keep]
            elif logits_to_keep:
                labels = labels[:, -logits_to_keep:]
            vocab_size = self.config.text_config.get_text_config().vocab_size
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)

        return ClipCapCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=prefix,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )

    def _check_arguments(self, kwargs: dict):
        # Language models take any argument without a word, and do nothing with those that they do not know.
        if not kwargs or torch.compiler.is_compiling():
            return
        known = {*inspect.signature(self.language_model.forward).parameters, *TransformersKwargs.__optional_keys__}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise TypeError(
                f"Neither the captioner nor its language model, a `{self.config.text_config.model_type}`, has the argument "
                f"`{unknown[0]}`: leave it out."
            )

    def _check_placeholders(self, placeholders: torch.Tensor, prefix: torch.Tensor):
        if torch.compiler.is_compiling():
            return
        expected = prefix.shape[0] * prefix.shape[1]
        # The comparison waits for the device; a scatter of the wrong size would be silent.
        if (found := int(placeholders.sum())) != expected:
            raise ValueError(
                f"`input_ids` hold {found} image placeholders (id {self.config.image_token_id}), but {prefix.shape[0]} "
                f"images with a prefix of {prefix.shape[1]} vectors need {expected}. ClipCapProcessor writes them: are its "
                f"`prefix_length` ({self.config.prefix_length}) and `image_token_id` ({self.config.image_token_id}) the "
                "model's?"
            )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        r"""
        Caption images, with the arguments of [`~transformers.GenerationMixin.generate`], but for the few that look the
        prompt's tokens up in the vocabulary, where the image's placeholders are not.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): `input_ids`: the placeholders and a
                prompt to continue, padded on the left. Without it each image is captioned with no prompt.
            generation_config ([`~transformers.GenerationConfig`], *optional*): In place of the model's own.
            kwargs: `pixel_values` (batch, 3, height, width), of videos (batch, frames, 3, height, width), or
                `clip_embeds` (batch, clip_embed_dim), of patches (batch, patches, clip_embed_dim), `attention_mask`, and
                anything that `generate` of transformers takes. `max_length` counts the prefix: use
                `max_new_tokens`.

        Returns:
            As in transformers; the token ids begin with the input, placeholders included.

        Raises:
            ValueError: If embeddings have the wrong width or hold NaN or infinity, if prompt and caption together are
                longer than the language model's context, or for `prompt_lookup_num_tokens`, `token_healing` and
                `encoder_repetition_penalty`.
        """
        for name, off in (
            ("prompt_lookup_num_tokens", 0),
            ("token_healing", False),
            ("encoder_repetition_penalty", 1.0),
        ):
            value = kwargs.get(name, getattr(generation_config or self.generation_config, name, None))
            if value is not None and value != off:
                raise ValueError(
                    f"`{name}` looks the prompt's tokens up in the vocabulary, where the image's placeholders are not: "
                    "leave it out."
                )
        kwargs.pop("labels", None)  # a training batch may be passed as it is
        clip_embeds = kwargs.pop("clip_embeds", None)
        pixel_values = kwargs.get("pixel_values")
        images = clip_embeds if clip_embeds is not None else pixel_values
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if images is not None and input_ids is None and kwargs.get("inputs_embeds") is None:
            input_ids = torch.full(
                (len(images), self.config.prefix_length), self.config.image_token_id, device=images.device
            )
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        if clip_embeds is not None:
            if pixel_values is not None:
                raise ValueError("Pass exactly one of `pixel_values` and `clip_embeds`.")
            clip_embeds = torch.as_tensor(clip_embeds)
            # generate() of transformers encodes pixels before the loop, but drops any other input of the encoder.
            image_outputs = self.get_image_features(clip_embeds=clip_embeds, return_dict=True)
            _check_finite(clip_embeds)
            kwargs["mm_encoder_outputs"] = {"image": image_outputs}
        if not READS_IN_CHUNKS and setting(self, "prefill_chunk_size", generation_config, kwargs) is not None:
            raise ValueError(
                "`prefill_chunk_size` needs transformers 5.23: earlier releases lose the image. Leave it out."
            )
        if input_ids is not None:
            given = ("mm_encoder_outputs", "cache", "past_key_values")
            has_images = images is not None or any(kwargs.get(name) for name in given)
            if not has_images and (input_ids == self.config.image_token_id).any():
                raise ValueError(
                    "The prompt has image placeholders, but no image: pass `pixel_values` or `clip_embeds`."
                )
            self._check_context(input_ids.shape[1], generation_config, kwargs)
        if "cache" in kwargs:  # as in `forward`, both names serve
            kwargs[CACHE] = kwargs.pop("cache")
        elif "past_key_values" in kwargs:
            kwargs[CACHE] = kwargs.pop("past_key_values")
        if may_search_fast(self, generation_config, kwargs):
            if kwargs.get("pixel_values") is not None:  # encoded once, whichever search it will be
                pixel_values = kwargs.pop("pixel_values")
                kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, return_dict=True)}
            fast = {**kwargs, "custom_generate": fast_beam_search}
            if images := kwargs.get("mm_encoder_outputs"):  # copied, for generate() repeats them in place
                fast["mm_encoder_outputs"] = {name: copy.copy(image) for name, image in images.items()}
            try:
                return super().generate(input_ids, generation_config=generation_config, **fast)
            except CannotSearchFast:
                pass  # the settings, once worked out, want transformers' own
        return super().generate(input_ids, generation_config=generation_config, **kwargs)

    def _check_context(self, input_length: int, generation_config: GenerationConfig | None, kwargs: dict):
        context = getattr(self.config.text_config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return
        if input_length >= context:
            raise ValueError(
                f"Prefix and prompt are {input_length} tokens long, but the language model's context is {context}: "
                "shorten the prompt."
            )
        max_new_tokens = kwargs.get("max_new_tokens")
        if max_new_tokens is None:
            max_new_tokens = (generation_config or self.generation_config).max_new_tokens
        if max_new_tokens is not None and input_length + max_new_tokens > context:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}, but after {input_length} tokens of prefix and prompt the language "
                f"model's context of {context} leaves room for {context - input_length}."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        vision_tower: str | None = None,
        language_model: str | None = None,
        **kwargs,
    ):
        r"""
        As in transformers, but a checkpoint that lacks weights is an error, not a partly random captioner.

        Parts that the checkpoint leaves out (`save_frozen=False`) are loaded from where they came from, and checked.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder.
            vision_tower (`str`, *optional*): Hub id, folder or open_clip name where a tower that the checkpoint leaves
                out is now, if it is no longer where it was.
            language_model (`str`, *optional*): Likewise.
            kwargs: As in transformers.

        Raises:
            OSError: If there is no checkpoint, or a part that it leaves out is not to be found.
            ValueError: If weights are missing, damaged or of another shape than the configuration says, or if a part that
                the checkpoint leaves out is not the one that it was trained with.
        """
        moved = {"vision_tower": vision_tower, "language_model": language_model}
        moved = {part: name for part, name in moved.items() if name is not None}
        wants_info = kwargs.get("output_loading_info", False)
        name, donor_hashes = pretrained_model_name_or_path, {}
        try:
            if name is not None:
                kwargs, donor_hashes = with_donors(cls, name, moved, kwargs)
            model, info = cls._load_complete(name, model_args, kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {name} are incomplete or damaged ({error}): copy or download them again."
            ) from error
        model._donor_hashes = donor_hashes
        model._freeze()  # loading makes new parameters, which want gradients
        return (model, info) if wants_info else model

    @classmethod
    def _load_complete(cls, name, model_args: tuple, kwargs: dict) -> tuple["ClipCapForConditionalGeneration", dict]:
        accepts_mismatch = kwargs.get("ignore_mismatched_sizes", False)  # otherwise reported below, by name
        # Where a checkpoint leaves parts out, all the weights are at hand already.
        source = name if kwargs.get("state_dict") is None else None
        model, info = super().from_pretrained(
            source, *model_args, **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
        if source is None and name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
        problems = []
        if missing := sorted(info["missing_keys"]):
            problems.append(f"{len(missing)} are missing, for example {missing[0]}")
        if (mismatched := sorted(info["mismatched_keys"])) and not accepts_mismatch:
            key, found, expected = mismatched[0]
            problems.append(
                f"{len(mismatched)} have another shape, for example {key} {tuple(found)} where the configuration asks "
                f"for {tuple(expected)}"
            )
        if problems:
            raise ValueError(
                f"The weights of {name} do not fit its configuration: {' and '.join(problems)}. Does config.json belong "
                f"to these weights (mapping_type is {model.config.mapping_type!r}, prefix_length "
                f"{model.config.prefix_length})?"
            )
        return model, info

    def save_pretrained(self, save_directory, *args, save_frozen: bool | None = None, **kwargs):
        r"""
        As in transformers, but frozen parts may be left out, which makes a checkpoint of a few megabytes.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            save_frozen (`bool`, *optional*): With `False`, each part of which nothing is trained and whose donor is known
                (`config.donors`) is not saved: the checkpoint says where it comes from, with its revision and a hash of
                its weights. A part without a donor, or one that no longer is what its donor is, is saved all the same.
                By default what `config.save_frozen` says, which is how `Trainer` and `push_to_hub` can be told.
            args, kwargs: As in transformers.
        """
        with leaving_out_frozen(self, self.config.save_frozen if save_frozen is None else save_frozen):
            return super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _load_donor(part: str, name: str, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
        load = load_vision_tower if part == "vision_tower" else load_language_model
        return load(donor_folder(name), dtype, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel | None,
        text: str | PreTrainedModel,
        dtype: torch.dtype | str = torch.float32,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "ClipCapForConditionalGeneration":
        r"""
        Start a captioner from a pretrained vision tower and a pretrained language model; the mapping network is new.

        Args:
            vision (`str`, [`~transformers.PreTrainedModel`] or `None`): A Hub id or folder of transformers
                (`"openai/clip-vit-base-patch32"`), an open_clip checkpoint (`"ViT-B-32/openai"`, `"hf-hub:ORG/REPO"` or
                a folder with `open_clip_config.json`; its plain ViTs become `CLIPVisionModelWithProjection`), a loaded
                model, or `None` to work on embeddings alone.
            text (`str` or [`~transformers.PreTrainedModel`]): A Hub id, folder or loaded model of a causal LM, or
                `"package:NAME"`, the folder of an installed Python package.
            dtype (`torch.dtype`): Of the parts that are loaded here by name; the new mapping network takes that of the
                language model. Training wants `torch.float32`, whatever the parts were saved in.
            vision_kwargs (`dict`, *optional*): For the tower's `from_pretrained` (`revision`, `token`, ...).
            text_kwargs (`dict`, *optional*): For the language model's (`revision`, `token`, `gguf_file`, ...).
            config_kwargs: Fields of [`ClipCapConfig`]: `mapping_type`, `prefix_length`, `freeze_language_model`, ...

        Raises:
            TypeError: If a name among `config_kwargs` is no such field.
            ValueError: If the parts do not fit each other or the configuration.

        Example:

        ```python
        >>> model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        ...     "openai/clip-vit-base-patch32", "openai-community/gpt2", mapping_type="mlp"
        ... )  # doctest: +SKIP

        ```"""
        _check_fields(config_kwargs)
        vision, text = (os.fspath(part) if isinstance(part, os.PathLike) else part for part in (vision, text))
        for part, name in ((vision, "vision"), (text, "text")):
            if not isinstance(part, (str, PreTrainedModel)) and not (part is None and name == "vision"):
                raise TypeError(f"`{name}` must be the name or folder of a model, or a loaded one, got {part!r}.")
        vision_kwargs, text_kwargs, donors, tokenizer = vision_kwargs or {}, text_kwargs or {}, {}, None
        vision_config, text_config = getattr(vision, "config", None), getattr(text, "config", None)
        # Configurations first: what does not fit is found before any weights are loaded.
        if isinstance(vision, str):
            vision_config = load_vision_config(donor_folder(vision), **vision_kwargs)
        if isinstance(text, str):
            text_config = _load_text_config(text, text_kwargs)
        vision_feature = config_kwargs.get("vision_feature", "pooled")
        if vision_config is not None and config_kwargs.get("clip_embed_dim") is None:
            config_kwargs["clip_embed_dim"] = vision_feature_dim(vision_config, vision_feature)
        ClipCapConfig(
            vision_config=copy.deepcopy(vision_config), text_config=copy.deepcopy(text_config), **config_kwargs
        )
        if isinstance(text, str):
            tokenizer = load_tokenizer(donor_folder(text), text_config, **text_kwargs)
            if tokenizer is not None:
                config_kwargs.setdefault("image_token_id", placeholder_id(tokenizer))
        if isinstance(vision, str):
            name, vision_kwargs = vision, {**vision_kwargs, "vision_feature": vision_feature}
            vision = cls._load_donor("vision_tower", name, dtype, **vision_kwargs)
            donors["vision_tower"] = donor_record(name, vision.dtype, vision_kwargs)
        if isinstance(text, str):
            name = text
            text = cls._load_donor("language_model", name, dtype, config=text_config, **text_kwargs)
            donors["language_model"] = donor_record(name, text.dtype, text_kwargs)
        # Copies: a new configuration resets the attention implementation of those it is given.
        config = ClipCapConfig(
            vision_config=None if vision is None else copy.deepcopy(vision.config),
            text_config=copy.deepcopy(text.config),
            donors=donors or None,
            **config_kwargs,
        )
        for part in filter(None, (vision, text)):
            keep_weights(part)
        model = cls(config, vision_tower=vision, language_model=text)
        model.mapping_network.to(next(text.parameters()).dtype)
        model.generation_config = caption_generation_config(text, config, tokenizer)
        remember_donors(model)
        return model


def _check_fields(config_kwargs: dict):
    """Anything would be taken, and saved in `config.json`: a misspelt field, a token."""
    known = ["attn_implementation", *(field.name for field in dataclasses.fields(ClipCapConfig))]
    for name in config_kwargs:
        if name not in known:
            near = difflib.get_close_matches(name.removeprefix("torch_"), [*known, "dtype"], n=1)
            raise TypeError(
                f"ClipCapConfig has no field `{name}`"
                + (f"; did you mean `{near[0]}`? " if near else ". ")
                + "What is for the loading of a part (`token`, `revision`, ...) goes into `vision_kwargs` or `text_kwargs`."
            )


def _load_text_config(name: str, kwargs: dict):
    try:
        config = AutoConfig.from_pretrained(donor_folder(name), **kwargs)
    except OSError as error:
        raise OSError(f"There is no language model {name!r} to be had: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
            raise ValueError(f"{name} is a `{config.model_type}`, which is no causal language model: choose another.")
    return config


def _check_finite(clip_embeds: torch.Tensor):
    bad = (~torch.isfinite(clip_embeds)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"`clip_embeds` hold NaN or infinity in rows {bad[:10]}: embed those images again.")


__all__ = ["ClipCapForConditionalGeneration", "ClipCapPreTrainedModel"]
