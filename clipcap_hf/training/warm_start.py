"""Initialise the mapping network of a frozen language model, so that the prefix resembles known words."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.modeling_mapping import ClipCapMLPMappingNetwork
from ..model.processing_clipcap import ClipCapProcessor


def warm_start_mapper(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    clip_embeds: torch.Tensor,
    captions: Sequence[str],
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    common: float = 0.1,
    seed: int = 0,
) -> list[float]:
    r"""
    Train the prefix to match the language model's embeddings of caption words, before the actual training.

    A frozen language model cannot use prefix vectors that differ much from its token embeddings, and its gradient is
    of little help until they are similar. Only the embedding table is used, so a step is far cheaper than a training
    step. The targets of an image are the first `prefix_length` informative tokens of its caption; the last one is
    repeated if there are fewer. They are weighted by their rarity in the captions (the logarithm of the inverse
    document frequency), in any language. Only the mapping network changes. The first layer of `"mlp"` is scaled to the
    embeddings, and the last layer of `"mlp"` and `"linear"` to the deviation of the token embeddings.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner, with a new mapping network.
        processor ([`ClipCapProcessor`]): Its processor.
        clip_embeds (`torch.Tensor` of shape `(images, clip_embed_dim)`): Embeddings of the images, or of patches
            `(images, patches, clip_embed_dim)`, see [`~ClipCapForConditionalGeneration.get_clip_embeds`].
        captions (`Sequence[str]`): One caption per image.
        steps (`int`): Number of regression steps.
        batch_size (`int`): Images per step.
        learning_rate (`float`): Learning rate of AdamW, which falls linearly to 0.
        common (`float`): Leave out tokens in more than this share of captions (articles, the full stop), unless a
            caption has no others.
        seed (`int`): Seed for drawing the batches.

    Returns:
        `list[float]`: The loss of each step: the squared error over the variance of the token embeddings. A prefix
        that is the same for all images has a loss of about 1.

    Raises:
        ValueError: If there are not as many captions as embeddings, or none, or a caption is empty.
    """
    if len(captions) != len(clip_embeds) or not len(captions):
        raise ValueError(f"Each embedding needs one caption: got {len(clip_embeds)} and {len(captions)}.")
    token_ids, weights = _targets(processor.tokenizer, captions, model.config.prefix_length, common)
    mapper = model.mapping_network
    device = next(mapper.parameters()).device
    embedding: Any = model.get_input_embeddings()
    table = embedding.weight.detach().float()
    used = table[token_ids.unique().to(table.device)]
    variance = used.var().to(device)

    _scale_layers(model, clip_embeds[:1024], used.std().item())
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(captions), (batch_size,), generator=generator)
        target = table[token_ids[rows].to(table.device)].to(device)
        weight = weights[rows].to(device)
        error = (model._map(clip_embeds[rows]).float() - target).square().mean(-1)
        loss = (weight * error).sum() / weight.sum() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def _targets(tokenizer, captions: Sequence[str], length: int, common: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and weights (captions, length) that the prefix of each caption should match."""
    tokenized = tokenizer(list(captions), add_special_tokens=False)["input_ids"]
    if not all(tokenized):
        raise ValueError(f"Caption {tokenized.index([])} is empty.")
    frequency = Counter(token for ids in tokenized for token in set(ids))
    targets = []
    for ids in tokenized:
        telling = [token for token in ids if frequency[token] <= common * len(captions)]
        telling = (telling or [min(ids, key=lambda token: frequency[token])])[:length]
        targets.append(telling + telling[-1:] * (length - len(telling)))
    token_ids = torch.tensor(targets)
    counts = torch.zeros(int(token_ids.max()) + 1)
    for token, count in frequency.items():
        if token < len(counts):
            counts[token] = count
    # 1 +, since the logarithm is 0 for tokens that are in all captions.
    return token_ids, 1 + torch.log(len(captions) / counts[token_ids])


@torch.no_grad()
def _scale_layers(model: ClipCapForConditionalGeneration, clip_embeds: torch.Tensor, deviation: float):
    """Scale the hidden layer to a deviation of about 1, and the prefix to that of token embeddings."""
    mapper, mapping_type = model.mapping_network, model.config.mapping_type
    if isinstance(mapper, ClipCapMLPMappingNetwork):
        if model.config.normalize_clip_embeds:
            clip_embeds = F.normalize(clip_embeds, dim=-1)
        hidden = mapper.fc1(clip_embeds.to(mapper.fc1.weight.device, mapper.fc1.weight.dtype))
        if len(hidden) > 1:
            mapper.fc1.weight /= hidden.std(0).mean().clamp(min=1e-6)
    last = {"mlp": "fc2", "linear": "linear"}.get(mapping_type)
    if last is not None:
        scale = deviation / model._map(clip_embeds).std().clamp(min=1e-6)
        getattr(mapper, last).weight *= scale
        getattr(mapper, last).bias *= scale


__all__ = ["warm_start_mapper"]
