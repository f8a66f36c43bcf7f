"""`AutoImageProcessor` on a captioner's folder gives the pixels of its processor."""

import json

import numpy as np
import pytest
import torch
from clipcap_hf import EMOJI_MINI, PHOTO_MINI, ClipCapProcessor, OpenClipImageProcessor, add_code
from hub_client import WITHOUT_PACKAGE, run_client
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)


SIZES = [(40, 60), (224, 224), (333, 500), (700, 301), (33, 900), (128, 128), (129, 127)]
MODES = ["L", "RGBA", "P", "CMYK", "1", "LA"]


def pictures():
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]
    return noise + [noise[2].convert("L").convert(mode) if mode == "LA" else noise[2].convert(mode) for mode in MODES]


def assert_same_pixels(image_processor, processor):
    for picture in pictures():
        if not image_processor.do_convert_rgb:  # ViT's, for example, takes RGB only when it is alone
            picture = picture.convert("RGB")
        alone = image_processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(alone, processor(images=picture, return_tensors="pt")["pixel_values"]), picture


@pytest.mark.parametrize("folder", [EMOJI_MINI, PHOTO_MINI], ids=["emoji-mini", "photo-mini"])
def test_shipped_captioners(folder):
    processor = ClipCapProcessor.from_pretrained(folder)
    for image_processor in (AutoImageProcessor.from_pretrained(folder), processor.image_processor):
        assert type(image_processor) is CLIPImageProcessorPil
        assert_same_pixels(image_processor, processor)


IMAGE_PROCESSORS = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 48}),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "vit": lambda: ViTImageProcessorPil(size={"height": 40, "width": 32}, image_mean=[0.1, 0.2, 0.3]),
    "open_clip": lambda: OpenClipImageProcessor(size={"height": 32, "width": 32}, resize_mode="longest"),
}


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_saved_folders(tmp_path, tokenizer, kind, caplog):
    image_processor = IMAGE_PROCESSORS[kind]()
    ClipCapProcessor(image_processor, tokenizer, prefix_length=4).save_pretrained(tmp_path / "once")
    for folder, again in (("once", "twice"), ("twice", "thrice")):
        alone = AutoImageProcessor.from_pretrained(tmp_path / folder)
        processor = ClipCapProcessor.from_pretrained(tmp_path / folder)
        assert type(alone) is type(processor.image_processor) is type(image_processor)
        assert alone.to_dict() == processor.image_processor.to_dict() == image_processor.to_dict()
        assert_same_pixels(alone, processor)
        processor.save_pretrained(tmp_path / again)
    saved = [json.loads((tmp_path / name / "processor_config.json").read_text()) for name in ("once", "thrice")]
    assert saved[0] == saved[1]
    assert "torchvision backend is not available" not in caplog.text


def test_what_earlier_versions_saved(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["image_processor"].pop("towers_image_processor_type") == "CLIPImageProcessor"
    saved["image_processor"]["image_processor_type"] = "CLIPImageProcessor"
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    again = ClipCapProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is CLIPImageProcessorPil
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_backend_can_be_chosen(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    other = ClipCapProcessor.from_pretrained(tmp_path, backend="torchvision")
    assert type(other.image_processor) is CLIPImageProcessor
    other.save_pretrained(tmp_path / "torchvision")
    saved = json.loads((tmp_path / "torchvision" / "processor_config.json").read_text())
    assert saved["image_processor"]["image_processor_type"] == "CLIPImageProcessor"


def test_an_image_processor_of_a_newer_transformers(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace('"CLIPImageProcessor"', '"FutureImageProcessor"'))
    with pytest.raises(ValueError, match="has no image processor FutureImageProcessor: update it"):
        AutoImageProcessor.from_pretrained(tmp_path)


REMOTE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
for folder in os.environ["FOLDERS"].split():
    alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = torch.stack([
        image_processor([Image.open(os.environ["IMAGE"])], return_tensors="pt")["pixel_values"][0]
        for image_processor in (alone, processor.image_processor)
    ])
    processor.save_pretrained(folder + "-again")
    again = AutoImageProcessor.from_pretrained(folder + "-again", trust_remote_code=True)
    report[folder] = [type(alone).__name__, torch.equal(*pixels), type(again).__name__, pixels.double().sum().item()]
"""


def test_without_the_package(tmp_path, make_model, tokenizer, images):
    images[0].save(tmp_path / "picture.png")
    expected = {}
    for kind in ("clip", "open_clip"):
        folder = tmp_path / kind
        make_model().save_pretrained(folder)
        processor = ClipCapProcessor(IMAGE_PROCESSORS[kind](), tokenizer, prefix_length=4)
        processor.save_pretrained(folder)
        add_code(folder)
        pixels = processor(images=images[0], return_tensors="pt")["pixel_values"]
        name = type(processor.image_processor).__name__
        expected[str(folder)] = [name, True, name, pytest.approx(2 * pixels.double().sum().item())]
    environment = {"FOLDERS": " ".join(expected), "IMAGE": str(tmp_path / "picture.png")}
    assert run_client(WITHOUT_PACKAGE + REMOTE, tmp_path / "home", **environment) == expected
