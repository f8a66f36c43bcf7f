"""Names of models: embedded captioners, GGUF files and packages stand for the same in every option."""

import json
import sys
from pathlib import Path

import pytest
import torch
from clipcap_hf.assets import EMOJI_MINI, PHOTO_MINI
from clipcap_hf.cli import main
from clipcap_hf.clip import load_text_tower, load_tower
from clipcap_hf.sources import TextSource, check_folder, text_source, vision_source
from clipcap_hf.training.arguments import DataArguments, ModelArguments
from clipcap_hf.training.captioner import load_captioner
from transformers import GPT2Config


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put an importable package with a file of weights in GGUF's place onto the path."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('code of the package was run')")
    (folder / "tiny.Q4.gguf").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_a_package_stands_for_its_gguf_file(package):
    wanted = {"gguf_file": "tiny.Q4.gguf"}
    for name, stands_for in (
        ("package:tiny-weights", "package:tiny-weights"),
        (str(package), str(package)),
        (f"{package}/tiny.Q4.gguf", str(package)),
    ):
        assert text_source(name) == TextSource(stands_for, stands_for, wanted, wanted)
    assert "tiny_weights" not in sys.modules
    (package / "tiny.Q8.gguf").touch()
    with pytest.raises(ValueError, match="several GGUF files, tiny.Q4.gguf, tiny.Q8.gguf: name one, .*/tiny.Q4.gguf"):
        text_source("package:tiny-weights")


def test_a_captioner_stands_for_its_parts(tmp_path):
    for name, folder in (("emoji-mini", EMOJI_MINI), ("photo-mini", PHOTO_MINI)):
        text = text_source(name)
        assert text.model.config.model_type == "gpt2" and (text.tokenizer, text.model_kwargs) == (folder, {})
    # A frozen language model that is no part of the checkpoint is loaded from where it comes from.
    config = json.loads((Path(PHOTO_MINI) / "config.json").read_text())
    config["donors"] = {"language_model": {"name": "package:tiny-weights", "gguf_file": "tiny.Q4.gguf"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert text_source(str(tmp_path)) == TextSource(
        "package:tiny-weights", str(tmp_path), {"gguf_file": "tiny.Q4.gguf"}
    )
    tower, image_processor = vision_source("emoji-mini")
    assert image_processor is not None
    assert vision_source("openai/clip-vit-base-patch32") == ("openai/clip-vit-base-patch32", None)
    same, _ = load_tower("emoji-mini")
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])


def test_a_new_captioner_of_the_parts_of_another():
    model, processor = load_captioner(ModelArguments(vision="emoji-mini", text="emoji-mini"), DataArguments())
    assert model.config.text_config.model_type == "gpt2" and model.vision_tower is not None
    assert processor.image_processor is not None and processor.tokenizer.eos_token


@pytest.mark.parametrize("name", ["emoji-mini", "photo-mini"])
def test_what_is_no_clip_is_refused_by_its_own_name(name, tmp_path, capsys):
    with pytest.raises(ValueError, match="is a `clipcap`"):
        load_text_tower(name)
    state = tmp_path / "state.pt"
    torch.save({}, state)
    command = ["convert", "official", str(state), "--out", str(tmp_path / "out")]
    assert main([*command, "--vision", name, "--text", "emoji-mini"]) == 1
    assert "emoji-mini is a captioner; give the language model of the official" in capsys.readouterr().err
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert main([*command, "--vision", name, "--text", str(tmp_path / "gpt2")]) == 1
    assert f"--vision {name} is a captioner; give the CLIP of the official" in capsys.readouterr().err


def test_folders_that_do_not_exist_are_not_asked_of_the_hub():
    with pytest.raises(ValueError, match="`data`: there is no file or folder ./my-images"):
        check_folder("./my-images", "`data`")
    check_folder("me/my-images", "`data`")
    check_folder(None, "`data`")
