"""The prefix in words: the vocabulary tokens nearest to each prefix vector (Mokady et al. 2021, figure 6)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput


@dataclass
class PrefixInterpretation(ModelOutput):
    r"""
    The `k` vocabulary tokens nearest to each prefix vector, the nearest first.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, prefix_length, k)`): Their ids.
        cosines (`torch.FloatTensor` of shape `(batch, prefix_length, k)`): Cosines between their embeddings and the
            vector, in [-1, 1].
        tokens (`list[list[list[str]]]`, *optional*): Their texts, where there was a tokenizer.
    """

    token_ids: torch.Tensor | None = None
    cosines: torch.Tensor | None = None
    tokens: list[list[list[str]]] | None = None


def nearest_tokens(
    prefix: torch.Tensor, embedding: torch.Tensor, k: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixInterpretation:
    """The nearest rows of `embedding` (vocabulary, hidden) for each vector of `prefix` (batch, prefix_length, hidden)."""
    if not 1 <= k <= len(embedding):
        raise ValueError(f"`k` must be from 1 to the {len(embedding)} tokens of the vocabulary, got {k}.")
    # Rows that no token uses may be zeros; their cosine is 0 then.
    lengths = embedding.float().norm(dim=-1).clamp_min(1e-12)
    vectors = F.normalize(prefix.float(), dim=-1).to(embedding.device)
    cosines, token_ids = (vectors @ embedding.float().T / lengths).topk(k, dim=-1)
    tokens = None
    if tokenizer is not None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
        tokens = [[[tokenizer.decode([i]) for i in vector] for vector in image] for image in token_ids.tolist()]
    return PrefixInterpretation(token_ids=token_ids, cosines=cosines, tokens=tokens)
