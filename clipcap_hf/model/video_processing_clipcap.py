"""Evenly spaced frames of videos, with the pixels that the image processor gives to images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .damage_clipcap import check_transform
from .image_processing_pillow import TOWERS_TYPE, image_processor_from_settings
from .images_clipcap import load_image
from .video_frames import list_videos, middle_frames, read_frames


_NOT_FOR_VIDEOS = ("image_processor_type", "auto_map")
_NOT_FOR_FRAMES = (
    *("num_frames", "fps", "do_sample_frames", "video_metadata", "return_metadata", "return_tensors", "timeout"),
)


class ClipCapVideoProcessorKwargs(VideosKwargs, total=False):
    r"""Arguments for the videos.

    timeout (`float`, *optional*):
        Seconds for the whole download of each URL; 30 by default.
    """

    timeout: int | float | None


class ClipCapVideoProcessor(BaseVideoProcessor):
    r"""
    Take evenly spaced frames of videos, and prepare each as the vision tower's image processor prepares an image.

    The image processor's settings are settings of the video processor, too, and are saved with it. The pixels are
    equal to the last bit, so that a video of one picture has the embedding of that picture.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`], *optional*): The vision tower's image processor. By
            default, it is made from the saved settings.
        num_frames (`int`): Number of frames taken from each video: the middle ones of as many equal parts. Shorter
            videos repeat frames.
        fps (`float`, *optional*): Number of frames taken from each second, in place of `num_frames`.
        do_sample_frames (`bool`): `False` takes all frames.
        kwargs: Settings of the image processor (`size`, `image_mean`, ...), where they differ for videos.

    Example:

    ```python
    >>> from PIL import Image
    >>> from clipcap_hf import ClipCapVideoProcessor

    >>> video_processor = ClipCapVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    >>> video = [Image.new("RGB", (40, 32), color) for color in ("red", "green", "blue")]
    >>> video_processor(video, num_frames=2, return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 2, 3, 32, 32])

    ```
    """

    valid_kwargs = ClipCapVideoProcessorKwargs  # type: ignore[assignment]  # as transformers' own video processors
    model_input_names = ["pixel_values"]
    num_frames = 8
    fps: int | float | None = None
    do_sample_frames = True

    def __init__(self, image_processor: BaseImageProcessor | None = None, **kwargs):
        settings = image_processor.to_dict() if image_processor is not None else {}
        if kwargs.get(TOWERS_TYPE) not in (None, settings.get("image_processor_type")) or image_processor is None:
            image_processor = image_processor_from_settings(kwargs)
            settings = image_processor.to_dict()
        kwargs = {TOWERS_TYPE: settings["image_processor_type"], **kwargs}
        kwargs.pop("video_processor_type", None)
        settings = {name: value for name, value in settings.items() if name not in _NOT_FOR_VIDEOS}
        # What an integer as `size` means.
        settings["default_to_square"] = image_processor.default_to_square
        super().__init__(**{**settings, **kwargs})
        self._image_processor = image_processor
        _check_num_frames(self.num_frames)
        check_transform(self)

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        r"""
        Prepare videos.

        Args:
            videos (list of frames, array (frames, height, width, 3), path, URL, or a list of them): One or several, in
                any form of [`~clipcap_hf.model.video_frames.read_frames`].
            kwargs: `num_frames`, `fps` and `do_sample_frames` as for the class, `video_metadata` (what `fps` needs to
                know of lists and arrays), `return_metadata` (`bool`), `return_tensors`, `timeout` (`float`, seconds
                for each URL), and arguments of the image processor.

        Returns:
            [`~transformers.BatchFeature`]: `pixel_values` (videos, frames, 3, height, width).

        Raises:
            ValueError: If a video cannot be read, or the videos would have unequal numbers of frames.
        """
        known = self.valid_kwargs.__annotations__
        validate_typed_dict(self.valid_kwargs, {name: kwargs[name] for name in known if name in kwargs})  # type: ignore
        asked = {name: kwargs.pop(name, None) for name in _NOT_FOR_FRAMES}
        if not (videos := list_videos(videos)):
            raise ValueError("Pass at least one video, got an empty list.")
        metadata: list[Any] = [None] * len(videos)
        if asked["video_metadata"] is not None:
            metadata = make_batched_metadata(videos, asked["video_metadata"])
        sample = self._sampling(asked["do_sample_frames"], asked["num_frames"], asked["fps"])
        read = [read_frames(video, sample, its, asked["timeout"]) for video, its in zip(videos, metadata)]
        counts = [len(frames) for frames, _ in read]
        if len(set(counts)) != 1:
            raise ValueError(f"The videos would have {counts} frames: pass `num_frames=`, or one video at a time.")
        pixel_values = self._pixels([frame for frames, _ in read for frame in frames], asked["timeout"], **kwargs)
        # Image processors of video models (VideoMAE) treat all frames as a single video.
        pixel_values = pixel_values.reshape(len(videos), counts[0], *pixel_values.shape[-3:])
        outputs: dict[str, Any] = {"pixel_values": pixel_values}
        if self.return_metadata if asked["return_metadata"] is None else asked["return_metadata"]:
            outputs["video_metadata"] = [metadata for _, metadata in read]
        return BatchFeature(outputs, tensor_type=asked["return_tensors"], skip_tensor_conversion=["video_metadata"])

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: int | float | None = None, **kwargs
    ) -> np.ndarray:
        """Choose the middle frames of equal parts of a video.

        Args:
            metadata (`VideoMetadata`): Of the video; `fps` needs the number of frames in a second.
            num_frames (`int`, *optional*): How many frames; by default the video processor's own number.
            fps (`int` or `float`, *optional*): How many frames of each second, in place of `num_frames`.

        Raises:
            ValueError: If both are given, a number is below 1, or the video's own frames in a second are not known.
        """
        if num_frames is not None and fps is not None:
            raise ValueError("`num_frames` and `fps` exclude each other: pass one of them.")
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    "`fps` needs to know the frames in a second of each video: pass `num_frames`, or "
                    "`video_metadata=[{'total_num_frames': ..., 'fps': ...}, ...]`."
                )
            num_frames = max(1, int(metadata.total_num_frames / metadata.fps * fps))
        num_frames = self.num_frames if num_frames is None else num_frames
        _check_num_frames(num_frames)
        return np.array(middle_frames(metadata.total_num_frames, num_frames))

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings.pop("_image_processor", None)
        return settings

    def _sampling(self, do_sample_frames: bool | None, num_frames: int | None, fps: int | float | None) -> Callable:
        if not (self.do_sample_frames if do_sample_frames is None else do_sample_frames):
            return _all_frames
        if num_frames is None and fps is None:
            num_frames, fps = (self.num_frames, None) if self.fps is None else (None, self.fps)
        return partial(self.sample_frames, num_frames=num_frames, fps=fps)

    def _pixels(self, frames: list, timeout: float | None, **kwargs) -> np.ndarray:
        images = [load_image(frame, timeout) for frame in frames]
        # The image processor's own settings, but for those that were changed for videos.
        for name in self._image_processor.valid_kwargs.__annotations__:
            if name in vars(self) and vars(self)[name] != getattr(self._image_processor, name, None):
                kwargs.setdefault(name, vars(self)[name])
        return self._image_processor(images, **{**kwargs, "return_tensors": "np"})["pixel_values"]


def _check_num_frames(num_frames: Any):
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"`num_frames` of a video must be a whole number above 0, got {str(num_frames)[:80]}.")


def _all_frames(metadata: VideoMetadata) -> range:
    return range(metadata.total_num_frames)


__all__ = ["ClipCapVideoProcessor"]
