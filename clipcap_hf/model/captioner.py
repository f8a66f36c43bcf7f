"""The public classes of a captioner, in the one module that checkpoints with code name.

transformers imports the remote code of a local folder once for each module that `auto_map` names. One module for all
classes keeps them in one namespace, so that the model's configuration is of the class that the model expects.
"""

from .configuration_clipcap import ClipCapConfig
from .image_processing_open_clip import OpenClipImageProcessor
from .image_processing_pillow import PillowImageProcessor
from .modeling_clipcap import ClipCapForConditionalGeneration, ClipCapModel
from .pipeline_clipcap import ImageCaptioningPipeline
from .processing_clipcap import ClipCapProcessor
from .video_processing_clipcap import ClipCapVideoProcessor


_PUBLIC_CLASSES = (
    ClipCapConfig,
    ClipCapModel,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ImageCaptioningPipeline,
    OpenClipImageProcessor,
    PillowImageProcessor,
    ClipCapVideoProcessor,
)

if __name__.startswith("transformers_modules."):
    # When remote code is saved again, transformers copies the module of each class and names it in `auto_map`.
    for _public_class in _PUBLIC_CLASSES:
        _public_class.__module__ = __name__


__all__ = [
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapModel",
    "ClipCapProcessor",
    "ClipCapVideoProcessor",
    "ImageCaptioningPipeline",
    "OpenClipImageProcessor",
    "PillowImageProcessor",
]
