"""The text tower of a CLIP, which embeds texts into the space of its image embeddings."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    MetaClip2TextModelWithProjection,
    PreTrainedConfig,
    Siglip2TextModel,
    SiglipTextModel,
)
from transformers.utils import cached_file

from .bag_of_tokens_clipcap import BagOfTokensTextConfig, BagOfTokensTextModel
from .checkpoints_open_clip import is_open_clip_name
from .damage_clipcap import load_config, naming
from .memory_clipcap import DEFAULT_MIN_COSINE, SEEN_CAPTIONS, SEEN_IMAGES, CaptionMemory


# By the type of a complete model or of the tower alone.
_TEXT_TOWERS: dict[str, Any] = {
    "clip": CLIPTextModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
    "metaclip_2": MetaClip2TextModelWithProjection,
    "metaclip_2_text_model": MetaClip2TextModelWithProjection,
    "siglip": SiglipTextModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2": Siglip2TextModel,
    "siglip2_text_model": Siglip2TextModel,
    BagOfTokensTextConfig.model_type: BagOfTokensTextModel,
}


@dataclass
class TextTower:
    """
    Embed texts into the space of a CLIP's image embeddings: `tower(["a cat"])` is `(texts, embed_dim)`.

    Args:
        name (`str`): Where it was loaded from.
        model (`torch.nn.Module`): The network.
        embed (`callable`): From a list of texts to their embeddings, on the network's device.
        config ([`~transformers.PreTrainedConfig`], *optional*): Of a tower of transformers.
        has_vision_tower (`bool`): Whether the checkpoint is a complete CLIP.
        seen_captions (`frozenset[str]`): Captions that it was trained on, if its checkpoint lists them.
        memory ([`CaptionMemory`], *optional*): Their images, if its checkpoint has them.
    """

    name: str
    model: nn.Module
    embed: Callable[[list[str], torch.device], torch.Tensor]
    config: PreTrainedConfig | None = None
    has_vision_tower: bool = True
    seen_captions: frozenset[str] = field(default=frozenset(), repr=False)
    memory: CaptionMemory | None = field(default=None, repr=False)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.embed(list(texts), next(self.model.parameters()).device)

    def to(self, device: str | torch.device) -> "TextTower":
        self.model.to(device)
        return self


def load_text_tower(
    name: str | os.PathLike, device: str | torch.device = "cpu", tokenizer=None, **hub_kwargs: Any
) -> TextTower:
    """Load the text tower of a CLIP, in float32.

    Args:
        name (`str`): The CLIP to which the captioner's vision tower belongs: a Hub id or folder of transformers (a
            complete CLIP, SigLIP, SigLIP 2 or MetaCLIP 2, or its text tower alone), or an open_clip name.
        device (`str` or `torch.device`): The device to run on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): For a tower that shares the tokenizer of
            its captioner; each text then ends with its end token.
        hub_kwargs: `revision`, `token`, `subfolder`, ...

    Raises:
        ValueError: If it is no such model, or its text tower is not in the checkpoint.
    """
    name = os.fspath(name)
    if tokenizer is None and is_open_clip_name(name):
        return _load_open_clip_text_tower(name).to(device)
    # The name may be of any repository: code from it is never run.
    hub_kwargs["trust_remote_code"] = False
    config = _load_config(name, hub_kwargs)
    if (tower_class := _TEXT_TOWERS.get(config.model_type)) is None:
        raise ValueError(
            f"{name} is a `{config.model_type}`; the text tower must be a CLIP's (of transformers or open_clip), a "
            "SigLIP's, a SigLIP 2's or a MetaCLIP 2's."
        )
    text_config = getattr(config, "text_config", None) or config
    if hasattr(config, "projection_dim"):
        text_config.projection_dim = config.projection_dim  # in a complete CLIP, the outer value counts
    with naming(f"The weights in {name}"):
        model, info = tower_class.from_pretrained(
            name, config=text_config, dtype=torch.float32, output_loading_info=True, **hub_kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} has no text tower: {len(missing)} of its weights are missing, such as {missing[0]}.")
    own_tokenizer = tokenizer is None
    if own_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs)
    end = "" if own_tokenizer else tokenizer.eos_token
    # SigLIP was trained on texts padded to its length and reads the last position.
    padding = "max_length" if "siglip" in text_config.model_type else True

    def embed(texts: list[str], device: torch.device) -> torch.Tensor:
        inputs = tokenizer(
            [text + end for text in texts],
            padding=padding,
            padding_side="right",
            truncation=True,
            max_length=text_config.max_position_embeddings,
            return_tensors="pt",
        )
        names = ["input_ids"] if padding == "max_length" else ["input_ids", "attention_mask"]
        outputs = model(**{key: inputs[key].to(device) for key in names})
        return outputs.get("text_embeds", outputs.get("pooler_output"))

    has_vision_tower = getattr(config, "vision_config", None) is not None
    penalty, weight = (getattr(text_config, f"rerank_{key}", 0) for key in ("seen_penalty", "memory_weight"))
    del hub_kwargs["trust_remote_code"]
    seen = _load_seen_captions(name, hub_kwargs) if penalty or weight else []
    memory = None
    if weight:
        settings = {"weight": weight, "min_cosine": getattr(text_config, "rerank_min_cosine", DEFAULT_MIN_COSINE)}
        memory = CaptionMemory.load(cached_file(name, SEEN_IMAGES, **hub_kwargs), seen, **settings)
    return TextTower(name, model.eval(), embed, text_config, has_vision_tower, frozenset(seen), memory).to(device)


def _load_seen_captions(name: str, hub_kwargs: dict[str, Any]) -> list[str]:
    path = cached_file(name, SEEN_CAPTIONS, **hub_kwargs)
    try:
        captions = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        captions = None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path} must be a JSON list of captions: copy it again from where it came from.")
    return captions


def _load_config(name: str, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    found, _ = PreTrainedConfig.get_config_dict(name, **hub_kwargs)
    if found.get("model_type") == BagOfTokensTextConfig.model_type:  # transformers does not know it
        return BagOfTokensTextConfig.from_dict(found)
    return load_config(name, **hub_kwargs)


def _load_open_clip_text_tower(name: str) -> TextTower:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{name} needs open_clip for its text tower: `pip install open_clip_torch`.") from error

    if name.startswith("hf-hub:") or Path(name).is_dir():
        model_name, settings = name if name.startswith("hf-hub:") else f"local-dir:{name}", {}
    else:
        model_name, _, tag = name.partition("/")
        # The tag, not the architecture, says which activation its weights were trained with.
        quick_gelu = (open_clip.get_pretrained_cfg(model_name, tag) or {}).get("quick_gelu", False)
        settings = {"pretrained": tag, "force_quick_gelu": quick_gelu}
    try:
        model = open_clip.create_model(model_name, **settings).eval()
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"{name} has no text tower that open_clip can load ({str(error)[:200]}).") from error
    tokenizer = open_clip.get_tokenizer(model_name)
    model.visual = None  # the captioner has it
    return TextTower(name, model, lambda texts, device: model.encode_text(tokenizer(texts).to(device)))


__all__ = ["TextTower", "load_text_tower"]
