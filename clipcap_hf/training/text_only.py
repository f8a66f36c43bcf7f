"""Text-only training (CapDec, Nukrai et al. 2022): text embeddings of CLIP stand in for image embeddings."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..model.modeling_open_clip import is_open_clip_name


CAPDEC_NOISE = 0.016**0.5  # the variance that section 4 of the paper chose on COCO


def load_text_tower(name: str, device: str | torch.device = "cpu") -> Callable[[list[str]], torch.Tensor]:
    """Return a function that embeds texts with the text tower of a CLIP, `(texts, clip_embed_dim)`.

    Args:
        name (`str`): The CLIP to which the captioner's vision tower belongs: a Hub id or folder of transformers (a
            whole CLIP, or a [`~transformers.CLIPTextModelWithProjection`]) or an open_clip name.
        device (`str` or `torch.device`): Where it runs.
    """
    if is_open_clip_name(name):
        return _open_clip_text_tower(name, device)
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

    config = AutoConfig.from_pretrained(name)
    if config.model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{name} is a `{config.model_type}`; the text tower must be a CLIP's.")
    text_config = getattr(config, "text_config", None) or config
    text_config.projection_dim = config.projection_dim  # a whole CLIP goes by its own
    model = CLIPTextModelWithProjection.from_pretrained(name, config=text_config).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)

    def embed(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return model(**{key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}).text_embeds

    return embed


def _open_clip_text_tower(name: str, device) -> Callable[[list[str]], torch.Tensor]:
    import open_clip

    if name.startswith("hf-hub:") or Path(name).is_dir():
        name, settings = name if name.startswith("hf-hub:") else f"local-dir:{name}", {}
    else:
        name, _, tag = name.partition("/")
        # The tag, not the architecture, says which activation its weights were trained with.
        quick_gelu = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False)
        settings = {"pretrained": tag, "force_quick_gelu": quick_gelu}
    model = open_clip.create_model(name, device=device, **settings).eval()
    tokenizer = open_clip.get_tokenizer(name)
    return lambda texts: model.encode_text(tokenizer(texts).to(device))


def embed_captions(
    embed: Callable[[list[str]], torch.Tensor], captions: Sequence[str], batch_size: int = 256, progress: bool = True
) -> torch.Tensor:
    """Return normalised embeddings `(captions, clip_embed_dim)` of texts, on the CPU; equal texts are embedded once.

    Args:
        embed (`Callable`): See [`load_text_tower`].
        captions (`Sequence[str]`): The texts.
        batch_size (`int`): Texts that go through the tower at once.
        progress (`bool`): Show a progress bar on standard error.
    """
    # In the order of length, so that little is padding.
    unique = sorted(set(captions), key=len)
    place = {text: index for index, text in enumerate(unique)}
    starts = tqdm(range(0, len(unique), batch_size), unit="batch", desc="Embedding captions", disable=not progress)
    with torch.inference_mode():
        embeds = [F.normalize(embed(unique[start : start + batch_size]).float(), dim=-1).cpu() for start in starts]
    return torch.cat(embeds)[[place[text] for text in captions]]


def text_only_rows(captions: Sequence[Sequence[str]], embed: Callable[[list[str]], torch.Tensor], progress=True):
    """Make a data set with one row per caption: its text embedding `clip_embeds`, and `captions`.

    Train on it with noise on the embeddings (`CaptioningCollator(embeds_noise=...)`, by default of CapDec
    [`CAPDEC_NOISE`]) and a captioner with `normalize_clip_embeds`, which then takes the image embeddings of the same
    CLIP.
    """
    from datasets import Dataset

    flat = [text for group in captions for text in group]
    return Dataset.from_dict({"clip_embeds": embed_captions(embed, flat, progress=progress).numpy(), "captions": flat})
