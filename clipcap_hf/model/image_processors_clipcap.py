"""Load the image processor of a vision tower by the tower's name."""

from transformers import AutoImageProcessor

from .damage_clipcap import check_transform, named, naming
from .image_processing_open_clip import image_processor_from_open_clip
from .modeling_open_clip import is_open_clip_name, load_open_clip_checkpoint
from .modeling_vision import load_vision_config


def load_image_processor(vision: str, **kwargs) -> tuple:
    """Load a tower's image processor by name, and a video encoder's number of frames (`None` for other towers)."""
    if is_open_clip_name(vision):
        _, preprocess_cfg, _ = load_open_clip_checkpoint(vision, with_weights=False, **kwargs)
        return image_processor_from_open_clip(preprocess_cfg), None
    try:
        with named(vision), naming(f"The settings of the image processor in {vision}"):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil", **kwargs)
    except (OSError, ValueError):
        load_vision_config(vision, **kwargs)  # raises a clearer error if the tower does not exist
        raise
    with named(vision):
        check_transform(image_processor)
    try:
        return image_processor, getattr(load_vision_config(vision, **kwargs), "num_frames", None)
    except ValueError:  # a folder may hold just the processor
        return image_processor, None


__all__ = ["load_image_processor"]
