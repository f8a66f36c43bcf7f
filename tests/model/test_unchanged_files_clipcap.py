"""Hashes that are remembered while files stay as they are."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.model import donors_clipcap, unchanged_files_clipcap
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def old_files(tmp_path, monkeypatch):
    """Take files for old as soon as they are written, and keep hashes apart from the user's."""
    monkeypatch.setattr(unchanged_files_clipcap, "_COARSEST_TIME", 0.0)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def light(tmp_path, text_config):
    """Save a captioner without its language model, which is in `gpt2`."""
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "gpt2")
    ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, str(tmp_path / "gpt2"), clip_embed_dim=16, prefix_length=4, freeze_language_model=True
    ).save_pretrained(tmp_path / "light", save_frozen=False)
    return tmp_path / "light"


@pytest.fixture
def hashed(monkeypatch):
    """Count how often weights are hashed."""
    calls = []
    original = donors_clipcap.weights_hash
    monkeypatch.setattr(donors_clipcap, "weights_hash", lambda weights: calls.append(1) or original(weights))
    return calls


def load(folder, **kwargs):
    return ClipCapForConditionalGeneration.from_pretrained(folder, **kwargs)


def test_weights_are_hashed_once_while_their_files_stay_as_they_are(light, hashed):
    first = load(light)
    again = load(light)
    assert len(hashed) == 1
    assert again.config.donors == first.config.donors
    again.save_pretrained(light.parent / "again", save_frozen=False)
    assert "lm_head.weight" not in str(load_file(light.parent / "again/model.safetensors").keys())
    hashed.clear()
    (light.parent / "gpt2/notes.txt").write_text("a new file")
    load(light)
    load(light, dtype=torch.bfloat16)
    assert len(hashed) == 1
    shutil.copytree(light.parent / "gpt2", light.parent / "moved")
    load(light, language_model=light.parent / "moved")
    assert len(hashed) == 2


@pytest.mark.parametrize("keeps_times", [False, True])
def test_changed_weights_of_the_same_size_are_found(light, hashed, keeps_times):
    load(light)
    path = light.parent / "gpt2/model.safetensors"
    before = path.stat()
    weights = load_file(path)
    weights["transformer.wte.weight"][0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    if keeps_times:  # the time of the last change of the inode tells nevertheless
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(ValueError, match="trained with another language model"):
        load(light)
    with pytest.raises(ValueError, match="trained with another language model"):
        load(light)


def test_files_that_change_while_they_are_read_are_hashed(light, hashed, monkeypatch):
    load(light)
    original = ClipCapForConditionalGeneration._load_donor

    def touch_and_load(*args, **kwargs):
        (light.parent / "gpt2/model.safetensors").touch()
        return original(*args, **kwargs)

    monkeypatch.setattr(ClipCapForConditionalGeneration, "_load_donor", touch_and_load)
    load(light)
    assert len(hashed) == 2


def test_new_files_are_hashed_each_time(light, hashed, monkeypatch):
    monkeypatch.setattr(unchanged_files_clipcap, "_COARSEST_TIME", 3600.0)
    load(light)
    load(light)
    assert len(hashed) == 2 and not Path(constants.HF_HOME).exists()


@pytest.mark.parametrize("content", [b"", b"no hash", b"\xff" * 64, b"g" * 64])
def test_a_damaged_memory_is_written_again(light, hashed, content):
    load(light)
    (place,) = (Path(constants.HF_HOME) / "clipcap_hf" / "hashes").iterdir()
    good = place.read_bytes()
    place.write_bytes(content)
    load(light)
    assert len(hashed) == 2 and place.read_bytes() == good


def test_a_home_that_cannot_be_written_is_done_without(light, hashed):
    Path(constants.HF_HOME).write_text("a file where a folder should be")
    load(light)
    load(light)
    assert len(hashed) == 2


def test_gguf_files_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(donors_clipcap, "check_can_read_gguf", lambda name: None)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/a.gguf").write_bytes(b"weights")
    calls = []
    original = donors_clipcap.file_hash
    monkeypatch.setattr(donors_clipcap, "file_hash", lambda path: calls.append(1) or original(path))
    record = {"name": str(tmp_path / "gguf"), "gguf_file": "a.gguf", "dtype": "float32", "sha256": None}
    for _ in range(2):
        donors_clipcap.Donor("language_model", record).check(None)
    assert len(calls) == 1
