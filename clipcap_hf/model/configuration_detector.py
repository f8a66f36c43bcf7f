"""Configuration of the vision tower that is an object detector."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .colors_detector import COLORS, GROUNDS


@strict
class DetectorVisionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DetectorVisionModel`].

    Args:
        num_classes (`int`): Number of classes of objects.
        width (`int`): Channels after the first convolution. Each stage doubles them.
        depths (`tuple[int, ...]`): Number of blocks in each stage. The head reads the last three stages.
        neck_width (`int`): Channels of the neck and the head.
        num_bins (`int`): Number of bins of the distance between a location and an edge of its box, in strides.
        candidate_threshold (`float`): Boxes below this score of the detector are not looked at.
        score_threshold (`float`): Boxes below this score are not counted, the classifier's support included.
        iou_threshold (`float`): Of two boxes that overlap more, the one with the lower score is dropped.
        max_detections (`int`): Number of boxes per image, those with the highest scores, that are looked at.
        image_size (`int`): Side in pixels of the images that the detector was trained with.
        classifier (`str`, *optional*): Name of an image classifier in timm that supports the detector.
        num_classifier_classes (`int`): Number of its classes.
        classifier_size (`int`): Side in pixels of the images that it was trained with.
        classifier_weight (`float`): How far it can raise the score of a box, from 0 (not at all) to 1.
        num_scenes (`int`): Number of scenes that are read off its classes.
        use_colors (`bool`): Whether the embedding also holds the colours of the ground and of the main thing.

    Example:

    ```python
    >>> from clipcap_hf import DetectorVisionConfig

    >>> DetectorVisionConfig().hidden_size  # score, count and size of 80 classes
    240

    ```
    """

    model_type = "detector_vision_model"
    base_config_key = "vision_config"

    num_classes: int = 80
    width: int = 32
    depths: tuple[int, ...] | list[int] = (1, 2, 2, 3)
    neck_width: int = 128
    num_bins: int = 11
    candidate_threshold: float = 0.2
    score_threshold: float = 0.3
    iou_threshold: float = 0.55
    max_detections: int = 100
    image_size: int = 416
    classifier: str | None = None
    num_classifier_classes: int = 1000
    classifier_size: int = 224
    classifier_weight: float = 0.7
    num_scenes: int = 0
    use_colors: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.depths) < 3:
            raise ValueError(f"`depths` must name at least 3 stages, got {self.depths}.")
        for name in ("candidate_threshold", "score_threshold", "iou_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.classifier_weight <= 1:
            raise ValueError(f"`classifier_weight` must be from 0 to 1, got {self.classifier_weight}.")
        if self.num_scenes and not self.classifier:
            raise ValueError(f"`num_scenes` must be 0 without a `classifier` to read them off, got {self.num_scenes}.")

    @property
    def hidden_size(self) -> int:
        return 3 * self.num_classes + self.num_scenes + (len(GROUNDS) + len(COLORS) if self.use_colors else 0)


__all__ = ["DetectorVisionConfig"]
