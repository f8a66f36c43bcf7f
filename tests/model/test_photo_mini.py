"""photo-mini, the captioner of photographs in the package."""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clipcap_hf import PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_files
from clipcap_hf.cli import main
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "embedded"))
import photo_captions as texts  # noqa: E402


@pytest.fixture(scope="module")
def captioner():
    return ClipCapForConditionalGeneration.from_pretrained(PHOTO_MINI).eval(), ClipCapProcessor.from_pretrained(
        PHOTO_MINI
    )


def caption_of(captioner, words: dict[str, float], count: int = 1) -> str:
    """Caption an embedding in which these objects and scenes were found."""
    model, processor = captioner
    embed = torch.zeros(1, model.config.clip_embed_dim)
    for word, score in words.items():
        if word in texts.CLASSES:
            index = texts.CLASSES.index(word)
            embed[0, [index, 80 + index, 160 + index]] = torch.tensor([score, count / 4, 0.6])
        else:
            embed[0, 240 + texts.SCENE_NAMES.index(word)] = score
    inputs = processor(clip_embeds=embed, return_tensors="pt")
    return processor.batch_decode(model.generate(**inputs, num_beams=3), skip_special_tokens=True)[0].strip()


def test_checkpoint_is_small_and_whole():
    folder = Path(PHOTO_MINI)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search("^license: cc-by-4.0$", card, flags=re.MULTILINE) and "COCO Consortium" in card


def test_classes_and_scenes_are_those_of_the_tables(captioner):
    tower = captioner[0].vision_tower
    assert torch.equal(tower.class_map, texts.class_map())
    assert tower.config.num_scenes == len(texts.SCENE_NAMES) and tower.config.num_classes == len(texts.CLASSES)


@pytest.mark.parametrize(
    "found, word",
    [({"dog": 0.9}, "dog"), ({"pizza": 0.9, "dining table": 0.6}, "pizza"), ({"train": 0.9, "station": 0.5}, "train")],
)
def test_caption_is_a_sentence_about_what_was_found(captioner, found, word):
    caption = caption_of(captioner, found)
    assert word in caption and caption.endswith(".") and len(caption.split()) >= 5


def test_counts_are_written():
    named = texts.objects_of_image(["Two dogs and a cat.", "Three dogs near a couch."])
    found = {texts.CLASSES[index]: (count, share) for index, count, share in named}
    assert found == {"dog": (2, 1.0), "cat": (1, 0.5), "couch": (1, 0.5)}


def test_scenes_and_colours_of_captions():
    captions = ["A red bus on a street.", "A bus next to a clock tower in snow."]
    shares = dict(zip(texts.SCENE_NAMES, texts.scenes_of_image(captions)))
    assert shares["street"] == shares["snow"] == shares["clock tower"] == 0.5 and shares["beach"] == 0
    assert texts.colors_of_image(captions) == {texts.CLASSES.index("bus"): [texts.COLORS.index("red")]}
    assert texts.grounds_of_image(captions) == [0.0, 0.5, 0.0]


def test_made_up_embeddings_show_what_captions_name(captioner):
    tower = captioner[0].vision_tower
    images = [["A dog.", "A black dog."], ["A cat on a bed.", "A cat in a bedroom."]] * 200
    noise = texts.DetectorNoise(images, torch.randn(80, 8, generator=torch.Generator().manual_seed(0)), 0.3)
    embeds = noise.embed(np.arange(len(images)))
    assert embeds.shape[1] == tower.config.hidden_size
    dogs, cats = embeds[::2], embeds[1::2]
    dog, cat, scene = texts.CLASSES.index("dog"), texts.CLASSES.index("cat"), 240 + texts.SCENE_NAMES.index("bedroom")
    assert (dogs[:, dog] > 0).float().mean() > 0.8 > 0.2 > (cats[:, dog] > 0).float().mean()
    assert (cats[:, cat] > 0).float().mean() > 0.8 and cats[:, scene].mean() > 5 * dogs[:, scene].mean()
    assert ((embeds[:, :80] > 0) == (embeds[:, 80:160] > 0)).all()


def test_embeddings_in_which_nothing_was_found_are_made_up_and_told():
    noise = texts.DetectorNoise([["A dog.", "A black dog."]] * 500, torch.randn(80, 8), 0.2)
    assert texts.show_nothing(noise.embed(np.arange(500), nothing=1.0)).all()
    assert texts.show_nothing(noise.embed(np.arange(500))).float().mean() < 0.1


@pytest.mark.parametrize("beams", [1, 3])
def test_pictures_without_known_objects_get_a_modest_caption(captioner, tmp_path, beams):
    colours = {
        "white": (255,) * 3,
        "black": (0,) * 3,
        "grey": (128,) * 3,
        "red": (200, 30, 30),
        "blue": (90, 120, 160),
    }
    pictures = {name: Image.new("RGB", (300, 200), colour) for name, colour in colours.items()}
    pictures["gradient"] = Image.linear_gradient("L").convert("RGB")
    pictures["grain"] = Image.effect_noise((640, 480), 60).convert("RGB")
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in pictures]
    results = caption_files(*captioner, paths, progress=False, num_beams=beams)
    assert [result.captions[0].strip() for result in results] == ["A picture."] * len(pictures)


def test_the_command_searches_with_the_captioners_own_beams(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((320, 240), Image.BICUBIC).save(tmp_path / "a.png")
    captions = {}
    for options in ([], ["--beams", "3"]):
        assert main(["caption", str(tmp_path), "--json", *options]) == 0
        captions[" ".join(options)] = capsys.readouterr().out
    assert captions[""] == captions["--beams 3"]
    assert ClipCapForConditionalGeneration.from_pretrained(PHOTO_MINI).generation_config.num_beams == 3


def test_twelve_pictures_from_the_command_line(tmp_path, capsys):
    for number in range(12):
        Image.effect_noise((640, 480), 40 + 10 * number).convert("RGB").save(tmp_path / f"{number:02d}.jpg")
    begin = time.process_time()
    assert main(["caption", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert time.process_time() - begin < 30  # of one core; two take half of that
    assert len(printed.out.splitlines()) == 12 and "photo-mini knows photographs" in printed.err
