"""Greedy decoding as transformers does it, in which captions that have ended leave the batch."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from .beam_search_clipcap import CannotSearchFast, padding_token
from .search_loop_clipcap import Decoder, search
from .versions_clipcap import CACHE


# Leaving the batch copies the cache of those who stay, so captions leave when this share of the rows has ended.
SHARE_TO_LEAVE = 1 / 8


def fast_greedy_search(
    model: Decoder,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    Find what `generate()` of transformers finds without beams or sampling, with less work.

    Arguments and result are those of a function for `generate(custom_generate=...)`.

    Raises:
        CannotSearchFast: If it does not cover the settings; raised before any work.
    """
    if not _covers(logits_processor, stopping_criteria, generation_config, model_kwargs):
        raise CannotSearchFast
    captions = _Captions.start(input_ids, generation_config, stopping_criteria)
    search(model, input_ids, dict(model_kwargs), captions)
    return captions.sequences


@dataclass
class _Captions:
    """The captions so far, one for each image, and which of them are rows of the batch."""

    sequences: torch.Tensor  # (images, prompt + tokens so far), padded after the end
    rows: torch.Tensor  # (rows,): the image of each row of the batch
    ended: torch.Tensor  # (rows,)
    pad_token: int
    stopping_criteria: StoppingCriteriaList

    @classmethod
    def start(cls, input_ids, generation_config, stopping_criteria) -> "_Captions":
        pad_token = padding_token(generation_config)
        return cls(
            sequences=input_ids,
            rows=torch.arange(len(input_ids), device=input_ids.device),
            ended=torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device),
            pad_token=0 if pad_token is None else pad_token,
            stopping_criteria=stopping_criteria,
        )

    @property
    def live_sequences(self) -> torch.Tensor:
        return self.sequences[self.rows]

    def extend(self, logits: torch.Tensor) -> torch.Tensor:
        tokens = logits.argmax(-1).masked_fill(self.ended, self.pad_token)
        column = self.sequences.new_full((len(self.sequences), 1), self.pad_token)
        column[self.rows, 0] = tokens
        self.sequences = torch.cat([self.sequences, column], dim=-1)
        self.ended = self.ended | self.stopping_criteria(self.live_sequences, None).to(self.ended.device)

        stay = torch.arange(len(self.rows), device=self.rows.device)
        num_ended = int(self.ended.sum())
        if num_ended == len(self.rows) or num_ended >= SHARE_TO_LEAVE * len(self.rows):
            stay = stay[~self.ended]
            self.rows, self.ended = self.rows[stay], self.ended[stay]
        return stay


def _covers(
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> bool:
    cache = model_kwargs.get(CACHE)
    # Others may count on the rows of a batch staying in place.
    criteria = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)
    return (
        generation_config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and not generation_config.return_dict_in_generate
        and bool(generation_config.use_cache)
        and generation_config.prefill_chunk_size is None
        and len(logits_processor) == 0
        and all(type(criterion) in criteria for criterion in stopping_criteria)
        and isinstance(cache, DynamicCache)
        and cache.get_seq_length() == 0
    )


__all__ = ["fast_greedy_search"]
