"""Read the prefix as words: the vocabulary tokens nearest to each prefix vector (Mokady et al. 2021, figure 6)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .base_clipcap import CaptionerParts


@dataclass
class PrefixInterpretation(ModelOutput):
    r"""
    The `k` vocabulary tokens nearest to each prefix vector, nearest first.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, prefix_length, k)`): Their ids.
        cosines (`torch.FloatTensor` of shape `(batch, prefix_length, k)`): Cosines between their embeddings and the
            vector, in [-1, 1].
        tokens (`list[list[list[str]]]`, *optional*): The tokens as text, if a tokenizer was given.
    """

    token_ids: torch.Tensor | None = None
    cosines: torch.Tensor | None = None
    tokens: list[list[list[str]]] | None = None


class InterpretsPrefix(CaptionerParts):
    """Adds `interpret_prefix` to a captioner."""

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
        Read the prefix as words: the tokens nearest to each prefix vector (figure 6 of the paper).

        The words are easiest to read if the language model was trained, too; with a frozen one they are hard to read.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*): Preprocessed images.
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Their embeddings, instead of
                pixels.
            prefix (`torch.Tensor` of shape `(batch, prefix_length, hidden)`, *optional*): Their prefix, instead of
                both.
            k (`int`): Number of tokens per vector.
            tokenizer (*optional*): The tokenizer or the processor, to get the tokens as text.

        Returns:
            [`PrefixInterpretation`]: `token_ids` and `cosines`, both (batch, prefix_length, k), and `tokens`.
        """
        if prefix is None:
            images = self.get_image_features(pixel_values=pixel_values, clip_embeds=clip_embeds, return_dict=True)
            prefix = images.pooler_output
        return nearest_tokens(prefix, self.get_input_embeddings().weight, k, tokenizer)


def nearest_tokens(
    prefix: torch.Tensor, embedding: torch.Tensor, k: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> PrefixInterpretation:
    """Find the rows of `embedding` (vocabulary, hidden) nearest to `prefix` (batch, prefix_length, hidden)."""
    if not 1 <= k <= len(embedding):
        raise ValueError(f"`k` must be between 1 and {len(embedding)}, the size of the vocabulary, got {k}.")
    # Rows that no token uses may be zero; their cosine is then 0.
    lengths = embedding.float().norm(dim=-1).clamp_min(1e-12)
    vectors = F.normalize(prefix.float(), dim=-1).to(embedding.device)
    cosines, token_ids = (vectors @ embedding.float().T / lengths).topk(k, dim=-1)
    tokens = None
    if tokenizer is not None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
        tokens = [[[tokenizer.decode([i]) for i in vector] for vector in image] for image in token_ids.tolist()]
    return PrefixInterpretation(token_ids=token_ids, cosines=cosines, tokens=tokens)
