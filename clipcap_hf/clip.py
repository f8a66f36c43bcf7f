"""Load a CLIP by its name: its image tower and its text tower."""

from collections.abc import Callable
from pathlib import Path

import torch

from .assets import resolve
from .model.modeling_open_clip import is_open_clip_name
from .model.modeling_vision import load_vision_tower
from .model.processing_clipcap import load_image_processor
from .sources import vision_source


def load_tower(name: str, vision_feature: str = "pooled"):
    """Load an image tower, in float32, and its image processor.

    Args:
        name (`str`): As in [`ClipCapForConditionalGeneration.from_vision_text_pretrained`], or a captioner, whose
            tower is used.
        vision_feature (`str`): `"pooled"` or `"patches"`, as in [`ClipCapConfig`].
    """
    tower, image_processor = vision_source(name)
    if not isinstance(tower, str):
        return tower, image_processor
    return load_vision_tower(tower, torch.float32, vision_feature), load_image_processor(tower)[0]


def load_text_tower(name: str, device: str | torch.device = "cpu") -> Callable[[list[str]], torch.Tensor]:
    """Load the text tower of a CLIP, as a function from texts to embeddings `(texts, clip_embed_dim)`.

    Args:
        name (`str`): The CLIP to which the captioner's vision tower belongs: a Hub id or folder of transformers (a
            complete CLIP or a [`~transformers.CLIPTextModelWithProjection`]), or an open_clip name.
        device (`str` or `torch.device`): The device to run on.
    """
    name = resolve(name)
    if is_open_clip_name(name):
        return _open_clip_text_tower(name, device)
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{name} is a `{config.model_type}`; the text tower must be a CLIP's.")
    text_config = getattr(config, "text_config", None) or config
    text_config.projection_dim = config.projection_dim  # in a complete CLIP, the outer value counts
    model = CLIPTextModelWithProjection.from_pretrained(name, config=text_config).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)

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
