"""Damaged checkpoints that would load and caption are refused, with their name."""

import json

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.model.modeling_vision import load_vision_tower
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModelWithProjection


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    return ClipCapForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", ["mapping_network.fc1.bias", "language_model.transformer.h.1.mlp.c_fc.weight", "vision_tower."]
)
def test_weights_that_are_not_numbers(model_folder, key, value):
    def damage(weights):
        name = next(name for name in weights if name.startswith(key) and weights[name].is_floating_point())
        weights[name].view(-1)[3] = value

    change_weights(model_folder, damage)
    with pytest.raises(ValueError, match=rf"{model_folder} are damaged: 1 of them hold NaN or infinity.*{key}"):
        load(model_folder)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        AutoModelForImageTextToText.from_pretrained(model_folder)


def test_large_half_precision_weights_are_sound(model_folder):
    # A sum over them would overflow.
    change_weights(model_folder, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    change_weights(model_folder, lambda weights: weights["mapping_network.fc2.weight"].fill_(60000))
    assert load(model_folder).mapping_network.fc2.weight.max() == 60000


@pytest.mark.parametrize(
    "key",
    [
        "language_model.transformer.h.2.ln_1.weight",
        "mapping_network.layers.0.fc1.weight",
        "language_model.transformer.h.0.attn.c_attn.lora_A.default.weight",
        "optimizer",
    ],
)
def test_weights_without_a_place(model_folder, key):
    change_weights(model_folder, lambda weights: weights.update({key: torch.zeros(3)}))
    with pytest.raises(
        ValueError, match=f"{model_folder} do not fit.*1 have no place in the model, for example {key}"
    ):
        load(model_folder)


def test_fewer_layers_in_the_configuration_than_in_the_weights(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"]["n_layer"] = 1
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"have no place in the model, for example language_model.transformer.h.1\."):
        load(model_folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"max_new_tokens": ', b"\xff\xfe\x00", b"[1]", b"null", b'{"max_new_tokens": -5}'],
    ids=["empty", "cut", "cut later", "bytes", "list", "null", "negative"],
)
def test_generation_settings_that_cannot_be_read(model_folder, content):
    path = model_folder / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} cannot be read as generation settings.*fix it, or delete it"):
        load(model_folder)
    path.unlink()
    assert load(model_folder).generation_config.max_new_tokens is None  # transformers derives settings


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("eos_token_id", "x", "the number of a token or a list of such"),
        ("eos_token_id", [], "the number of a token or a list of such"),
        ("eos_token_id", [None], "the number of a token or a list of such"),
        ("pad_token_id", float("nan"), "the number of a token"),
        ("bos_token_id", 10**30, "the number of a token"),
        ("bos_token_id", {"a": 1}, "the number of a token"),
        ("num_beams", 2.5, "a whole number from 1 to 1000"),
        ("num_beams", 10**6, "a whole number from 1 to 1000"),
        ("num_beams", True, "a whole number from 1 to 1000"),
        ("no_repeat_ngram_size", "2", "a whole number from 0 to"),
        ("length_penalty", float("inf"), "a finite number"),
        ("repetition_penalty", [1.2], "a finite number"),
        ("do_sample", "no", "true or false"),
    ],
)
def test_generation_settings_of_another_type(model_folder, name, value, wanted):
    path = model_folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"{path} cannot be read as generation settings .*`{name}` must be {wanted}"):
        load(model_folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"vocab_size": 10**12}, "`vocab_size` of the language model.*got 1000000000000"),
        ("text_config", {"n_embd": 10**9}, "`hidden_size` of the language model"),
        ("text_config", {"n_layer": 10**9}, "`num_hidden_layers` of the language model"),
        ("text_config", {"n_positions": 10**12}, "`max_position_embeddings` of the language model"),
        ("vision_config", {"image_size": 200_000}, "`image_size` of the vision tower.*got 200000"),
        ("vision_config", {"hidden_size": -8}, "`hidden_size` of the vision tower"),
        ("vision_config", {"num_hidden_layers": 10**7}, "`num_hidden_layers` of the vision tower"),
        (None, {"prefix_length": 10**9}, "`prefix_length` of the captioner"),
        (None, {"clip_length": 10**9}, "`clip_length` of the captioner"),
        (None, {"mapping_mlp_ratio": 1e12}, "`mapping_mlp_ratio` must be above 0 and at most 1000"),
        (None, {"image_token_id": -3}, "`image_token_id` must be a token id, got -3"),
        (None, {"image_token_id": "fifty"}, "image_token_id"),
        (None, {"prefix_length": "ten"}, "prefix_length"),
        (None, {"prefix_length": 4.5}, "prefix_length"),
        (None, {"freeze_vision": "yes"}, "freeze_vision"),
        (None, {"lora": 8}, "lora"),
        (None, {"text_config": 5}, "text_config"),
        (None, {"vision_config": [1]}, "vision_config"),
        ("text_config", {"n_layer": "two"}, "n_layer|num_hidden_layers"),
        ("vision_config", {"image_size": "big"}, "image_size"),
        ("text_config", {"n_head": 5}, "num_heads"),
        ("text_config", {"activation_function": "gale"}, "'gale' is missing in its files, or is unknown"),
        ("text_config", {"model_type": "gpu2"}, "has a `model_type` that transformers .* does not know"),
        ("vision_config", {"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ("vision_config", {"hidden_act": "quack"}, "quack"),
        ("text_config", {"n_inner": 10**12}, "`n_inner` of the language model must be a whole number up to"),
        ("text_config", {"n_inner": -1}, "`n_inner` of the language model must be a whole number up to"),
        ("text_config", {"task_specific_params": 10**12}, "is larger than in any model|has the wrong type"),
        ("text_config", {"n_embd": 0}, "wrong type or size"),
        ("text_config", {"n_head": 0}, "wrong type or size"),
        ("text_config", {"n_positions": -1}, "has the wrong type or size|context"),
        ("text_config", {"resid_pdrop": float("nan")}, "`resid_pdrop` of the language model must be a number"),
        ("text_config", {"model_type": {"a": 1}}, "wrong type or size"),
        ("text_config", {"dtype": 1e30}, "wrong type or size"),
        (None, {"dtype": 0}, "wrong type or size"),
        (None, {"dtype": "x"}, "wrong type or size"),
        (None, {"dtype": ["x", "y"]}, "wrong type or size"),
        (None, {"model_type": ["x"]}, "not a clipcap captioner"),
        ("vision_config", {"model_type": "blip"}, "the vision tower gives embeddings of width 32"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sizes_and_types_that_no_model_has(model_folder, part, changes, message):
    config = json.loads((model_folder / "config.json").read_text())
    (config if part is None else config[part]).update(changes)
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, StrictDataclassError), match=message) as error:
        load(model_folder)
    assert str(model_folder) in str(error.value)


def test_damaged_configurations_of_towers_are_named(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for damage, message in (
        ({"model_type": "clip_v~sion_model"}, "has a `model_type` that transformers .* does not know"),
        ({"intermediate_size": 48}, "have other shapes than config.json says"),
    ):
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(ValueError, match=message) as error:
            load_vision_tower(str(tmp_path))
        assert str(tmp_path) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("tokenizer.json", '"rstrip"', '"Pstrip"', "incomplete or damaged"),
        ("tokenizer.json", '"special": true', '"special": "x"', "wrong type or size"),
        ("tokenizer.json", '"added_tokens": [', '"added_tokens": [3, ', "wrong type or size"),
        ("processor_config.json", '"caption_start": ""', '"caption_start": 3', "A prompt must be text in UTF-8"),
        ("processor_config.json", '"caption_start": ""', '"caption_start": ["a"]', "A prompt must be text in UTF-8"),
        (
            "processor_config.json",
            '"image_processor": {',
            '"image_processor": 3, "x": {',
            "has the wrong type or size",
        ),
        ("processor_config.json", '"height": 32', '"height": null', "needs a `height` and a `width`"),
        ("processor_config.json", '"height": 32', '"height": 0.5', "must be 1 to 8192 pixels, got 0.5"),
        (
            "processor_config.json",
            '"image_processor_type": "',
            '"image_processor_type": "No',
            "Unrecognized image processor",
        ),
        ("processor_config.json", '"image_std": [', '"image_std": [0.5, ', "must be 3 numbers"),
        ("processor_config.json", '"resample": 3', '"resample": [3]', "settings of the image processor fail on every"),
        ("processor_config.json", '"resample": 3', '"resample": 99', "settings of the image processor fail on every"),
        ("processor_config.json", '"prefix_length": ', '"prefix_length": [2], "x": ', "wrong type or size"),
        ("processor_config.json", '"prefix_length": ', '"prefix_length": null, "x": ', "wrong type or size"),
    ],
)
def test_damaged_processors_are_named(model_folder, file, old, new, message):
    content = (model_folder / file).read_text(encoding="utf-8")
    assert old in content
    (model_folder / file).write_text(content.replace(old, new, 1), encoding="utf-8")
    with pytest.raises((ValueError, OSError), match=message) as error:
        ClipCapProcessor.from_pretrained(model_folder)
    assert str(model_folder) in str(error.value)
