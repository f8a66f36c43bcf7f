"""The words that all captions start with: chosen, taken off for training, and put in front of what is written."""

import json
import logging

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapProcessor
from clipcap_hf.cli import main
from clipcap_hf.data import load_emoji
from clipcap_hf.training.caption_start import shared_starts


def test_starts_are_whole_words_and_leave_one():
    assert shared_starts(["a red heart", "a red hat"]) == ["", "a ", "a red "]
    assert shared_starts(["a red heart", "a red"]) == ["", "a "]
    assert shared_starts(["same words", "same words"]) == ["", "same "]
    assert shared_starts(["heart", "a heart"]) == shared_starts(["赤いハート", "赤い帽子"]) == [""]


def test_captions_lose_their_start_and_get_it_back(tmp_path, image_processor, make_tokenizer):
    processor = ClipCapProcessor(image_processor, make_tokenizer(), prefix_length=4, caption_start="a drawing of ")
    processor.save_pretrained(tmp_path)
    processor = ClipCapProcessor.from_pretrained(tmp_path)
    captions = ["a drawing of a red heart", "a blue dog", "a drawing of "]
    rows = [{"clip_embeds": torch.randn(16), "captions": [text]} for text in captions]
    batch = CaptioningCollator(processor, return_references=True)(rows)
    written = processor.tokenizer.batch_decode(batch["labels"].clamp(min=0), skip_special_tokens=True)
    assert [text.strip() for text in written] == ["a red heart", "a blue dog", "a drawing of"]
    assert batch["references"] == [["a red heart"], ["a blue dog"], ["a drawing of "]]
    decoded = processor.batch_decode(batch["labels"], skip_special_tokens=True)
    assert decoded[:2] == ["a drawing of a red heart", "a drawing of a blue dog"]
    assert processor.decode(batch["labels"][0], skip_special_tokens=True) == decoded[0]
    together = CaptioningCollator(processor, captions_together=True)(rows[:1])
    assert processor.batch_decode(together["labels"], skip_special_tokens=True)[0].startswith("a drawing of a red")


# -- in a run


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Write drawings with captions in a new style, as a user would have them."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = ["image,caption"]
    for number, row in enumerate(load_emoji("new_design").shuffle(seed=0).select(range(30))):
        row["image"].save(folder / f"{number}.png")
        lines.append(f'{number}.png,"a drawing of {row["captions"][0]}"')
    (folder / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def train(data, out, *options) -> str:
    settings = [
        "--learning-rate",
        "1e-4",
        "--max-steps",
        "2",
        "--warmup-steps",
        "0",
        "--num-samples",
        "6",
        "--use-cpu",
    ]
    assert main(["train", "--data", str(data), "--out", str(out), *settings, *options]) == 0
    return json.loads((out / "processor_config.json").read_text())["caption_start"]


def test_an_existing_captioner_keeps_its_names_and_gets_the_style(drawings, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="clipcap_hf")
    assert train(drawings, tmp_path / "out") == "a drawing of "
    assert "put in front of each caption" in caplog.text
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert all(sample["caption"].startswith("a drawing of ") for sample in samples)
    # The captions before training are the captioner's own.
    before = json.loads((tmp_path / "out" / "captions_before.json").read_text())["captions"]
    assert before and not any("drawing" in caption for caption in before)
    # Trained again on the same data, the captioner still has the words from its processor, and learns none.
    again = ["--model", str(tmp_path / "out")]
    assert train(drawings, tmp_path / "again", *again) == "a drawing of "


@pytest.mark.slow
def test_a_captioner_that_writes_the_words_itself_goes_on_doing_so(drawings, tmp_path):
    learned = tmp_path / "learned"
    train(drawings, learned, "--caption-start", "", "--max-steps", "40", "--learning-rate", "1e-3")
    assert train(drawings, tmp_path / "further", "--model", str(learned)) == ""


def test_words_that_the_user_names(drawings, tmp_path, capsys, caplog):
    assert train(drawings, tmp_path / "out", "--caption-start", "a drawing") == "a drawing "
    out = ["--out", str(tmp_path / "none"), "--use-cpu"]
    assert main(["train", "--data", str(drawings), "--caption-start", "a photo of", *out]) == 1
    assert "no training caption starts with 'a photo of'; the first is 'a drawing of" in capsys.readouterr().err
