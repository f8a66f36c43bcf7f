"""The smallest text tower: a text's embedding is the sum of the vectors of its tokens.

Without a CLIP's text tower, one like this is trained in seconds against the image embeddings of captioned images, and
it composes words that it never saw together, at the price of their order.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPTextModelOutput


@strict
class BagOfTokensTextConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BagOfTokensTextModel`].

    Args:
        vocab_size (`int`): Number of tokens of the tokenizer.
        projection_dim (`int`): Width of the embeddings of texts and images.
        max_position_embeddings (`int`): Longer texts are cut; there are no positions.
        rerank_weight (`float`): Weight of the cosine when captions are re-ranked, see [`CaptionReranker`].
        rerank_seen_penalty (`float`): Taken off the cosines of the captions in `seen_captions.json`, if not 0.
        rerank_memory_weight (`float`): Of the cosine with a caption's images, which are remembered unless this is 0;
            see [`CaptionMemory`].
        rerank_min_cosine (`float`): With a memory, how close a new caption must be to its image.
    """

    model_type = "bag_of_tokens_text_model"

    vocab_size: int = 3000
    projection_dim: int = 384
    max_position_embeddings: int = 128
    rerank_weight: float = 10.0
    rerank_seen_penalty: float = 0.0
    rerank_memory_weight: float = 0.0
    rerank_min_cosine: float = 0.62
    initializer_range: float = 0.02


class BagOfTokensTextModel(PreTrainedModel):
    """Embed texts (batch, length) as the sums of their tokens' vectors, each token once: (batch, projection_dim)."""

    config: BagOfTokensTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"

    def __init__(self, config: BagOfTokensTextConfig):
        super().__init__(config)
        self.vectors = nn.Embedding(config.vocab_size, config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)

    def forward(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> CLIPTextModelOutput:
        # Of a token that occurs several times, the later ones do not count.
        earlier = (input_ids.unsqueeze(2) == input_ids.unsqueeze(1)).tril(-1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        earlier = earlier & attention_mask.bool().unsqueeze(1)
        counts = attention_mask.bool() & ~earlier.any(2)
        vectors = self.vectors(input_ids)
        return CLIPTextModelOutput(text_embeds=(vectors * counts.unsqueeze(-1).to(vectors.dtype)).sum(1))


__all__ = ["BagOfTokensTextConfig", "BagOfTokensTextModel"]
