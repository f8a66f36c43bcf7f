"""Transforms that would give every image wrong pixels are refused by name, for towers of every library."""

import json

import pytest
import torch
from clipcap_hf import ClipCapProcessor
from clipcap_hf.captioning import caption_images
from clipcap_hf.cli import main
from clipcap_hf.clip import load_tower
from clipcap_hf.data import embed
from datasets import Dataset
from tiny_inputs import pixels
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection


BAD = [
    ({"image_std": None}, "`do_normalize` in the image processor needs `image_std`: positive numbers"),
    ({"image_std": [0, 0, 0]}, "`image_std` must be positive numbers in the image processor"),
    ({"image_std": [0.2, 0.2, float("nan")]}, "`image_std` must be positive numbers"),
    ({"image_std": [0.2, float("inf"), 0.2]}, "`image_std` must be positive numbers"),
    ({"image_std": [0.2, "x", 0.2]}, "`image_std` must be positive numbers"),
    ({"image_mean": [float("nan"), 0, 0]}, "`image_mean` must be finite numbers"),
    ({"rescale_factor": 0}, "`rescale_factor` must be a number other than 0"),
    ({"rescale_factor": float("inf")}, "`rescale_factor` must be a number other than 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_of_a_captioner(model_folder, tmp_path, images, capsys, changes, message):
    path = model_folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"].update(changes)
    path.write_text(json.dumps(config))
    images[0].save(tmp_path / "0.png")
    assert main(["caption", "--model", str(model_folder), str(tmp_path / "0.png")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
    with pytest.raises(ValueError, match=message):
        ClipCapProcessor.from_pretrained(model_folder)


@pytest.mark.parametrize(("changes", "message"), BAD[:2], ids=["missing", "zero"])
def test_of_a_tower(tmp_path, clip_config, image_processor, changes, message):
    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_tower(str(tmp_path))


@pytest.mark.parametrize("vision", ["clip", "vit", "timm"])
def test_of_another_size_than_the_towers(tmp_path, make_model, tokenizer, images, vision):
    model = make_model(vision)
    size = model.config.vision_config.image_size + 16
    other = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    message = (
        rf"The images are {size} x {size} pixels, but the vision tower takes {size - 16} x {size - 16}: the image"
    )
    with pytest.raises(ValueError, match=message):
        list(caption_images(model, ClipCapProcessor(other, tokenizer, prefix_length=4), images[:1], progress=False))
    with pytest.raises(ValueError, match=message):
        embed(model, Dataset.from_dict({"image": images[:2]}), tmp_path / "out", other, progress=False)
    assert torch.isfinite(model.get_clip_embeds(pixels(model, 1))).all()
