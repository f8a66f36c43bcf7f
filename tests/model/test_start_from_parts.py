"""New captioners from pretrained towers and language models."""

import copy
import json

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, OpenClipVisionModel
from safetensors.torch import save_file
from tiny_inputs import aligned, assert_same_weights, pixels
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    GPT2LMHeadModel,
)


TEXT_CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2}
    | {
        "num_attention_heads": 4,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"bos_token_id": 0, "eos_token_id": 0},
    "qwen3": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": True},
}


def text_folder(tmp_path, model_type, vocab_size=290):
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **TEXT_CONFIGS[model_type])
    language_model = AutoModelForCausalLM.from_config(config)
    language_model.save_pretrained(tmp_path / model_type)
    return tmp_path / model_type, language_model


@pytest.mark.parametrize("model_type", list(TEXT_CONFIGS))
def test_from_language_model_folder(tmp_path, model_type, clip_config):
    folder, donor = text_folder(tmp_path, model_type)
    clip = CLIPVisionModelWithProjection(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    torch.manual_seed(5)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(folder), mapping_type="transformer", mapping_num_layers=1, prefix_length=3
    ).eval()
    assert_same_weights(model.language_model, donor)
    assert_same_weights(model.vision_tower, clip)
    assert model.config.text_config.model_type == model_type
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.vision_tower.config._attn_implementation == "sdpa"
    assert (model.config.prefix_length, model.config.image_token_id) == (3, 290)

    settings = model.generation_config
    eos = TEXT_CONFIGS[model_type]["eos_token_id"]
    assert settings.eos_token_id == eos
    assert settings.pad_token_id == TEXT_CONFIGS[model_type].get("pad_token_id", eos)
    # 67 as in the official code, or what the context leaves after the prefix.
    assert settings.max_new_tokens == (64 - 3 if model_type == "gpt2" else 67)
    assert not settings.do_sample

    images = pixels(model)
    captions = aligned(model).generate(pixel_values=images)
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    assert_same_weights(model, again)
    assert torch.equal(aligned(again).generate(pixel_values=images), captions)


def test_new_mapping_network_follows_the_seed(tmp_path):
    folder, _ = text_folder(tmp_path, "gpt2")

    def start(seed):
        torch.manual_seed(seed)
        model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
            None, str(folder), mapping_type="transformer"
        )
        return model.mapping_network

    assert_same_weights(start(1), start(1))
    assert not torch.equal(start(1).prefix_const, start(2).prefix_const)
    network = start(1)
    bound = network.clip_projection.in_features**-0.5
    assert 0.9 * bound < network.clip_projection.weight.abs().max() <= bound
    assert 0.7 < network.prefix_const.std() < 1.3


def test_from_a_whole_clip_folder(tmp_path, clip_config):
    folder, _ = text_folder(tmp_path, "gpt2")
    config = CLIPConfig(
        vision_config=clip_config.to_dict(),
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=16,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "clip"), str(folder)).eval()
    assert torch.equal(model.vision_tower.visual_projection.weight, clip.visual_projection.weight)
    images = pixels(model)
    with torch.no_grad():
        embeds = aligned(model).get_clip_embeds(images)
    torch.testing.assert_close(embeds, clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output))
    assert model.config.clip_embed_dim == 16
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    with torch.no_grad():
        assert torch.equal(aligned(again).get_clip_embeds(images), embeds)


