"""Two beam searches that read each prompt once: the official ClipCap rule, and that of transformers, made faster.

Both have one shape: the loop of `search_loop_clipcap.py` runs the language model, and a class of beams keeps the
captions so far and decides at each step which of them to extend.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerationMode

from .search_loop_clipcap import Decoder, one_row_per_image, search
from .versions_clipcap import CACHE


_LOST = -1e9  # the score of a beam that can never win; transformers uses the same number


def official_beam_search(
    model: Decoder,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
    r"""
    Search as `generate_beam` of the official ClipCap code does, for `generate(custom_generate=...)`.

    A caption's score is its mean log-probability per token, the stop token included. A stopped caption keeps its slot
    among the `num_beams`, so fewer are extended; it is lost when extended ones score better; and the search ends when
    all have stopped. The beam search of transformers keeps stopped captions apart, always extends `num_beams`, and
    often finds a better score: use this one to reproduce the official captions.

    Images are searched together and with a cache, which holds each prompt once and no stopped caption.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only model; `generate()` fills in this and what follows.
        input_ids (`torch.LongTensor` of shape `(batch * num_beams, prompt)`): Prompts, padded on the left.
        logits_processor ([`~transformers.LogitsProcessorList`]): Applied to log-probabilities, as in the beam search
            of transformers. The official code has none.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]): When a caption has stopped.
        generation_config ([`~transformers.GenerationConfig`]): `num_beams` (5 in the official code),
            `num_return_sequences`, `max_new_tokens` (67), `eos_token_id` (the id of ".") and `return_dict_in_generate`
            are obeyed; `early_stopping` has no meaning here.
        model_kwargs: The model's further inputs.

    Returns:
        `torch.LongTensor` of shape `(batch * num_return_sequences, prompt + longest caption)`, each image's best
        caption first; with `return_dict_in_generate` a [`~transformers.generation.GenerateBeamDecoderOnlyOutput`] with
        `sequences` and `sequences_scores` (in nats per token).

    Raises:
        ValueError: If the settings contradict the rule: sampling, a length penalty other than 1, no cache.

    Example:

    ```python
    >>> captions = model.generate(
    ...     clip_embeds=clip_embeds, custom_generate=official_beam_search, num_beams=5, num_return_sequences=5
    ... )  # doctest: +SKIP

    ```
    """
    _check_settings(model, generation_config, model_kwargs)
    input_ids, model_kwargs = one_row_per_image(model, input_ids, generation_config.num_beams, model_kwargs)
    beams = _OfficialBeams.start(input_ids, generation_config, stopping_criteria, logits_processor)
    search(model, input_ids, model_kwargs, beams)

    num_returned = generation_config.num_return_sequences
    sequences = beams.sequences[:, :num_returned].flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    scores = beams.log_probs / beams.lengths
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores[:, :num_returned].flatten())


def fast_beam_search(
    model: Decoder,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    Find what `generate(num_beams=...)` of transformers finds, with less work.

    A prompt is read once instead of once per beam, the best tokens are looked for in each row instead of in the joined
    vocabularies of all beams, and an image whose search has ended leaves the batch.

    Arguments and result are those of a function for `generate(custom_generate=...)`, see [`official_beam_search`].

    Raises:
        CannotSearchFast: If it does not cover the settings; raised before any work.
    """
    outputs = scored_beam_search(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    )
    return outputs.sequences


