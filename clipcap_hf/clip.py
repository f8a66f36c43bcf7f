"""Load a CLIP by its name: its image tower and its text tower."""

import torch

from .model.image_processors_clipcap import load_image_processor
from .model.modeling_vision import load_vision_tower
from .model.text_tower_clipcap import load_text_tower


def load_tower(name: str, vision_feature: str = "pooled"):
    """Load an image tower, in float32, and its image processor.

    Args:
        name (`str`): As in [`ClipCapForConditionalGeneration.from_vision_text_pretrained`].
        vision_feature (`str`): `"pooled"` or `"patches"`, as in [`ClipCapConfig`].
    """
    return load_vision_tower(name, torch.float32, vision_feature), load_image_processor(name)[0]


__all__ = ["load_text_tower", "load_tower"]
