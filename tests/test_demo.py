"""`clipcap demo` on a part of its data, and emoji-mini as it is shipped."""

import json

import clipcap_hf
import pytest
import torch
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import run_demo, score_beside_baselines
from PIL import Image


@pytest.mark.parametrize("language", ["en", pytest.param("ja", marks=pytest.mark.slow)])
def test_demo_trains_scores_and_saves(tmp_path, language, caplog):
    from transformers import pipeline

    caplog.set_level("INFO", logger="clipcap_hf")
    report = run_demo(tmp_path, language=language, epochs=20, limit=60)
    assert report["train_loss"][-1] < 0.8 * report["train_loss"][0]
    lines = [record.getMessage() for record in caplog.records]
    header = next(place for place, line in enumerate(lines) if line.split()[:2] == ["epoch", "step"])
    assert lines[header - 1].startswith("step 1 of ")
    losses = [float(line.split()[2]) for line in lines[header + 1 : header + 21]]
    assert len(losses) == 20 and losses[-1] < losses[0]
    for split in ("new_design", "new_caption"):
        assert set(report["scores"][split]) == {"captioner", "nearest training image", "most common caption"}
    assert report["scores"]["new_caption"]["nearest training image"]["exact_match"] == 0

    saved = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert saved["scores"] == report["scores"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.png", "model", "scores.json"]
    assert Image.open(tmp_path / "captions.png").width > 1000
    # The saved captioner gives the very captions that were scored.
    rows = load_emoji("new_caption", language=language)
    rows = rows.select(range(0, len(rows), max(1, len(rows) // 60)))
    captioner = pipeline("image-captioning", model=str(tmp_path / "model"), num_beams=3)
    assert captioner(rows[0]["image"])[0]["generated_text"] == report["captions"]["new_caption"][0]


@pytest.mark.slow
def test_demo_repeats_with_its_seed(tmp_path):
    first = run_demo(tmp_path / "a", epochs=1, limit=30, seed=1)
    second = run_demo(tmp_path / "b", epochs=1, limit=30, seed=1)
    assert first["train_loss"] == second["train_loss"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_demo_replaces_an_earlier_result(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").touch()
    run_demo(tmp_path, epochs=1, limit=20)
    assert not (tmp_path / "model" / "stale").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_emoji_mini_beats_copying_on_new_captions():
    model = clipcap_hf.ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI).eval()
    processor = clipcap_hf.ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)
    assert model.dtype == torch.float32
    rows = load_emoji("new_caption").select(range(0, 900, 6))
    train = load_emoji("train").select(range(0, 11000, 40))

    def embed(images):
        return torch.nn.functional.normalize(embed_images(model, processor, images, progress=False), dim=-1)

    embeds = embed(rows["image"])
    captions = caption_embeds(model, processor, embeds, num_beams=3, progress=False)
    scores = score_beside_baselines(
        captions, embeds, list(rows["captions"]), embed(train["image"]), train["captions"], "en"
    )
    assert scores["nearest training image"]["exact_match"] == 0
    assert scores["captioner"]["exact_match"] > 25
    assert scores["captioner"]["cider"] > scores["most common caption"]["cider"] + 50
