"""From a captioner's inputs to what its language model reads: steps 1 to 3 of `modeling_clipcap.py`."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .base_clipcap import CaptionerParts
from .configuration_clipcap import context_length
from .modeling_mapping import pool_patches
from .modeling_vision import embed_pixels


class EmbedsInputs(CaptionerParts):
    """Adds to a captioner and to its base model the prefix of images and its place among the tokens."""

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
        vision_outputs = ModelOutput()
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

    def _embed_inputs(
        self, input_ids, inputs_embeds, pixel_values, clip_embeds, mm_encoder_outputs, prefix_index
    ) -> tuple[torch.Tensor, torch.Tensor | None, BaseModelOutputWithPooling | None]:
        """Embed the tokens, with the prefix in place of the placeholders.

        Returns:
            `(inputs_embeds, prefix, image_outputs)`; the last two are `None` without images.
        """
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
        return inputs_embeds, prefix, image_outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Find the placeholders, (batch, sequence), in token ids, or in embeddings if the placeholder has one."""
        if input_ids is not None:
            return input_ids.eq(self.config.image_token_id)
        embeddings: Any = self.get_input_embeddings()
        if self.config.image_token_id >= embeddings.weight.shape[0]:  # type: ignore[operator]  # it is no longer None
            raise ValueError(
                "Images need `input_ids` with placeholders: the placeholder of this captioner has no embedding, so "
                "`inputs_embeds` cannot say where they go. For `generate`, pass both."
            )
        token = torch.tensor(self.config.image_token_id, device=embeddings.weight.device)
        return (inputs_embeds == embeddings(token)).all(-1)

    def _check_context(self, length: int, position_ids: torch.Tensor | None, cache: Cache | None):
        """Refuse inputs that have more positions than the language model; given ones are not looked at."""
        if not self._positions_are_limited or position_ids is not None or torch.compiler.is_compiling():
            return
        before = 0 if cache is None else cache.get_seq_length()
        context = context_length(self.config.text_config)
        # A static cache keeps its length on the device, where looking at it would wait.
        if context is not None and isinstance(before, int) and before + length > context:
            raise ValueError(
                f"Prefix and text are {before + length} tokens long, but the language model's context is {context}: "
                f"shorten the text (for the processor `truncation=True, max_length={context}`; for the collator "
                f"`max_caption_length={max(1, context - self.config.prefix_length)}`, less with a prompt), or choose "
                "a language model with a longer context."
            )

    def _attention_mask(self, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        if attention_mask is None or attention_mask.ndim != 4:
            return attention_mask
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

    def _check_arguments(self, language_model: nn.Module, kwargs: dict):
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)  # `generate()` needs them for stop strings, and then hands them to the model, too
        # Language models silently ignore arguments that they do not know.
        if not kwargs or torch.compiler.is_compiling():
            return
        known = {*inspect.signature(language_model.forward).parameters, *TransformersKwargs.__optional_keys__}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise TypeError(
                f"Neither the captioner nor its language model, a `{self.language_model.config.model_type}`, has the "
                f"argument `{unknown[0]}`: leave it out."
            )
