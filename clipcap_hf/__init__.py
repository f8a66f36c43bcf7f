"""Hugging Face-native ClipCap: image captioning by a CLIP prefix (Mokady et al. 2021)."""

from .model import versions_clipcap  # noqa: F401, I001  (first: it refuses releases that would fail further on)
from ._torchvision import ensure_torchvision_imports


ensure_torchvision_imports()  # transformers imports torchvision wherever it is installed

from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from .assets import EMOJI_MINI, PHOTO_MINI  # noqa: E402
from .model.configuration_clipcap import ClipCapConfig, OpenClipVisionConfig  # noqa: E402
from .model.generation_clipcap import official_beam_search  # noqa: E402
from .model.hub_clipcap import add_code  # noqa: E402
from .model.image_processing_open_clip import OpenClipImageProcessor  # noqa: E402
from .model.model_card_clipcap import write_model_card  # noqa: E402
from .model.modeling_clipcap import ClipCapForConditionalGeneration  # noqa: E402
from .model.modeling_conse import ConseVisionConfig, ConseVisionModel  # noqa: E402
from .model.modeling_open_clip import OpenClipVisionModel  # noqa: E402
from .model.pipeline_clipcap import ImageCaptioningPipeline  # noqa: E402
from .model.processing_clipcap import ClipCapProcessor  # noqa: E402
from .training.warm_start import warm_start_mapper  # noqa: E402


__version__ = "0.2.0"

AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel)
AutoImageProcessor.register(OpenClipVisionConfig, image_processor_classes={"pil": OpenClipImageProcessor})
AutoConfig.register(ConseVisionConfig.model_type, ConseVisionConfig)
AutoModel.register(ConseVisionConfig, ConseVisionModel)
AutoConfig.register(ClipCapConfig.model_type, ClipCapConfig)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(ClipCapConfig, ClipCapForConditionalGeneration)
AutoProcessor.register(ClipCapConfig, ClipCapProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning", pipeline_class=ImageCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)

# transformers' Trainer takes seconds to import.
_LAZY = {"CaptioningCollator": "training.collator", "ClipCapTrainer": "training.trainer"}


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EMOJI_MINI",
    "CaptioningCollator",
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapProcessor",
    "ClipCapTrainer",
    "ImageCaptioningPipeline",
    "OpenClipImageProcessor",
    "ConseVisionConfig",
    "ConseVisionModel",
    "OpenClipVisionConfig",
    "OpenClipVisionModel",
    "PHOTO_MINI",
    "add_code",
    "official_beam_search",
    "warm_start_mapper",
    "write_model_card",
]
