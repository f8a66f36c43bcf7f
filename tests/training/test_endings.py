"""Captions that end in another token than the stop token are warned of before training."""

import json
import re

import pytest
from clipcap_hf.cli import main
from clipcap_hf.training.endings import warn_of_endings
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def spaced():
    """Make a tokenizer in which " ." and "." are two tokens, as in GPT-2's."""
    vocabulary = {"<end>": 0, ".": 1, " ": 2, "a": 3, "b": 4, " .": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(" ", ".")]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(
    ("captions", "stops", "append_eos", "warned"),
    [
        ([["a ."], ["b ."]], 1, False, "2 of 2 training captions end in .*' \\.'.*stops at '\\.'.*captions-end"),
        ([["a."], ["b."]], 1, False, None),
        ([["a ."], ["b."]], 1, False, None),  # not most of them
        ([["a ."], ["b ."]], [1, 5], False, None),
        ([["a ."], ["b ."]], 0, True, None),
        ([["a ."], ["b ."]], 1, True, "most often '<end>'; it stops at '\\.'"),
        ([["a ."], ["b ."]], None, True, "it stops at no token"),
        ([], 0, True, None),
        ([["a"] * 3000], 1, False, "500 of 500"),
    ],
)
def test_most_captions_end_elsewhere(spaced, caplog, captions, stops, append_eos, warned):
    assert spaced.encode("a .")[-1] == 5 and spaced.encode("a.")[-1] == 1
    warn_of_endings(captions, spaced, stops, append_eos)
    if warned is None:
        assert not caplog.records
    else:
        assert re.search(warned, caplog.text) and "Captions will run on" in caplog.text


@pytest.mark.parametrize("stops_elsewhere", [False, True])
def test_a_run_warns_before_training(tmp_path, model_folder, images, caplog, stops_elsewhere):
    if stops_elsewhere:
        settings = json.loads((model_folder / "generation_config.json").read_text())
        (model_folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 14}))
    (tmp_path / "data").mkdir()
    for number, image in enumerate(images[:4]):
        image.save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(f"picture {number} .")
    command = ["train", "--model", str(model_folder), "--data", str(tmp_path / "data"), "--max-steps", "1"]
    command += ["--out", str(tmp_path / "out"), "--use-cpu", "--save-strategy", "no", "--validation-share", "0"]
    assert main(command) == 0
    assert ("at which captioning does not stop" in caplog.text) == stops_elsewhere
