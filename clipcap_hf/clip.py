"""Load a CLIP by its name: its image tower and its text tower."""

import torch

from .assets import resolve
from .model import text_tower_clipcap
from .model.image_processors_clipcap import load_image_processor
from .model.modeling_vision import load_vision_tower
from .model.text_tower_clipcap import TextTower
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


def load_text_tower(name: str, device: str | torch.device = "cpu") -> TextTower:
    """Load the text tower of a CLIP; `name` as in [`~clipcap_hf.model.text_tower_clipcap.load_text_tower`]."""
    return text_tower_clipcap.load_text_tower(resolve(name), device)