def test_projection_width_of_a_whole_clip_is_that_of_its_vision_config(tmp_path, clip_config):
    # CLIPModel projects to its own `projection_dim`, whatever its vision configuration says.
    folder, _ = text_folder(tmp_path, "gpt2")
    config = CLIPConfig(
        vision_config={**clip_config.to_dict(), "projection_dim": 512},
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=24,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "clip"), str(folder)).eval()
    assert model.config.clip_embed_dim == 24
    assert torch.equal(model.vision_tower.visual_projection.weight, clip.visual_projection.weight)


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
def test_from_an_open_clip_folder(tmp_path, open_clip_configs, tower):
    folder, _ = text_folder(tmp_path, "gpt2")
    config = open_clip_configs[tower]
    donor = OpenClipVisionModel(config).eval()
    (tmp_path / "tower").mkdir()
    model_cfg = {"embed_dim": 16, "vision_cfg": config.vision_cfg, "quick_gelu": config.quick_gelu, "text_cfg": {}}
    preprocess_cfg = {"size": config.image_size, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "tower" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    save_file(donor.state_dict(), tmp_path / "tower" / "open_clip_model.safetensors")

    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "tower"), str(folder)).eval()
    assert type(model.vision_tower) is (CLIPVisionModelWithProjection if tower == "vit" else OpenClipVisionModel)
    images = pixels(model)
    with torch.no_grad():  # attention takes another path with gradients
        embeds = aligned(model).get_clip_embeds(images)
        torch.testing.assert_close(embeds, donor.visual(images), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    with torch.no_grad():
        assert torch.equal(aligned(again).get_clip_embeds(images), embeds)


def test_from_loaded_parts_and_in_bfloat16(tmp_path, clip_config, text_config):
    clip, gpt2 = CLIPVisionModelWithProjection(clip_config), GPT2LMHeadModel(text_config)
    weights = copy.deepcopy(gpt2.state_dict())
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(clip, gpt2, freeze_language_model=True)
    assert model.language_model is gpt2 and model.vision_tower is clip
    assert all(torch.equal(weights[name], value) for name, value in gpt2.state_dict().items())
    assert not any(parameter.requires_grad for parameter in gpt2.parameters())

    clip.save_pretrained(tmp_path / "clip")
    gpt2.save_pretrained(tmp_path / "gpt2")
    half = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(tmp_path / "gpt2"), dtype=torch.bfloat16
    )
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    full = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "clip", tmp_path / "gpt2", vision_kwargs={"local_files_only": True}
    )
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


def test_placeholder_of_a_vocabulary_that_is_larger_than_its_tokenizer(tmp_path, make_tokenizer):
    # As with OPT and Qwen: the language model has more rows than the tokenizer has tokens.
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    folder, _ = text_folder(tmp_path, "gpt2", vocab_size=vocabulary + 30)
    tokenizer.save_pretrained(folder)
    processor = ClipCapProcessor.from_vision_text_pretrained(None, str(folder), prefix_length=4)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(folder), prefix_length=4)
    assert model.config.image_token_id == processor.image_token_id == vocabulary
    inputs = processor(text=["a red", ""], clip_embeds=torch.randn(2, 512), return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=20).shape[0] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_langauge_model": True}, "did you mean `freeze_language_model`"),
        ({"token": "hf_secret"}, "no field `token`.*`vision_kwargs` or `text_kwargs`"),
        ({"torch_dtype": torch.bfloat16}, "did you mean `dtype`"),
    ],
)
def test_what_is_no_field_of_the_configuration(clip_config, text_config, fields, message):
    with pytest.raises(TypeError, match=message):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(
            CLIPVisionModelWithProjection(clip_config), GPT2LMHeadModel(text_config), **fields
        )


def test_what_is_no_causal_language_model(tmp_path, clip_config):
    clip = CLIPVisionModelWithProjection(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    start = ClipCapForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="clip is a `clip_vision_model`, which is not a causal language model"):
        start(clip, tmp_path / "clip")
    with pytest.raises(TypeError, match="`text` must be the name or folder of a model"):
        start(clip, None)
    with pytest.raises(OSError, match="Could not load the language model 'no/such'"):
        start(clip, "no/such")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=290, **sizes)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="A `bert` is an encoder.*is_decoder"):
        start(clip, tmp_path / "bert")
    decoder = BertLMHeadModel.from_pretrained(tmp_path / "bert", is_decoder=True)
    model = start(clip, decoder, prefix_length=4).eval()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    logits = model.language_model(ids).logits
    torch.testing.assert_close(logits[0, :3], logits[1, :3])


def test_code_of_a_language_model_is_not_run_unasked(tmp_path, monkeypatch):
    # Without our setting, transformers asks on standard input, and `yes |` would answer.
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(tmp_path))
    assert not (tmp_path / "was-run").exists()
