"""A bit-exact copy of open_clip's evaluation transform."""

from typing import Literal

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .damage_clipcap import check_transform
from .images_clipcap import to_rgb


class OpenClipImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    Arguments of open_clip's transform.

    resize_mode (`str`):
        `"shortest"`: scale until the image covers the target, then crop its centre. `"longest"`: scale until it fits
        into the target, then pad. `"squash"`: scale both sides to the target's.
    fill_color (`int`):
        Grey value of the padding, 0 to 255.
    """

    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: int


class OpenClipImageProcessor(PilBackend):
    r"""
    Prepare images as open_clip's `image_transform(..., is_train=False)` does, equal to the last bit.

    [`~transformers.CLIPImageProcessorPil`] differs: it crops another pixel when the margin is odd (it rounds half the
    margin down, torchvision rounds it to even), normalises differently in the last bit, and supports neither
    `"longest"` nor targets that are not square. Images become RGB before resizing, as in open_clip's training.

    Args:
        size (`dict`): `{"height": int, "width": int}` of the output, in pixels.
        resize_mode (`str`): `"shortest"`, `"longest"` or `"squash"`, as in open_clip's `preprocess_cfg`.
        fill_color (`int`): Grey value of the padding for `"longest"`.
        resample (`PIL.Image.Resampling`): Bicubic or bilinear. As in open_clip, `"shortest"` with a target that is not
            square is always bicubic.
        image_mean (`list[float]`): Mean of each channel for the normalisation, for values in [0, 1].
        image_std (`list[float]`): Standard deviation of each channel, likewise.

    Example:

    ```python
    >>> from PIL import Image
    >>> from clipcap_hf import OpenClipImageProcessor

    >>> image_processor = OpenClipImageProcessor(size={"height": 32, "width": 32}, resize_mode="longest")
    >>> image_processor(Image.new("RGB", (50, 41)), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 32, 32])

    ```
    """

    valid_kwargs = OpenClipImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 224, "width": 224}
    resize_mode = "shortest"
    fill_color = 0
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        check_transform(self)

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        return super().process_image(to_rgb(image) if isinstance(image, Image.Image) else image, *args, **kwargs)

    def _preprocess(  # type: ignore[override]  # `**kwargs` takes the arguments that are not used here
        self,
        images: list[np.ndarray],
        do_resize,
        size,
        resample,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        return_tensors,
        resize_mode,
        fill_color,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_resize:
                picture = to_pil_image(image, input_data_format=ChannelDimension.FIRST)
                picture = _resize(picture, (size.height, size.width), resize_mode, resample)
                picture = _center_crop_or_pad(picture, (size.height, size.width), fill_color)
                image = np.moveaxis(np.asarray(picture), -1, 0)
            if do_rescale:
                # Divide, like torchvision: multiplying by 1/255 changes the last bit.
                image = image.astype(np.float32) / np.float32(round(1 / rescale_factor))
            if do_normalize:
                image = image - np.asarray(image_mean, np.float32).reshape(-1, 1, 1)
                image = image / np.asarray(image_std, np.float32).reshape(-1, 1, 1)
            processed.append(image)
        return BatchFeature({"pixel_values": processed}, tensor_type=return_tensors)


def _resize(image: Image.Image, target: tuple[int, int], resize_mode: str, resample: int) -> Image.Image:
    width, height = image.size
    target_height, target_width = target
    if resize_mode == "squash":
        new = (target_width, target_height)
    elif resize_mode == "shortest" and target_height == target_width:
        # torchvision's rule for a single size: round the long side down.
        short, long = sorted(image.size)
        new_long = int(target_width * long / short)
        new = (target_width, new_long) if width <= height else (new_long, target_width)
    else:
        choose = max if resize_mode == "longest" else min
        ratio = choose(height / target_height, width / target_width)
        new = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        if resize_mode == "shortest":
            resample = PILImageResampling.BICUBIC
    return image if new == image.size else image.resize(new, resample)


def _center_crop_or_pad(image: Image.Image, target: tuple[int, int], fill_color: int) -> Image.Image:
    target_height, target_width = target
    missing = max(0, target_width - image.width), max(0, target_height - image.height)
    if any(missing):
        padded = Image.new("RGB", (image.width + missing[0], image.height + missing[1]), (fill_color,) * 3)
        padded.paste(image, (missing[0] // 2, missing[1] // 2))
        image = padded
    # Python rounds halves to even, like torchvision.
    left, top = round((image.width - target_width) / 2), round((image.height - target_height) / 2)
    return image.crop((left, top, left + target_width, top + target_height))


def image_processor_from_open_clip(preprocess_cfg: dict) -> OpenClipImageProcessor:
    """Make the image processor for a `preprocess_cfg` of open_clip.

    Raises:
        ValueError: If `mode`, `resize_mode` or `interpolation` is unknown to open_clip, or `std` is not positive.
    """
    size = preprocess_cfg.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else (size * 2 if len(size) == 1 else size)
    resize_mode = preprocess_cfg.get("resize_mode") or "shortest"
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    # "random" only matters in training.
    resample = {
        "bicubic": PILImageResampling.BICUBIC,
        "bilinear": PILImageResampling.BILINEAR,
        "random": PILImageResampling.BICUBIC,
    }
    for name, value, known in (
        ("mode", preprocess_cfg.get("mode", "RGB"), ("RGB",)),
        ("resize_mode", resize_mode, ("shortest", "longest", "squash")),
        ("interpolation", interpolation, tuple(resample)),
    ):
        if value not in known:
            raise ValueError(f"open_clip's `preprocess_cfg` has {name} {value!r}; known are {', '.join(known)}.")
    mean = preprocess_cfg.get("mean")
    std = preprocess_cfg.get("std")
    mean = OPENAI_CLIP_MEAN if mean is None else mean
    std = OPENAI_CLIP_STD if std is None else std
    return OpenClipImageProcessor(
        size={"height": height, "width": width},
        resize_mode=resize_mode,
        fill_color=preprocess_cfg.get("fill_color", 0),
        resample=resample[interpolation],
        image_mean=list(mean) if isinstance(mean, (list, tuple)) else [mean] * 3,
        image_std=list(std) if isinstance(std, (list, tuple)) else [std] * 3,
    )


__all__ = ["OpenClipImageProcessor"]
