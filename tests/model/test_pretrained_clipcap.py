"""Saving and loading, and checkpoints that do not fit."""

import json
import shutil

import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_inputs import MAPPINGS, TOWERS, aligned, assert_same_weights, pixels, prompt_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)


def edited_config(folder, tmp_path, **changes):
    copied = tmp_path / "edited"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    config.update(changes)
    (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"mapping_type": "transformer"}, "mapping_network.*mapping_type"),
        ({"mapping_type": "linear"}, "mapping_network.*mapping_type"),
        ({"prefix_length": 5}, r"mapping_network.fc1.bias \(64,\).*asks for \(80,\).*prefix_length 5"),
    ],
    ids=["transformer", "linear", "prefix_length"],
)
def test_config_that_contradicts_its_weights(model_folder, tmp_path, changes, pattern):
    folder = edited_config(model_folder, tmp_path, **changes)
    for auto_class in (ClipCapForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match=rf"(?s){folder}.*do not fit its configuration.*{pattern}"):
            auto_class.from_pretrained(folder)


def test_weights_that_belong_to_another_tower(model_folder, tmp_path):
    weights = load_file(model_folder / "model.safetensors")
    del weights["vision_tower.visual_projection.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, for example vision_tower.visual_projection.weight"):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


def test_truncated_weights(model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{model_folder}.*incomplete or damaged.*again"):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


def test_folder_without_weights(model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=str(model_folder)):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vision", [*TOWERS, None])
def test_saving_is_exact(tmp_path, make_model, vision, dtype):
    model = make_model(vision, mapping_type="transformer").to(dtype)
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == dtype  # the default is the saved dtype
    assert_same_weights(model, again)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    aligned(again)
    images = {"clip_embeds": torch.randn(2, 16)} if vision is None else {"pixel_values": pixels(model)}
    batch = {"input_ids": prompt_ids(model, 5).repeat(2, 1), **images}
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**images), model.generate(**images))
    if dtype == torch.bfloat16:
        assert ClipCapForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("mapping_type", MAPPINGS)
def test_every_mapping_is_saved(tmp_path, make_model, mapping_type):
    model = make_model(None, mapping_type=mapping_type)
    model.save_pretrained(tmp_path)
    again, info = ClipCapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(model, again)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_shards(tmp_path, make_model):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(model, ClipCapForConditionalGeneration.from_pretrained(tmp_path))


def test_tied_head_stays_tied_and_is_saved_once(tmp_path, make_model):
    model = make_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "language_model.transformer.wte.weight" in keys and "language_model.lm_head.weight" not in keys
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    for tied in (model, again):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with torch.no_grad():
        again.get_input_embeddings().weight[7] += 1
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)


def test_untied_head_stays_untied(tmp_path, make_model, text_config):
    text_config.tie_word_embeddings = False
    model = make_model()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert_same_weights(model, ClipCapForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoModel, ClipCapModel),
        (AutoModelForImageTextToText, ClipCapForConditionalGeneration),
        (AutoModelForMultimodalLM, ClipCapForConditionalGeneration),
    ],
)
def test_auto_classes(model_folder, auto_class, expected):
    assert type(AutoConfig.from_pretrained(model_folder)) is ClipCapConfig
    assert type(auto_class.from_pretrained(model_folder)) is expected
