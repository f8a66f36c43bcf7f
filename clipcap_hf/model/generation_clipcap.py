"""Beam searches that read each prompt once: that of the official ClipCap code, and that of transformers, made faster."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .versions_clipcap import CACHE


def official_beam_search(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.LongTensor | GenerateBeamDecoderOnlyOutput:
    r"""
    Beam search by the rule of the official ClipCap code (`generate_beam` of its `predict.py`), for the argument
    `custom_generate` of `generate()`.

    A caption's score is its mean log-probability per token, the stop token counted. A caption that has stopped keeps
    its slot among the `num_beams`, so fewer are extended; it is lost when extended ones score better; and the search
    ends when all have stopped. The beam search of transformers keeps stopped captions apart, always extends `num_beams`,
    and often finds a better score: use this one where the official captions themselves are wanted.

    Images are searched together and with a cache, which holds each prompt once and no caption that has stopped.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only model, here as below filled in by `generate()`.
        input_ids (`torch.LongTensor` of shape `(batch * num_beams, prompt)`): Prompts, padded on the left.
        logits_processor ([`~transformers.LogitsProcessorList`]): Applied to log-probabilities, as in the beam search of
            transformers. The official code has none.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]): When a caption has stopped.
        generation_config ([`~transformers.GenerationConfig`]): `num_beams` (5 in the official code),
            `num_return_sequences`, `max_new_tokens` (67), `eos_token_id` (the id of ".") and `return_dict_in_generate`
            are obeyed; `early_stopping` has no meaning here.
        model_kwargs: The model's further inputs.

    Returns:
        `torch.LongTensor` of shape `(batch * num_return_sequences, prompt + longest caption)`, each image's best caption
        first; with `return_dict_in_generate` a [`~transformers.generation.GenerateBeamDecoderOnlyOutput`] with
        `sequences` and `sequences_scores` (in nats per token).

    Raises:
        ValueError: If the settings contradict the rule: sampling, a length penalty other than 1, no cache.

    Example:

    ```python
    >>> captions = model.generate(
    ...     clip_embeds=clip_embeds, custom_generate=official_beam_search, num_beams=5, num_return_sequences=5
    ... )  # doctest: +SKIP

    ```"""
    _check_settings(model, generation_config, model_kwargs)
    num_beams = generation_config.num_beams
    input_ids, model_kwargs = _one_row_per_image(model, input_ids, num_beams, model_kwargs)
    beams = _Beams.start(input_ids, num_beams, _padding_token(generation_config) or 0)

    outputs = _read_prompts(model, input_ids, model_kwargs)
    while True:
        _add_token(model_kwargs, outputs)
        log_probs, tokens = _best_tokens(outputs.logits[:, -1], beams, logits_processor)
        del outputs  # the first logits may be large
        parent_rows = beams.extend(log_probs, tokens, stopping_criteria)
        if len(parent_rows) == 0:
            break
        _select_rows(model_kwargs, parent_rows)
        model_inputs = model.prepare_inputs_for_generation(
            beams.live_sequences, next_sequence_length=1, **model_kwargs
        )
        outputs = model(**model_inputs, return_dict=True)

    num_returned = generation_config.num_return_sequences
    sequences = beams.sequences[:, :num_returned].flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    scores = beams.log_probs / beams.lengths
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores[:, :num_returned].flatten())


def mean_log_probs(
    model: PreTrainedModel,
    outputs: Any,
    prompt_length: int,
    generation_config: GenerationConfig | None = None,
    **generate_kwargs: Any,
) -> torch.Tensor:
    """The mean log-probability of each caption's tokens, the end token included, in nats.

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
    logprobs = model.compute_transition_scores(
        outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
    )
    generated = outputs.sequences[:, prompt_length : prompt_length + logprobs.shape[1]]
    real = logprobs.isfinite()
    eos_token_id = generate_kwargs.get("eos_token_id", (generation_config or model.generation_config).eos_token_id)
    if eos_token_id is not None:
        ends = torch.isin(generated, torch.as_tensor(eos_token_id, device=generated.device)).long()
        real &= ends.cumsum(-1) - ends == 0  # the end token counts, what follows is padding
    return logprobs.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)


