"""`generate()` of a captioner: its inputs, what it refuses and why, and the choice of a beam search."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .base_clipcap import CaptionerParts
from .beam_search_clipcap import CannotSearchFast, fast_beam_search, official_beam_search, padding_token, stop_tokens
from .configuration_clipcap import context_length
from .greedy_search_clipcap import fast_greedy_search
from .versions_clipcap import CACHE, READS_IN_CHUNKS


_IMAGES = ("pixel_values", "clip_embeds", "mm_encoder_outputs")
# Settings that look the prompt's tokens up in the vocabulary, and the values that turn them off.
_LOOKS_TOKENS_UP = {"token_healing": False, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}


class GeneratesCaptions(CaptionerParts, GenerationMixin):
    """Adds to a captioner the `generate()` that takes images, or embeddings of images, alone."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        r"""
        Caption images.

        Arguments are those of [`~transformers.GenerationMixin.generate`], except the few that look the prompt's tokens
        up in the vocabulary, which has no placeholders.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): `input_ids`: the placeholders and a
                prompt to continue, padded on the left. Without it each image is captioned with no prompt.
            generation_config ([`~transformers.GenerationConfig`], *optional*): In place of the model's own.
            kwargs: `pixel_values` (batch, 3, height, width), for videos (batch, frames, 3, height, width), or
                `clip_embeds` (batch, clip_embed_dim), for patches (batch, patches, clip_embed_dim), `attention_mask`,
                and anything that `generate` of transformers takes. `max_length` counts the prefix: prefer
                `max_new_tokens`. With `labels`, as in a training batch, each prompt ends where the labels begin.
                With `rerank`, a [`CaptionReranker`], the captions of the beam search are ordered by how well they fit
                the image, too.
                Guidance (`guidance_scale`) without a negative prompt compares with a caption that starts from the
                beginning-of-text token and has no image.

        Returns:
            As in transformers; the token ids begin with the input, placeholders included.

        Raises:
            ValueError: If embeddings have the wrong width, if they or pixels hold NaN or infinity, if prompt and
                caption together are longer than the language model's context, or for `token_healing`,
                `encoder_repetition_penalty`, `encoder_no_repeat_ngram_size`, and `prompt_lookup_num_tokens` unless the
                prompt is an image followed by text.
        """
        kwargs = _one_name_each(inputs, kwargs)
        if (rerank := kwargs.pop("rerank", None)) is not None:
            _check_reranker(rerank)
            return rerank.generate(self, generation_config, kwargs)
        self._refuse_settings(generation_config, kwargs)
        _end_prompts_at_labels(kwargs, self.config.image_token_id, self.generation_config.pad_token_id)
        self._check_images(kwargs)
        self._leave_out_images_in_the_cache(kwargs)
        self._add_placeholders(kwargs)
        self._encode_embeds(kwargs)
        self._put_prefix_into_embeds(kwargs)
        self._limit_length(generation_config, kwargs)
        self._start_unguided_captions(generation_config, kwargs)
        return self._search(generation_config, kwargs)

    def _refuse_settings(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]):
        for name, off in _LOOKS_TOKENS_UP.items():
            if setting(self, name, generation_config, kwargs) not in (None, off):
                raise ValueError(
                    f"`{name}` looks the prompt's tokens up in the vocabulary, which has no placeholders for images: "
                    "leave it out."
                )
        if setting(self, "prompt_lookup_num_tokens", generation_config, kwargs):
            if _would_propose_placeholders(kwargs, self.config.image_token_id):
                raise ValueError(
                    "`prompt_lookup_num_tokens` looks the prompt's tokens up and would propose placeholders: put the "
                    "image first and a text after it, or leave it out."
                )
        if not READS_IN_CHUNKS and setting(self, "prefill_chunk_size", generation_config, kwargs) is not None:
            raise ValueError(
                "`prefill_chunk_size` needs transformers 5.23: earlier releases lose the image. Leave it out."
            )
        if (assistant := kwargs.get("assistant_model")) is not None:
            self._check_assistant(assistant)

    def _check_assistant(self, assistant: PreTrainedModel):
        """Refuse assistants that cannot take this model's prefix: they must be captioners with one of its shape."""
        config = assistant.config
        if config.model_type != self.config.model_type:
            raise ValueError(
                f"`assistant_model` is a `{config.model_type}`, which cannot read the placeholders of an image: pass "
                "a captioner. To put such a language model into one, use `from_vision_text_pretrained`."
            )
        for name, own, other in (
            ("prefix_length", self.config.prefix_length, config.prefix_length),
            ("image_token_id", self.config.image_token_id, config.image_token_id),
            ("hidden_size", *(part.language_config.hidden_size for part in (self.config, config))),
        ):
            if own != other:
                raise ValueError(
                    f"`assistant_model` must have the prefix of the captioner that it helps, but its `{name}` is "
                    f"{other} and not {own}: pass another one."
                )

    def _check_images(self, kwargs: dict[str, Any]):
        pixel_values, clip_embeds = kwargs.get("pixel_values"), kwargs.get("clip_embeds")
        if pixel_values is not None and clip_embeds is not None:
            raise ValueError("Pass exactly one of `pixel_values` and `clip_embeds`.")
        given = (*_IMAGES, CACHE)
        input_ids = kwargs.get("input_ids")
        if input_ids is not None and all(kwargs.get(name) is None for name in given):
            if kwargs.get("inputs_embeds") is None and (input_ids == self.config.image_token_id).any():
                raise ValueError(
                    "The prompt has image placeholders, but no image: pass `pixel_values` or `clip_embeds`."
                )
        if pixel_values is not None:
            _check_finite("pixel_values", pixel_values, "load")

    def _leave_out_images_in_the_cache(self, kwargs: dict[str, Any]):
        """Let a caption or chat go on from a cache with the arguments it began with: its images were read already."""
        cache, input_ids, inputs_embeds = (kwargs.get(name) for name in (CACHE, "input_ids", "inputs_embeds"))
        if cache is None or all(kwargs.get(name) is None for name in _IMAGES) or input_ids is inputs_embeds is None:
            return
        placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)
        if placeholders.any() and not placeholders[:, int(cache.get_seq_length()) :].any():
            for name in _IMAGES:
                kwargs.pop(name, None)

    def _add_placeholders(self, kwargs: dict[str, Any]):
        """Caption images that come without a prompt from their placeholders alone."""
        images = kwargs["clip_embeds"] if kwargs.get("clip_embeds") is not None else kwargs.get("pixel_values")
        if images is None or kwargs.get("input_ids") is not None or kwargs.get("inputs_embeds") is not None:
            return
        shape = (len(images), self.config.prefix_length)
        device = getattr(images, "device", None)
        kwargs["input_ids"] = torch.full(shape, self.config.image_token_id, device=device)
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])

    def _encode_embeds(self, kwargs: dict[str, Any]):
        """Map embeddings here: `generate()` of transformers encodes pixels before its loop, but drops other inputs."""
        if (clip_embeds := kwargs.pop("clip_embeds", None)) is None:
            return
        clip_embeds = torch.as_tensor(clip_embeds)
        outputs = self.get_image_features(clip_embeds=clip_embeds, return_dict=True)
        _check_finite("clip_embeds", clip_embeds, "embed")
        kwargs["mm_encoder_outputs"] = {"image": outputs}

    def _put_prefix_into_embeds(self, kwargs: dict[str, Any]):
        """With both `input_ids` and `inputs_embeds`, the ids say where in the embeddings the prefix goes."""
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if input_ids is None or inputs_embeds is None:
            return
        images = kwargs.pop("mm_encoder_outputs", None)
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:
            images = {"image": self.get_image_features(pixel_values, return_dict=True)}
        if images:
            placeholders, prefix = self.get_placeholder_mask(input_ids), images["image"].pooler_output
            self._check_placeholders(placeholders, prefix)
            prefix = prefix.to(inputs_embeds.device, inputs_embeds.dtype)
            kwargs["inputs_embeds"] = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), prefix)

    def _limit_length(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]):
        """Obey `max_length`, which the model's own `max_new_tokens` would override, and keep within the context."""
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        input_length = 0 if tokens is None else tokens.shape[1]
        max_length = _given("max_length", generation_config, kwargs)
        if max_length is not None and _given("max_new_tokens", generation_config, kwargs) is None:
            if max_length <= input_length:
                raise ValueError(
                    f"`max_length` is {max_length}, but prefix and prompt are {input_length} tokens long already: "
                    "raise it, or use `max_new_tokens`."
                )
            kwargs["max_new_tokens"] = max_length - input_length
            kwargs.pop("max_length", None)
        if (context := context_length(self.config.text_config)) is None or tokens is None:
            return
        if input_length >= context:
            raise ValueError(
                f"Prefix and prompt are {input_length} tokens long, but the language model's context is {context}: "
                "shorten the prompt."
            )
        max_new_tokens = setting(self, "max_new_tokens", generation_config, kwargs)
        if max_new_tokens is not None and input_length + max_new_tokens > context:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}, but after {input_length} tokens of prefix and prompt the "
                f"language model's context of {context} leaves room for {context - input_length}."
            )

    def _start_unguided_captions(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]):
        """Start the caption without the image, which guidance compares with; a placeholder is no start for it."""
        input_ids = kwargs.get("input_ids")
        scale = setting(self, "guidance_scale", generation_config, kwargs)
        if scale in (None, 1) or input_ids is None or kwargs.get("negative_prompt_ids") is not None:
            return
        last = input_ids[:, -1:]
        if not (placeholders := last == self.config.image_token_id).any():
            return  # the last token of the text will do
        start = setting(self, "bos_token_id", generation_config, kwargs)
        if start is None:
            ends = setting(self, "eos_token_id", generation_config, kwargs)
            start = ends[0] if isinstance(ends, (list, tuple)) else ends
        if start is None:
            raise ValueError(
                "`guidance_scale` compares with a caption without the image, and the language model has no token to "
                "begin one with: pass `negative_prompt_ids`, or `bos_token_id`."
            )
        copies = [setting(self, name, generation_config, kwargs) for name in ("num_beams", "num_return_sequences")]
        start_ids = last.masked_fill(placeholders, int(start))
        kwargs["negative_prompt_ids"] = start_ids.repeat_interleave(max(1, *(n or 1 for n in copies)), dim=0)

    def _search(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]):
        if not may_search_fast(self, generation_config, kwargs):
            return self._generate_as_transformers(generation_config, kwargs)
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:  # encoded once, whichever search it will be
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, return_dict=True)}
        beams = setting(self, "num_beams", generation_config, kwargs) or 1
        fast = {**kwargs, "custom_generate": fast_beam_search if beams > 1 else fast_greedy_search}
        if images := kwargs.get("mm_encoder_outputs"):  # copied, for generate() repeats them in place
            fast["mm_encoder_outputs"] = {name: copy.copy(image) for name, image in images.items()}
        try:
            return super().generate(generation_config=generation_config, **fast)
        except CannotSearchFast:  # the settings, once worked out, need transformers' own search
            return self._generate_as_transformers(generation_config, kwargs)

    def _generate_as_transformers(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]):
        outputs = super().generate(generation_config=generation_config, **kwargs)
        settings = GenerationConfig(
            **{
                name: setting(self, name, generation_config, kwargs)
                for name in ("num_beams", "pad_token_id", "eos_token_id")
            }
        )
        if (settings.num_beams or 1) > 1 and settings.pad_token_id == 0 and kwargs.get("custom_generate") is None:
            # transformers' beam search takes a padding token 0 for none and pads with a stop token, which reads as
            # text.
            prompt_length = 0 if kwargs.get("input_ids") is None else kwargs["input_ids"].shape[1]
            pad_after_stop(getattr(outputs, "sequences", outputs), prompt_length, settings)
        return outputs


