import json

import numpy as np
import open_clip
import pytest
import torch
from clipcap_hf import ClipCapProcessor, OpenClipImageProcessor
from clipcap_hf.model.image_processing_open_clip import image_processor_from_open_clip, to_rgb
from clipcap_hf.model.modeling_open_clip import load_open_clip_checkpoint
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessorPil


SIZES = [(64, 64), (50, 40), (40, 50), (50, 41), (41, 50), (300, 33), (20, 25), (33, 32), (31, 32), (1, 7), (213, 160)]
OBLONG = {"size": (24, 40), "fill_color": 127, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def open_clip_pixels(preprocess_cfg, image):
    return image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)(image)


def our_pixels(image_processor, image):
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("target", [{"size": 32}, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_every_mode_is_that_of_open_clip_to_the_last_bit(resize_mode, interpolation, target):
    preprocess_cfg = {**target, "resize_mode": resize_mode, "interpolation": interpolation}
    image_processor = image_processor_from_open_clip(preprocess_cfg)
    for size in SIZES:
        image = noise(*size)
        assert torch.equal(our_pixels(image_processor, image), open_clip_pixels(preprocess_cfg, image)), size


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "I;16", "F"])
def test_images_of_every_mode(mode):
    image = noise(50, 41)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "LA":
        image = image.convert("L").convert("LA")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    # open_clip converts training images to RGB before its transform, so ours only resizes RGB.
    expected = open_clip_pixels({"size": 32}, to_rgb(image))
    assert torch.equal(our_pixels(image_processor_from_open_clip({"size": 32}), image), expected)


def test_arrays_and_batches():
    image_processor = image_processor_from_open_clip({"size": 32})
    images = [noise(50, 41), noise(33, 70, seed=1)]
    expected = torch.stack([open_clip_pixels({"size": 32}, image) for image in images])
    assert torch.equal(image_processor(images, return_tensors="pt")["pixel_values"], expected)
    arrays = [np.asarray(image) for image in images]
    assert torch.equal(image_processor(arrays, return_tensors="pt")["pixel_values"], expected)
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    assert torch.equal(image_processor(tensors, return_tensors="pt")["pixel_values"], expected)


def test_processors_of_transformers_differ_by_the_odd_margin_only():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for size in SIZES:
        image = noise(*size)
        expected = open_clip_pixels({"size": 32}, image)
        margin = int(32 * max(size) / min(size)) - 32
        # Half of 7 is 3 for transformers and 4 for torchvision; half of 9 is 4 for both.
        same = torch.allclose(our_pixels(clip, image), expected, rtol=0, atol=5e-7)
        assert same == (margin % 4 != 3), (size, margin)


def test_unknown_fields():
    for name, value in (("resize_mode", "crop"), ("interpolation", "nearest"), ("mode", "L")):
        with pytest.raises(ValueError, match=f"`preprocess_cfg` has {name} '{value}'; known are"):
            image_processor_from_open_clip({"size": 32, name: value})


def test_saving(tmp_path, tokenizer):
    preprocess_cfg = {**OBLONG, "resize_mode": "longest"}
    processor = ClipCapProcessor(image_processor_from_open_clip(preprocess_cfg), tokenizer, prefix_length=4)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert stored["image_processor_type"] == "OpenClipImageProcessor" and stored["resize_mode"] == "longest"
    image = noise(50, 41)
    for again in (ClipCapProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again.image_processor) is OpenClipImageProcessor
        assert torch.equal(our_pixels(again.image_processor, image), open_clip_pixels(preprocess_cfg, image))
    processor.image_processor.save_pretrained(tmp_path / "alone")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "alone")) is OpenClipImageProcessor


def test_transform_of_every_pretrained_model():
    """The image processor follows the preprocessing of open_clip's tags."""
    image = noise(57, 40)
    for architecture, tag in open_clip.list_pretrained():
        model_cfg, preprocess_cfg, _ = load_open_clip_checkpoint(f"{architecture}/{tag}", with_weights=False)
        pretrained_cfg = open_clip.get_pretrained_cfg(architecture, tag)
        fields = ("mean", "std", "interpolation", "resize_mode")
        expected = {name: pretrained_cfg[name] for name in fields if pretrained_cfg.get(name)}
        expected["size"] = 32
        assert preprocess_cfg["size"] == model_cfg["vision_cfg"]["image_size"]
        image_processor = image_processor_from_open_clip({**preprocess_cfg, "size": 32})
        assert torch.equal(our_pixels(image_processor, image), open_clip_pixels(expected, image)), (architecture, tag)


@pytest.mark.parametrize("std", [0, 0.0, -1, float("nan"), float("inf"), [0.2, 0, 0.2]])
def test_standard_deviations_that_give_no_pixels(std):
    with pytest.raises(ValueError, match="`image_std` must be positive"):
        image_processor_from_open_clip({"size": 32, "std": std})
    with pytest.raises(ValueError, match="`image_std` must be positive"):
        OpenClipImageProcessor(image_std=std if isinstance(std, list) else [std] * 3)