@dataclass
class _Beams:
    """The captions so far, best first: `num_beams` slots for each image.

    At first one slot of each image is live and empty, and the others can never win (log-probability minus infinity), so
    that the first step needs no rule of its own.
    """

    sequences: torch.LongTensor  # (batch, num_beams, prompt + tokens so far)
    log_probs: torch.Tensor  # (batch, num_beams), sums over the caption's tokens, in nats
    lengths: torch.LongTensor  # (batch, num_beams), tokens of the caption, the stop token included
    stopped: torch.BoolTensor  # (batch, num_beams)
    live_slots: torch.LongTensor  # (rows,): which slots of the flattened batch the model's rows stand for
    pad_token: int

    @classmethod
    def start(cls, input_ids: torch.LongTensor, num_beams: int, pad_token: int) -> "_Beams":
        batch_size, device = len(input_ids), input_ids.device
        first = torch.zeros(batch_size, num_beams, dtype=torch.bool, device=device)
        first[:, 0] = True
        return cls(
            sequences=input_ids.unsqueeze(1).repeat(1, num_beams, 1),
            log_probs=torch.zeros(batch_size, num_beams, device=device).masked_fill(~first, -torch.inf),
            lengths=torch.zeros(batch_size, num_beams, dtype=torch.long, device=device),
            stopped=~first,
            live_slots=torch.arange(batch_size, device=device) * num_beams,
            pad_token=pad_token,
        )

    @property
    def live_sequences(self) -> torch.LongTensor:
        return self.sequences.flatten(0, 1)[self.live_slots]

    def extend(
        self, log_probs: torch.Tensor, tokens: torch.LongTensor, stopping_criteria: StoppingCriteriaList
    ) -> torch.LongTensor:
        """Take one step, given the best tokens of each live slot, (rows, num_beams) each.

        Returns:
            For each slot that is live now, the model's row that it continues.
        """
        batch_size, num_beams = self.stopped.shape
        # A live slot offers its best tokens, a stopped one itself. More than `num_beams` of one slot cannot be chosen.
        totals = self._per_slot(self.log_probs.flatten()[self.live_slots, None] + log_probs, fill=-torch.inf)
        totals[..., 0] = torch.where(self.stopped, self.log_probs, totals[..., 0])
        tokens = self._per_slot(tokens, fill=self.pad_token)
        lengths = self.lengths + ~self.stopped
        chosen = (totals / lengths.unsqueeze(-1)).flatten(1).topk(num_beams).indices
        parents = chosen // num_beams

        self.log_probs = totals.flatten(1).gather(1, chosen)
        self.lengths = lengths.gather(1, parents)
        grown = self.sequences.gather(1, parents.unsqueeze(-1).expand_as(self.sequences))
        self.sequences = torch.cat([grown, tokens.flatten(1).gather(1, chosen).unsqueeze(-1)], dim=-1)
        # Criteria look at the last token, which is padding where the parent had stopped.
        stops_now = stopping_criteria(self.sequences.flatten(0, 1), None).view_as(self.stopped)
        self.stopped = self.stopped.gather(1, parents) | stops_now.to(self.stopped.device)

        row_of_slot = torch.empty_like(self.lengths).flatten()
        row_of_slot[self.live_slots] = torch.arange(len(self.live_slots), device=row_of_slot.device)
        self.live_slots = (~self.stopped).flatten().nonzero().squeeze(1)
        parent_slots = parents + torch.arange(batch_size, device=parents.device).unsqueeze(1) * num_beams
        return row_of_slot[parent_slots.flatten()[self.live_slots]]

    def _per_slot(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Values of the live slots (rows, n) as (batch, num_beams, n)."""
        table = values.new_full((self.stopped.numel(), values.shape[1]), fill)
        table[self.live_slots] = values
        return table.unflatten(0, self.stopped.shape)


class CannotSearchFast(Exception):
    """[`fast_beam_search`] does not cover the settings, as `generate()` has worked them out: search as transformers does."""


def setting(model: PreTrainedModel, name: str, generation_config: GenerationConfig | None, kwargs: dict) -> Any:
    """What `generate()` will take for a setting: of its arguments, of the config given to it, or of the model's own."""
    for value in (kwargs.get(name), getattr(generation_config, name, None)):
        if value is not None:
            return value
    return getattr(model.generation_config, name, None)


def may_search_fast(model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict) -> bool:
    """Whether to try [`fast_beam_search`], by the arguments of `generate()`."""
    # `generate()` hands these to its own searches only.
    if any(
        kwargs.get(name) for name in ("custom_generate", "assistant_model", "streamer", "tokenizer", "synced_gpus")
    ):
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        return False  # all processes have to take as many steps
    wanted = {
        name: setting(model, name, generation_config, kwargs) for name in ("num_beams", "do_sample", "use_cache")
    }
    return (wanted["num_beams"] or 1) > 1 and not wanted["do_sample"] and wanted["use_cache"] is not False


def _covers(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> bool:
    cache = model_kwargs.get(CACHE)
    placeholders = (input_ids == model.config.image_token_id).sum(1)
    return not (
        generation_config.get_generation_mode() != GenerationMode.BEAM_SEARCH
        or generation_config.return_dict_in_generate
        or not generation_config.use_cache
        or generation_config.low_memory
        or generation_config.prefill_chunk_size is not None
        or len(logits_processor)  # some count on `num_beams` rows an image, always
        or not isinstance(cache, DynamicCache)
        or cache.get_seq_length() > 0
        or (placeholders != placeholders[0]).any()
        or _num_candidates(generation_config) > model.config.text_config.get_text_config().vocab_size
    )


def _num_candidates(generation_config: GenerationConfig) -> int:
    # So many that, even if all beams could stop at each end token, there are beams left to go on with.
    stop_tokens = _stop_tokens(generation_config)
    return max(2, 1 + len(stop_tokens)) * generation_config.num_beams


def fast_beam_search(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """
    What `generate(num_beams=...)` of transformers finds, with less work: a prompt is read once and not once a beam, the
    best tokens are looked for in each row and not among all beams' vocabularies, and an image whose search has ended
    leaves the batch.

    Takes and returns what a function for the argument `custom_generate` of `generate()` does.

    Raises:
        CannotSearchFast: If the settings are others than it is made for, before any work.
    """
    if not _covers(model, input_ids, logits_processor, generation_config, model_kwargs):
        raise CannotSearchFast
    num_beams, device = generation_config.num_beams, input_ids.device
    early_stopping, penalty = generation_config.early_stopping, generation_config.length_penalty
    stop_tokens = _stop_tokens(generation_config)
    num_candidates = _num_candidates(generation_config)
    input_ids, model_kwargs = _one_row_per_image(model, input_ids, num_beams, model_kwargs)
    num_images, prompt_length = input_ids.shape
    fill = (_padding_token(generation_config) or stop_tokens[0]) if stop_tokens else -1

    images = torch.arange(num_images, device=device)  # those that are still searched, in the rows' order
    running = input_ids.unsqueeze(1)  # (images, beams, tokens); a single beam until the first step
    running_scores = torch.zeros(num_images, 1, device=device)
    found = torch.full((num_images, num_beams, generation_config.max_length), int(fill), device=device)
    found[..., :prompt_length] = input_ids.unsqueeze(1)
    found_scores = torch.full((num_images, num_beams), -1e9, device=device)
    found_lengths = torch.zeros(num_images, num_beams, dtype=torch.long, device=device)

    outputs = _read_prompts(model, input_ids, model_kwargs)
    while True:
        _add_token(model_kwargs, outputs)
        logits = outputs.logits[:, -1].to(device, torch.float32)
        del outputs  # the first logits may be large
        log_probs, tokens = logits.topk(num_candidates)
        log_probs = log_probs - _logsumexp_(logits, log_probs[:, :1])
        totals = (running_scores.unsqueeze(-1) + log_probs.unflatten(0, running.shape[:2])).flatten(1)
        totals, chosen = totals.topk(num_candidates)
        parents = chosen // num_candidates
        candidates = torch.cat(
            [_gather(running, parents), tokens.reshape(len(running), -1).gather(1, chosen).unsqueeze(-1)], dim=-1
        )
        stopped = stopping_criteria(candidates.flatten(0, 1), None).view_as(totals).to(device)

        # Of the candidates that stop, only those among the `num_beams` best are kept.
        length = candidates.shape[-1] - prompt_length
        stops_well = stopped & (torch.arange(num_candidates, device=device) < num_beams)
        scores = torch.where(stops_well, totals / length**penalty, -1e9)
        scores, order = torch.cat([found_scores[images], scores], dim=1).topk(num_beams)
        pool = torch.nn.functional.pad(candidates, (0, found.shape[-1] - candidates.shape[-1]), value=int(fill))
        found[images] = _gather(torch.cat([found[images], pool], dim=1), order)
        lengths = torch.cat([found_lengths[images], torch.full_like(stops_well, length, dtype=torch.long)], dim=1)
        found_lengths[images] = lengths.gather(1, order)
        found_scores[images] = scores

        running_scores, order = totals.masked_fill(stopped, -1e9).topk(num_beams)
        rows = parents.gather(1, order) + torch.arange(len(images), device=device).unsqueeze(1) * running.shape[1]
        running = _gather(candidates, order)
        finished = scores > -1e8
        hopeful = _may_improve(running_scores[:, 0], scores, finished, length, prompt_length, generation_config)
        if early_stopping is True:
            hopeful &= ~finished.all(1)
        if not hopeful.any() or stopped.all():
            break
        if not hopeful.all():
            images, running, running_scores, rows = (x[hopeful] for x in (images, running, running_scores, rows))
        _select_rows(model_kwargs, rows.flatten())
        model_inputs = model.prepare_inputs_for_generation(
            running.flatten(0, 1), next_sequence_length=1, **model_kwargs
        )
        outputs = model(**model_inputs, return_dict=True)

    returned = generation_config.num_return_sequences
    longest = int(found_lengths[:, :returned].max())
    return found[:, :returned, : prompt_length + longest].flatten(0, 1)


def _may_improve(best_running, found_scores, finished, length: int, prompt_length: int, generation_config):
    """For each image, whether a running beam may still beat the worst that was found (transformers' heuristics)."""
    if generation_config.early_stopping == "never" and generation_config.length_penalty > 0.0:
        length = generation_config.max_length - prompt_length
    best_possible = best_running / length**generation_config.length_penalty
    return ~finished.all(1) | (best_possible > found_scores.min(1).values)


def _gather(values: torch.Tensor, indices: torch.LongTensor) -> torch.Tensor:
    """`values[i, indices[i]]` for each image i: (images, n, tokens) by (images, m)."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _best_tokens(
    logits: torch.Tensor, beams: _Beams, logits_processor: LogitsProcessorList
) -> tuple[torch.Tensor, torch.LongTensor]:
    """The `num_beams` best next tokens of each live slot and their log-probabilities, (rows, num_beams) each."""
    num_beams = beams.stopped.shape[1]
    # float32 as in transformers; the sequences' device decides where the bookkeeping is done.
    logits = logits.to(beams.sequences.device, torch.float32)
    if len(logits_processor) == 0:
        best, tokens = logits.topk(num_beams)
        return best - _logsumexp_(logits, best[:, :1]), tokens
    # Some processors count on `num_beams` rows an image, so they are shown the stopped slots too.
    scores = beams._per_slot(logits.log_softmax(-1), fill=0.0).flatten(0, 1)
    scores = logits_processor(beams.sequences.flatten(0, 1), scores)
    return scores[beams.live_slots].topk(num_beams)


def _logsumexp_(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Log of the sum of exponentials of each row, (rows, 1), given its `largest` logit; the logits are used up."""
    return logits.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)


def _one_row_per_image(
    model: PreTrainedModel, input_ids: torch.LongTensor, num_beams: int, model_kwargs: dict[str, Any]
) -> tuple[torch.LongTensor, dict[str, Any]]:
    """Undo that `generate()` repeats every row `num_beams` times, so that a prompt is read once."""
    batch_size = len(input_ids) // num_beams

    def first_of_each(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim:
            # The last of the three dimensions: several images in one prompt.
            return value.unflatten(0, (batch_size, num_beams, -1))[:, 0].flatten(0, 1)
        return value

    model_kwargs = dict(model_kwargs)
    if images := model_kwargs.pop("mm_encoder_outputs", None):
        placeholders = (input_ids == model.config.image_token_id).sum(1)
        if (placeholders != placeholders[0]).any():
            raise ValueError("official_beam_search needs as many images in each prompt of a batch.")
        # Of what the vision tower gives, only the prefix has been repeated, and only that is needed.
        prefix = type(images["image"])(pooler_output=first_of_each(images["image"].pooler_output))
        model_kwargs["mm_encoder_outputs"] = {"image": prefix}
    one_each = {name: first_of_each(value) for name, value in model_kwargs.items()}
    return first_of_each(input_ids), one_each


def _select_rows(model_kwargs: dict[str, Any], rows: torch.LongTensor):
    """Make the cache and the other inputs those of the given rows (repeated or left out as need be), in place."""
    model_kwargs[CACHE].reorder_cache(rows)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            model_kwargs[name] = value[rows.to(value.device)]


def _stop_tokens(generation_config: GenerationConfig) -> list[int]:
    ends = generation_config.eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _padding_token(generation_config: GenerationConfig) -> int | None:
    # Where none is set, `generate()` pads with the first end token.
    if generation_config.pad_token_id is not None:
        return int(generation_config.pad_token_id)
    return next(iter(_stop_tokens(generation_config)), None)


def _read_prompts(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> Any:
    """The model's outputs for whole prompts; their images are in the cache then and are taken out of the inputs."""
    model_inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = model(**model_inputs, return_dict=True)
    for name in ("mm_encoder_outputs", "pixel_values", "clip_embeds"):
        model_kwargs.pop(name, None)
    return outputs


def _add_token(model_kwargs: dict[str, Any], outputs: Any):
    """Make the inputs those of the next token, in place."""
    model_kwargs[CACHE] = outputs[CACHE]
    for name, step in (("attention_mask", None), ("position_ids", 1), ("token_type_ids", 0)):
        if (values := model_kwargs.get(name)) is not None:
            last = torch.ones_like(values[..., -1:]) if step is None else values[..., -1:] + step
            model_kwargs[name] = torch.cat([values, last], dim=-1)


def _check_settings(model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any]):
    if model.config.is_encoder_decoder:
        raise ValueError("official_beam_search is for decoder-only models.")
    if generation_config.do_sample:
        raise ValueError("official_beam_search does not sample: pass `do_sample=False`.")
    if generation_config.length_penalty != 1.0:
        raise ValueError(
            f"official_beam_search scores by the mean log-probability per token: `length_penalty` must be 1.0, got "
            f"{generation_config.length_penalty}."
        )
    if not generation_config.use_cache:
        raise ValueError("official_beam_search needs the cache: pass `use_cache=True`.")
    if (cache := model_kwargs.get(CACHE)) is not None and cache.get_seq_length() > 0:
        raise ValueError(f"official_beam_search reads the prompts itself: leave `{CACHE}` out.")


__all__ = ["fast_beam_search", "mean_log_probs", "official_beam_search"]
