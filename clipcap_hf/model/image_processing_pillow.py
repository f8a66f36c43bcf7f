"""A vision tower's own image processor, computed by Pillow wherever a captioner's folder is loaded."""

from typing import Any

import transformers
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor

from .damage_clipcap import try_transform
from .image_processing_open_clip import OpenClipImageProcessor


TOWERS_TYPE = "towers_image_processor_type"


class PillowImageProcessor(PilBackend):
    r"""
    What `AutoImageProcessor` finds in a captioner's folder, and loads as the vision tower's own image processor.

    CLIP was trained with Pillow's resampling. By its own name, `AutoImageProcessor` would compute the tower's image
    processor by torchvision, whose pixels differ by up to 2/255 from those of [`ClipCapProcessor`].

    Example:

    ```python
    >>> from clipcap_hf import EMOJI_MINI
    >>> from transformers import AutoImageProcessor

    >>> type(AutoImageProcessor.from_pretrained(EMOJI_MINI)).__name__
    'CLIPImageProcessorPil'

    ```
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, backend: str = "pil", **kwargs):
        r"""
        Load the vision tower's own image processor.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder of a captioner.
            backend (`str`): `"pil"`, or `"torchvision"` for speed, at the price of other pixels.
            args, kwargs: As in transformers.

        Raises:
            ValueError: If this transformers does not have the tower's image processor.
        """
        settings, kwargs = cls.get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        name = settings.pop(TOWERS_TYPE)
        if (found := _class_named(name, backend)) is None:
            raise ValueError(f"transformers {transformers.__version__} has no image processor {name}: update it.")
        return found.from_dict({**settings, "image_processor_type": name}, **kwargs)


def load_saved_image_processor(name: str, settings: dict[str, Any], backend: str, **kwargs) -> BaseImageProcessor:
    """Load the image processor of a captioner's folder, whose processor has these `settings` for it."""
    kind = settings.get("image_processor_type")
    # Ours not by `AutoImageProcessor`: the classes may be unregistered where this file runs as remote code.
    if kind == OpenClipImageProcessor.__name__:
        image_processor = OpenClipImageProcessor.from_pretrained(name, **kwargs)
    elif kind == PillowImageProcessor.__name__:
        image_processor = PillowImageProcessor.from_pretrained(name, backend=backend, **kwargs)
    else:  # earlier versions saved its own name
        image_processor = AutoImageProcessor.from_pretrained(name, backend=backend, **kwargs)
    try_transform(image_processor)
    return image_processor


def image_processor_from_settings(settings: dict[str, Any]) -> BaseImageProcessor:
    """Make the image processor, computed by Pillow, that a video processor's settings are for; CLIP's by default.

    Raises:
        ValueError: If neither this transformers nor this package has a class of that name.
    """
    name = settings.get(TOWERS_TYPE, "CLIPImageProcessor")
    if name == OpenClipImageProcessor.__name__:
        found: type[BaseImageProcessor] | None = OpenClipImageProcessor
    else:
        found = _class_named(name, "pil") or _class_named(name, "torchvision")
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no image processor {name}: update it, or pass the vision "
            "tower's own image processor as `image_processor`."
        )
    return found(**{key: value for key, value in settings.items() if key in found.valid_kwargs.__annotations__})


def named_for_pillow(settings: dict[str, Any]) -> dict[str, Any]:
    """Name [`PillowImageProcessor`] in an image processor's settings, so that every reader computes by Pillow."""
    name = settings["image_processor_type"]
    if _class_named(name, "pil") is None:  # of open_clip, or of a tower with code of its own
        return settings
    return {**settings, "image_processor_type": PillowImageProcessor.__name__, TOWERS_TYPE: name}


def _class_named(name: str, backend: str) -> type[BaseImageProcessor] | None:
    return getattr(transformers, f"{name}Pil" if backend == "pil" else name, None)


__all__ = ["PillowImageProcessor"]