def scored_beam_search(
    model: Decoder,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> GenerateBeamDecoderOnlyOutput:
    """Search as [`fast_beam_search`], and also return `sequences_scores`, without keeping all logits for them."""
    if not _covers(model, input_ids, logits_processor, generation_config, model_kwargs):
        raise CannotSearchFast
    input_ids, model_kwargs = one_row_per_image(model, input_ids, generation_config.num_beams, model_kwargs)
    beams = _FastBeams.start(input_ids, generation_config, stopping_criteria)
    search(model, input_ids, model_kwargs, beams)

    num_returned = generation_config.num_return_sequences
    longest = int(beams.found_lengths[:, :num_returned].max())
    return GenerateBeamDecoderOnlyOutput(
        sequences=beams.found[:, :num_returned, : beams.prompt_length + longest].flatten(0, 1),
        sequences_scores=beams.found_scores[:, :num_returned].flatten(),
    )


class CannotSearchFast(Exception):
    """[`fast_beam_search`] does not cover the settings that `generate()` has worked out."""


# -- the official rule


@dataclass
class _OfficialBeams:
    """The captions so far, best first: `num_beams` slots for each image.

    At first one slot of each image is live and empty, and the others can never win (log-probability minus infinity),
    so that the first step needs no rule of its own.
    """

    sequences: torch.Tensor  # (batch, num_beams, prompt + tokens so far)
    log_probs: torch.Tensor  # (batch, num_beams), sums over the caption's tokens, in nats
    lengths: torch.Tensor  # (batch, num_beams), tokens of the caption, the stop token included
    stopped: torch.Tensor  # (batch, num_beams)
    live_slots: torch.Tensor  # (rows,): which slots of the flattened batch the model's rows stand for
    pad_token: int
    stopping_criteria: StoppingCriteriaList
    logits_processor: LogitsProcessorList

    @classmethod
    def start(cls, input_ids, generation_config, stopping_criteria, logits_processor) -> "_OfficialBeams":
        batch_size, num_beams, device = len(input_ids), generation_config.num_beams, input_ids.device
        first = torch.zeros(batch_size, num_beams, dtype=torch.bool, device=device)
        first[:, 0] = True
        pad_token = padding_token(generation_config)
        return cls(
            sequences=input_ids.unsqueeze(1).repeat(1, num_beams, 1),
            log_probs=torch.zeros(batch_size, num_beams, device=device).masked_fill(~first, -torch.inf),
            lengths=torch.zeros(batch_size, num_beams, dtype=torch.long, device=device),
            stopped=~first,
            live_slots=torch.arange(batch_size, device=device) * num_beams,
            pad_token=0 if pad_token is None else pad_token,
            stopping_criteria=stopping_criteria,
            logits_processor=logits_processor,
        )

    @property
    def live_sequences(self) -> torch.Tensor:
        return self.sequences.flatten(0, 1)[self.live_slots]

    def extend(self, logits: torch.Tensor) -> torch.Tensor:
        log_probs, tokens = self._best_tokens(logits)
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
        grown = _gather(self.sequences, parents)
        self.sequences = torch.cat([grown, tokens.flatten(1).gather(1, chosen).unsqueeze(-1)], dim=-1)
        # Criteria look at the last token, which is padding where the parent had stopped.
        stops_now = self.stopping_criteria(self.sequences.flatten(0, 1), None).view_as(self.stopped)
        self.stopped = self.stopped.gather(1, parents) | stops_now.to(self.stopped.device)

        row_of_slot = torch.empty_like(self.lengths).flatten()
        row_of_slot[self.live_slots] = torch.arange(len(self.live_slots), device=row_of_slot.device)
        self.live_slots = (~self.stopped).flatten().nonzero().squeeze(1)
        parent_slots = parents + torch.arange(batch_size, device=parents.device).unsqueeze(1) * num_beams
        return row_of_slot[parent_slots.flatten()[self.live_slots]]

    def _best_tokens(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the `num_beams` best next tokens of each row: log-probabilities and ids, (rows, num_beams) both."""
        num_beams = self.stopped.shape[1]
        if len(self.logits_processor) == 0:
            return _top_log_probs(logits, num_beams)
        # Some processors count on `num_beams` rows per image, so they are shown the stopped slots too.
        scores = self._per_slot(logits.log_softmax(-1), fill=0.0).flatten(0, 1)
        scores = self.logits_processor(self.sequences.flatten(0, 1), scores)
        return scores[self.live_slots].topk(num_beams)

    def _per_slot(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Values of the live slots (rows, n) as (batch, num_beams, n)."""
        table = values.new_full((self.stopped.numel(), values.shape[1]), fill)
        table[self.live_slots] = values
        return table.unflatten(0, self.stopped.shape)


def _check_settings(model: Decoder, generation_config: GenerationConfig, model_kwargs: dict[str, Any]):
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


# -- the rule of transformers


@dataclass
class _FastBeams:
    """The running captions of the images that are still searched, and the best stopped ones of all images."""

    running: torch.Tensor  # (images, beams, prompt + tokens so far); one beam until the first step
    running_scores: torch.Tensor  # (images, beams), sums of log-probabilities, in nats
    images: torch.Tensor  # (images,): which of all images are still searched
    found: torch.Tensor  # (all images, num_beams, max_length): stopped captions, best first
    found_scores: torch.Tensor  # (all images, num_beams), with the length penalty
    found_lengths: torch.Tensor  # (all images, num_beams), tokens of the caption
    prompt_length: int
    num_candidates: int
    pad_token: int
    generation_config: GenerationConfig
    stopping_criteria: StoppingCriteriaList

    @classmethod
    def start(cls, input_ids, generation_config, stopping_criteria) -> "_FastBeams":
        (num_images, prompt_length), device = input_ids.shape, input_ids.device
        shape = (num_images, generation_config.num_beams)
        pad_token = padding_token(generation_config) if stop_tokens(generation_config) else -1  # as in transformers
        found = torch.full((*shape, generation_config.max_length), pad_token, device=device)
        found[..., :prompt_length] = input_ids.unsqueeze(1)
        return cls(
            running=input_ids.unsqueeze(1),
            running_scores=torch.zeros(num_images, 1, device=device),
            images=torch.arange(num_images, device=device),
            found=found,
            found_scores=torch.full(shape, _LOST, device=device),
            found_lengths=torch.zeros(shape, dtype=torch.long, device=device),
            prompt_length=prompt_length,
            num_candidates=_num_candidates(generation_config),
            pad_token=pad_token,
            generation_config=generation_config,
            stopping_criteria=stopping_criteria,
        )

    @property
    def live_sequences(self) -> torch.Tensor:
        return self.running.flatten(0, 1)

    def extend(self, logits: torch.Tensor) -> torch.Tensor:
        candidates, totals, parents = self._candidates(logits)
        stopped = self.stopping_criteria(candidates.flatten(0, 1), None).view_as(totals).to(totals.device)
        self._keep_stopped(candidates, totals, stopped)

        num_beams, previous_beams = self.generation_config.num_beams, self.running.shape[1]
        self.running_scores, order = totals.masked_fill(stopped, _LOST).topk(num_beams)
        self.running = _gather(candidates, order)
        first_rows = torch.arange(len(self.images), device=parents.device).unsqueeze(1) * previous_beams
        rows = parents.gather(1, order) + first_rows
        hopeful = self._may_improve()
        if stopped.all():
            hopeful = torch.zeros_like(hopeful)
        if not hopeful.all():
            self.images, self.running, self.running_scores, rows = (
                x[hopeful] for x in (self.images, self.running, self.running_scores, rows)
            )
        return rows.flatten()

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find each image's best continuations: sequences, sums of log-probabilities, and the beams they continue."""
        log_probs, tokens = _top_log_probs(logits, self.num_candidates)
        totals = (self.running_scores.unsqueeze(-1) + log_probs.unflatten(0, self.running.shape[:2])).flatten(1)
        totals, chosen = totals.topk(self.num_candidates)
        parents = chosen // self.num_candidates
        tokens = tokens.reshape(len(self.running), -1).gather(1, chosen).unsqueeze(-1)
        return torch.cat([_gather(self.running, parents), tokens], dim=-1), totals, parents

    def _keep_stopped(self, candidates: torch.Tensor, totals: torch.Tensor, stopped: torch.Tensor):
        """Put the candidates that stop among those found, if they are among the `num_beams` best of this step."""
        num_beams, length = self.generation_config.num_beams, candidates.shape[-1] - self.prompt_length
        keeps = stopped & (torch.arange(self.num_candidates, device=stopped.device) < num_beams)
        scores = torch.where(keeps, totals / length**self.generation_config.length_penalty, _LOST)
        padded = F.pad(candidates, (0, self.found.shape[-1] - candidates.shape[-1]), value=self.pad_token)
        lengths = torch.full_like(keeps, length, dtype=torch.long)

        images = self.images
        scores, order = torch.cat([self.found_scores[images], scores], dim=1).topk(num_beams)
        self.found[images] = _gather(torch.cat([self.found[images], padded], dim=1), order)
        self.found_lengths[images] = torch.cat([self.found_lengths[images], lengths], dim=1).gather(1, order)
        self.found_scores[images] = scores

    def _may_improve(self) -> torch.Tensor:
        """For each image, whether a running beam may still beat the worst one found (transformers' heuristics)."""
        settings, found_scores = self.generation_config, self.found_scores[self.images]
        length = self.running.shape[-1] - self.prompt_length
        if settings.early_stopping == "never" and settings.length_penalty > 0.0:
            length = settings.max_length - self.prompt_length
        best_possible = self.running_scores[:, 0] / length**settings.length_penalty
        is_full = (found_scores > _LOST / 10).all(1)
        may_improve = ~is_full | (best_possible > found_scores.min(1).values)
        return may_improve & ~is_full if settings.early_stopping is True else may_improve


def _covers(
    model: Decoder,
    input_ids: torch.Tensor,
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
        or len(logits_processor)  # some count on `num_beams` rows per image, always
        or not isinstance(cache, DynamicCache)
        or cache.get_seq_length() > 0
        or (placeholders != placeholders[0]).any()
        or _num_candidates(generation_config) > model.config.language_config.vocab_size
    )


def _num_candidates(generation_config: GenerationConfig) -> int:
    # Enough to continue `num_beams` beams, even if every beam could stop at every stop token.
    return max(2, 1 + len(stop_tokens(generation_config))) * generation_config.num_beams


# -- what both need


def stop_tokens(generation_config: GenerationConfig) -> list[int]:
    """List the ids in `eos_token_id`, which may be a number, a list, a tensor or `None`."""
    ends = generation_config.eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def padding_token(generation_config: GenerationConfig) -> int | None:
    """Tell the id that follows a stopped caption: the first stop token if no padding token is set."""
    if generation_config.pad_token_id is not None:
        return int(generation_config.pad_token_id)
    return next(iter(stop_tokens(generation_config)), None)


def _top_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the log-probabilities and ids of each row's `k` best tokens, (rows, k) both; overwrites the logits."""
    best, tokens = logits.topk(k)
    largest = best[:, :1]
    logsumexp = logits.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
    return best - logsumexp, tokens


def _gather(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`values[i, indices[i]]` for each image i: (images, n, tokens) by (images, m)."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


__all__ = ["fast_beam_search", "official_beam_search", "scored_beam_search"]