def setting(model: PreTrainedModel, name: str, generation_config: GenerationConfig | None, kwargs: dict) -> Any:
    """Tell what `generate()` will use for a setting: its argument, the given configuration's, or the model's own."""
    given = _given(name, generation_config, kwargs)
    return getattr(model.generation_config, name, None) if given is None else given


def _given(name: str, generation_config: GenerationConfig | None, kwargs: dict) -> Any:
    value = kwargs.get(name)
    return getattr(generation_config, name, None) if value is None else value


def may_search_fast(model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict) -> bool:
    """Whether to try the searches of this package, judging by the arguments of `generate()`."""
    # `generate()` hands these to its own searches only.
    if any(
        kwargs.get(name) for name in ("custom_generate", "assistant_model", "streamer", "tokenizer", "synced_gpus")
    ):
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        return False  # all processes have to take as many steps
    samples, caches = (setting(model, name, generation_config, kwargs) for name in ("do_sample", "use_cache"))
    return not samples and caches is not False


def pad_after_stop(sequences: torch.LongTensor, prompt_length: int, generation_config: GenerationConfig):
    """Write the padding token over everything after each caption's first stop token, in place."""
    captions = sequences[:, prompt_length:]
    stops = torch.isin(captions, torch.tensor(stop_tokens(generation_config), device=captions.device)).long()
    if (pad_token := padding_token(generation_config)) is not None:
        captions[stops.cumsum(1) - stops > 0] = pad_token


