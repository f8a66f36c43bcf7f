"""`ClipCapModel`: a captioner's hidden states, and the weights that it shares with the captioner."""

import copy
import json
from pathlib import Path

import pytest
import torch
from clipcap_hf import (
    EMOJI_MINI,
    CaptioningCollator,
    ClipCapForConditionalGeneration,
    ClipCapModel,
    ClipCapModelOutputWithPast,
    ClipCapPreTrainedModel,
)
from safetensors import safe_open
from tiny_inputs import MAPPINGS, left_padded, pixels, prompt_ids, tiny_language_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModelWithProjection,
    GPT2LMHeadModel,
)


OLD_FOLDER = Path(__file__).parents[1] / "fixtures" / "captioner-0.1.0"


def names_in(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


# -- forward


@torch.no_grad()
@pytest.mark.parametrize("language_model", ["gpt2", "llama", "opt", "qwen3"])
@pytest.mark.parametrize("mapping_type", MAPPINGS)
def test_head_on_hidden_states_gives_the_logits(make_model, language_model, mapping_type):
    model = make_model(mapping_type=mapping_type, text_config=tiny_language_model(language_model))
    inputs = {**left_padded(model, [5, 6, 7], [8]), "pixel_values": pixels(model)}
    outputs = model.base_model(**inputs)
    assert type(model.base_model) is ClipCapModel and type(outputs) is ClipCapModelOutputWithPast
    assert outputs.last_hidden_state.shape[:2] == inputs["input_ids"].shape
    expected = model(**inputs)
    torch.testing.assert_close(model.get_output_embeddings()(outputs.last_hidden_state), expected.logits)
    assert torch.equal(outputs.image_hidden_states, expected.image_hidden_states)


@torch.no_grad()
def test_arguments_are_those_of_the_captioner(make_model):
    model = make_model()
    ids = prompt_ids(model, 5, 6, 7)
    images = model.get_image_features(pixels(model, 1))
    base_model, whole = model.base_model, model.base_model(input_ids=ids, mm_encoder_outputs={"image": images})
    assert base_model(input_ids=ids, mm_encoder_outputs={"image": images}, return_dict=False)[0].equal(whole[0])
    hidden_states = base_model(
        input_ids=ids, mm_encoder_outputs={"image": images}, output_hidden_states=True
    ).hidden_states
    assert torch.equal(hidden_states[-1], whole.last_hidden_state)
    # ... and with a cache, as decoding uses it
    first = base_model(input_ids=ids[:, :-1], mm_encoder_outputs={"image": images}, use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    last = base_model(input_ids=ids[:, -1:], **{name: first[name]}).last_hidden_state
    torch.testing.assert_close(last, whole.last_hidden_state[:, -1:])
    with pytest.raises(TypeError, match="has the argument `colour`"):
        base_model(input_ids=ids, mm_encoder_outputs={"image": images}, colour="red")
    with pytest.raises(ValueError, match="need 8"):
        base_model(input_ids=ids, pixel_values=pixels(model, 2))


@torch.no_grad()
def test_rows_with_several_captions_per_image(make_model, processor, images):
    """`prefix_index` and 4-dimensional masks, as training with `--references together` passes them."""
    model = make_model(text_config=tiny_language_model("llama"))
    collate = CaptioningCollator(processor, captions_together=True)
    batch = collate([{"image": images[0], "captions": ["a red heart", "a blue dog"]}])
    del batch["labels"], batch["predictor_index"]
    assert batch["attention_mask"].ndim == 4
    hidden = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**batch).logits)


# -- one set of weights


def test_names_of_weights_are_those_of_the_captioner(make_model):
    model = make_model()
    assert model.base_model_prefix == "model" and model.base_model is model.model and model.base_model is not model
    assert isinstance(model, ClipCapPreTrainedModel) and isinstance(model.model, ClipCapPreTrainedModel)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in model.model.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"vision_tower", "mapping_network", "language_model"}
    assert all(mine is its for mine, its in zip(model.parameters(), model.model.parameters(), strict=True))
    assert not model.base_model.can_generate()


@torch.no_grad()
def test_what_is_replaced_or_trained_in_one_is_so_in_the_other(make_model, text_config):
    model = make_model()
    model.language_model = GPT2LMHeadModel(text_config).eval()
    assert model.model.language_model is model.language_model
    inputs = {"input_ids": prompt_ids(model, 5), "pixel_values": pixels(model, 1)}
    model.mapping_network.fc1.weight += 1
    hidden = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits)
    for mode in (True, False):
        model.train(mode)
        assert model.model.training is mode and not model.vision_tower.training


@torch.no_grad()
def test_copies_are_independent(make_model):
    model = make_model()
    copied = copy.deepcopy(model)
    assert copied.model is not model.model and copied.model.mapping_network is copied.mapping_network
    copied.mapping_network.fc1.weight += 1
    assert not torch.equal(copied.model.mapping_network.fc1.weight, model.model.mapping_network.fc1.weight)


# -- checkpoints


@pytest.mark.parametrize("folder", [OLD_FOLDER, EMOJI_MINI], ids=["0.1.0", "emoji-mini"])
def test_checkpoints_of_captioners_load_as_base_models(tmp_path, folder):
    model, base_model = ClipCapForConditionalGeneration.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert type(base_model) is ClipCapModel
    assert_same_weights(model, base_model)
    model.save_pretrained(tmp_path)
    # Earlier releases can read it. A tied head may stand in the older checkpoint, too.
    assert names_in(tmp_path) == names_in(folder) - {"language_model.lm_head.weight"}


def test_checkpoints_of_base_models_load_as_captioners(tmp_path, make_model):
    model = make_model(mapping_type="transformer")
    model.base_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "captioner")
    assert names_in(tmp_path / "base") == names_in(tmp_path / "captioner")
    for name in ("base", "captioner"):
        architecture = {"base": "ClipCapModel", "captioner": "ClipCapForConditionalGeneration"}[name]
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [architecture]
        for model_class in (ClipCapModel, ClipCapForConditionalGeneration):
            assert_same_weights(model_class.from_pretrained(tmp_path / name), model)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_checkpoints_without_frozen_parts(tmp_path, clip_config, text_config, tokenizer, lora):
    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path / "clip")
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(tmp_path / "gpt2"), freeze_language_model=True, save_frozen=False, lora=lora
    )
    model.save_pretrained(tmp_path / "light")
    base_model = AutoModel.from_pretrained(tmp_path / "light")
    assert_same_weights(base_model, model)
    base_model.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(tmp_path / "light")
    assert all(name.startswith("mapping_network.") or ".lora_" in name for name in names_in(tmp_path / "light"))
    assert {name for name, weight in base_model.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }
    assert_same_weights(ClipCapForConditionalGeneration.from_pretrained(tmp_path / "again"), model)
