"""Baselines for a captioner: the most common caption, and the caption of the nearest training image."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn import functional as F


MOST_COMMON = "most common caption"
NEAREST = "nearest training image"
BEFORE = "before training"


def most_common_caption(captions: Sequence[Sequence[str]]) -> str:
    """Return the most frequent first caption of the training images."""
    return Counter(texts[0] for texts in captions).most_common(1)[0][0]


def read_pooled(data, batch_size: int = 256) -> torch.Tensor:
    """Read the embeddings of a data set (images, clip_embed_dim); those of patches are averaged, batch by batch."""
    batches = data.select_columns("clip_embeds").with_format("torch").iter(batch_size)
    return torch.cat([_averaged(batch["clip_embeds"]) for batch in batches])


def nearest_images(
    embeds: torch.Tensor, train_embeds: torch.Tensor, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the training image nearest to each image.

    Args:
        embeds (`torch.Tensor` of shape `(images, clip_embed_dim)`): Embeddings of the images; those of patches,
            `(images, patches, clip_embed_dim)`, are averaged.
        train_embeds (`torch.Tensor` of shape `(training images, clip_embed_dim)`): Embeddings of the training images.
        batch_size (`int`): Images per batch.

    Returns:
        The index of the nearest training image of each image, and their cosine similarity, both of shape `(images,)`.
    """
    train_embeds = _pooled(train_embeds)
    found = [(_pooled(part) @ train_embeds.T).max(1) for part in embeds.split(batch_size)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def _pooled(embeds: torch.Tensor) -> torch.Tensor:
    return F.normalize(_averaged(embeds), dim=-1)


def _averaged(embeds: torch.Tensor) -> torch.Tensor:
    return embeds.float().mean(1) if embeds.ndim == 3 else embeds.float()
