"""Drawings and photographs are told apart, and images of the kind that a captioner does not know are named."""

import numpy as np
import pytest
from clipcap_hf.captioning import CaptionedImage
from clipcap_hf.cli import main
from clipcap_hf.data import load_emoji
from clipcap_hf.drawings import KINDS, looks_drawn, other_kind
from clipcap_hf.model.images_clipcap import load_image
from clipcap_hf.serve_page import results_page
from PIL import Image


def scenery(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Make soft patches of many colours with the grain of a camera."""
    random = np.random.default_rng(seed)
    patches = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    return Image.fromarray((np.asarray(patches) + random.normal(0, 6, (*size[::-1], 3))).clip(0, 255).astype(np.uint8))


def test_nearly_all_emoji_look_drawn():
    drawn = [looks_drawn(load_image(image)) for image in load_emoji("validation")["image"]]
    assert 0.93 < np.mean(drawn) <= 1


def test_pictures_with_a_lively_border_do_not():
    assert not any(looks_drawn(scenery(seed)) for seed in range(20))
    framed = Image.new("RGB", (320, 240), (250, 250, 248))
    framed.paste(scenery(0, (200, 150)), (60, 45))
    assert looks_drawn(framed)


@pytest.mark.parametrize(
    "knows, drawn, expected",
    [
        ("photograph", True, "drawing"),
        ("photograph", False, None),
        ("drawing", False, "photograph"),
        ("drawing", True, None),
        (None, True, None),
        ("drawing", None, None),
    ],
)
def test_other_kind(knows, drawn, expected):
    assert other_kind(knows, drawn) == expected


@pytest.mark.parametrize("model", KINDS)
def test_the_command_names_images_of_the_other_kind_once(tmp_path, capsys, model):
    drawing = load_emoji("validation")[0]["image"]
    for number in range(2):
        load_image(drawing).save(tmp_path / f"drawing-{number}.png")
    scenery(1).save(tmp_path / "scenery.png")
    assert main(["caption", str(tmp_path), "--model", model]) == 0
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if "probably wrong" in line]
    assert len(printed.out.splitlines()) == 3 and len(warnings) == 1
    if model == "photo-mini":
        assert warnings[0].startswith("clipcap: 2 of these images look like drawings, but photo-mini knows")
        assert "drawing-0.png" in warnings[0] and "drawing-1.png" in warnings[0] and "scenery" not in warnings[0]
    else:
        assert warnings[0].startswith("clipcap: 1 of these images looks like a photograph, but emoji-mini")
        assert warnings[0].endswith("scenery.png")


def test_nothing_is_said_without_reason(tmp_path, capsys):
    scenery(1).save(tmp_path / "scenery.png")
    assert main(["caption", str(tmp_path)]) == 0
    assert "probably wrong" not in capsys.readouterr().err


def test_the_page_marks_images_of_the_other_kind():
    result = CaptionedImage("a.png", ["A dog."], scores=[0.0], prefix_tokens=[], drawn=True)
    marked = results_page([(result, None)], "photograph")
    assert "Looks like a drawing; this captioner knows photographs only." in marked
    assert "Looks like" not in results_page([(result, None)], "drawing") + results_page([(result, None)])
