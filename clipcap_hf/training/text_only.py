"""Text-only training (CapDec, Nukrai et al. 2022): text embeddings of CLIP stand in for image embeddings."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm


CAPDEC_NOISE = 0.016**0.5  # the variance that section 4 of the paper chose on COCO


def embed_captions(
    embed: Callable[[list[str]], torch.Tensor], captions: Sequence[str], batch_size: int = 256, progress: bool = True
) -> torch.Tensor:
    """Return normalised embeddings `(captions, clip_embed_dim)` of texts, on the CPU; equal texts are embedded once.

    Args:
        embed (`Callable`): See [`~clipcap_hf.clip.load_text_tower`].
        captions (`Sequence[str]`): The texts.
        batch_size (`int`): Texts per batch.
        progress (`bool`): Show a progress bar on standard error.
    """
    # Sorted by length, to reduce padding.
    unique = sorted(set(captions), key=len)
    place = {text: index for index, text in enumerate(unique)}
    starts = tqdm(range(0, len(unique), batch_size), unit="batch", desc="Embedding captions", disable=not progress)
    with torch.inference_mode():
        embeds = [F.normalize(embed(unique[start : start + batch_size]).float(), dim=-1).cpu() for start in starts]
    return torch.cat(embeds)[[place[text] for text in captions]]


def text_only_rows(captions: Sequence[Sequence[str]], embed: Callable[[list[str]], torch.Tensor], progress=True):
    """Make a data set with one row per caption: its text embedding `clip_embeds`, and `captions`.

    Train on it with noise on the embeddings (`CaptioningCollator(embeds_noise=...)`; CapDec uses [`CAPDEC_NOISE`]) and
    a captioner with `normalize_clip_embeds`, which can then caption image embeddings of the same CLIP.
    """
    from datasets import Dataset

    flat = [text for group in captions for text in group]
    return Dataset.from_dict({"clip_embeds": embed_captions(embed, flat, progress=progress).numpy(), "captions": flat})