def mean_log_probs(
    model: GeneratesCaptions,
    outputs: Any,
    prompt_length: int,
    generation_config: GenerationConfig | None = None,
    **generate_kwargs: Any,
) -> torch.Tensor:
    """Average the log-probabilities of each caption's tokens, the stop token included, in nats.

    Args:
        model ([`~transformers.PreTrainedModel`]): The captioner.
        outputs ([`~transformers.utils.ModelOutput`]): Of `generate(return_dict_in_generate=True, output_logits=True)`.
        prompt_length (`int`): Tokens of prefix and prompt.
        generation_config, generate_kwargs: What `generate` was given.

    Returns:
        `torch.Tensor` of shape `(captions,)`.
    """
    if outputs.logits is None:  # of `official_beam_search`, whose scores are this mean
        return outputs.sequences_scores
    # Beam search keeps the scores; otherwise they are those of the tokens that were taken.
    logprobs = model.compute_transition_scores(  # type: ignore[misc]  # transformers wants a type of its own
        outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
    )
    generated = outputs.sequences[:, prompt_length : prompt_length + logprobs.shape[1]]
    real = logprobs.isfinite()
    eos_token_id = generate_kwargs.get("eos_token_id", (generation_config or model.generation_config).eos_token_id)
    if eos_token_id is not None:
        ends = torch.isin(generated, torch.as_tensor(eos_token_id, device=generated.device)).long()
        real &= ends.cumsum(-1) - ends == 0  # the stop token counts, what follows is padding
    return logprobs.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)


