"""Configuration of the vision tower that is an object detector."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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
        score_threshold (`float`): Boxes below this score are not counted.
        iou_threshold (`float`): Of two boxes of a class that overlap more, the one with the lower score is dropped.
        max_detections (`int`): Number of boxes per image, those with the highest scores, that are looked at.
        image_size (`int`): Side in pixels of the images that the detector was trained with.

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
    score_threshold: float = 0.3
    iou_threshold: float = 0.5
    max_detections: int = 50
    image_size: int = 416
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.depths) < 3:
            raise ValueError(f"`depths` must name at least 3 stages, got {self.depths}.")
        for name in ("score_threshold", "iou_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")

    @property
    def hidden_size(self) -> int:
        return 3 * self.num_classes


__all__ = ["DetectorVisionConfig"]
