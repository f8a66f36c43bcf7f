"""The public classes and functions, and their registration with transformers."""

from .model import versions_clipcap  # noqa: F401, I001  (first: it refuses releases that would fail later)
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
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # noqa: E402  (without torchvision, too)
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from .model.beam_search_clipcap import official_beam_search  # noqa: E402
from .model.configuration_clipcap import ClipCapConfig, OpenClipVisionConfig  # noqa: E402
from .model.configuration_detector import DetectorVisionConfig  # noqa: E402
from .model.hub_clipcap import add_code  # noqa: E402
from .model.image_processing_open_clip import OpenClipImageProcessor  # noqa: E402
from .model.image_processing_pillow import PillowImageProcessor  # noqa: E402
from .model.memory_clipcap import CaptionMemory  # noqa: E402
from .model.model_card_clipcap import write_model_card  # noqa: E402
from .model.modeling_clipcap import (  # noqa: E402
    ClipCapCausalLMOutputWithPast,
    ClipCapForConditionalGeneration,
    ClipCapModel,
    ClipCapModelOutputWithPast,
    ClipCapPreTrainedModel,
)
from .model.modeling_detector import DetectorVisionModel  # noqa: E402
from .model.modeling_open_clip import OpenClipVisionModel  # noqa: E402
from .model.pipeline_clipcap import ImageCaptioningPipeline  # noqa: E402
from .model.processing_clipcap import ClipCapProcessor  # noqa: E402
from .model.reranking_clipcap import CaptionReranker  # noqa: E402
from .model.video_processing_clipcap import ClipCapVideoProcessor  # noqa: E402
from .prepacking import prepack_weights  # noqa: E402
from .training.warm_start import warm_start_mapper  # noqa: E402


AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel)
# Under both names of backends, for `AutoImageProcessor` asks for torchvision's wherever that is installed.
for _config, _image_processor in (
    (OpenClipVisionConfig, OpenClipImageProcessor),
    (ClipCapConfig, PillowImageProcessor),
):
    _classes = dict.fromkeys(("pil", "torchvision"), _image_processor)
    AutoImageProcessor.register(_config, image_processor_classes=_classes)
AutoConfig.register(DetectorVisionConfig.model_type, DetectorVisionConfig)
AutoModel.register(DetectorVisionConfig, DetectorVisionModel)
AutoConfig.register(ClipCapConfig.model_type, ClipCapConfig)
AutoModel.register(ClipCapConfig, ClipCapModel)
for _auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(ClipCapConfig, ClipCapForConditionalGeneration)
AutoProcessor.register(ClipCapConfig, ClipCapProcessor)
AutoVideoProcessor.register(ClipCapConfig, ClipCapVideoProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning", pipeline_class=ImageCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)

__all__ = [
    "CaptionMemory",
    "CaptionReranker",
    "ClipCapCausalLMOutputWithPast",
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapModel",
    "ClipCapModelOutputWithPast",
    "ClipCapPreTrainedModel",
    "ClipCapProcessor",
    "ClipCapVideoProcessor",
    "DetectorVisionConfig",
    "DetectorVisionModel",
    "ImageCaptioningPipeline",
    "OpenClipImageProcessor",
    "OpenClipVisionConfig",
    "OpenClipVisionModel",
    "PillowImageProcessor",
    "add_code",
    "official_beam_search",
    "prepack_weights",
    "warm_start_mapper",
    "write_model_card",
]