def _one_name_each(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copy the arguments, with `input_ids` for `inputs` and this release's name for either name of the cache."""
    kwargs = dict(kwargs)
    if inputs is not None:
        if kwargs.get("input_ids") is not None:
            raise ValueError("`inputs` and `input_ids` are the same: pass one of them.")
        kwargs["input_ids"] = inputs
    caches = [kwargs.pop(name) for name in ("cache", "past_key_values") if name in kwargs]
    if caches:
        kwargs[CACHE] = next((cache for cache in caches if cache is not None), None)
    return kwargs


def _end_prompts_at_labels(kwargs: dict[str, Any], image_token_id: int, pad_token_id: int | None):
    """Cut the captions off a training batch, where its `labels` begin, and pad the prompts on the left."""
    labels, input_ids = kwargs.pop("labels", None), kwargs.get("input_ids")
    if labels is None or input_ids is None or labels.shape != input_ids.shape:
        return
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            "This training batch packs several captions into a row (its `attention_mask` is not of the shape of "
            "`input_ids`): pass the images alone."
        )
    is_caption = (labels != -100) & (input_ids != image_token_id) & (mask != 0)
    is_prompt = (is_caption.cumsum(1) == 0) & (mask != 0)
    width = int(is_prompt.sum(1).max())
    order = is_prompt.long().argsort(dim=1, stable=True)[:, input_ids.shape[1] - width :]
    kept = is_prompt.gather(1, order)
    kwargs["input_ids"] = input_ids.gather(1, order).masked_fill(~kept, pad_token_id or 0)
    kwargs["attention_mask"] = kept.long()
    kwargs.pop("position_ids", None)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name].gather(1, order).masked_fill(~kept, 0)


def _check_reranker(rerank: Any):
    if not hasattr(rerank, "cosines"):
        raise ValueError(
            f"`rerank` must be a CaptionReranker, got {rerank!r}: pass `CaptionReranker.from_pretrained(model, "
            'processor)`. The pipeline "image-captioning" also takes `rerank=True` and the name of a CLIP.'
        )


def _would_propose_placeholders(kwargs: dict[str, Any], image_token_id: int) -> bool:
    """Whether a placeholder follows something that prompt lookup may meet again: text, or another placeholder."""
    if (input_ids := kwargs.get("input_ids")) is None:
        return True
    placeholders = input_ids == image_token_id
    mask = kwargs.get("attention_mask")
    is_text = ~placeholders if mask is None or mask.shape != input_ids.shape else ~placeholders & (mask != 0)
    return bool(placeholders[:, -1].any() or (is_text.cumsum(1).bool() & placeholders).any())


def _check_finite(name: str, values: torch.Tensor, verb: str):
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"`{name}` hold NaN or infinity in rows {bad[:10]}: {verb} those images again.")


__all__ = ["mean_log_probs", "official_beam_search"]
