import inspect
import json

import pytest
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, OpenClipVisionConfig
from clipcap_hf.model.configuration_clipcap import UNSUITED_LANGUAGE_MODELS, context_length
from clipcap_hf.model.versions_clipcap import CACHE
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BloomConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    SiglipVisionConfig,
    XLNetConfig,
)


def test_defaults_are_gpt2_without_a_tower():
    config = ClipCapConfig()
    assert config.vision_config is None
    assert isinstance(config.text_config, GPT2Config)
    assert (config.mapping_type, config.prefix_length, config.clip_embed_dim) == ("mlp", 10, 512)
    assert config.image_token_id == 50257  # the first id that GPT-2 does not have
    assert config.freeze_vision and not config.freeze_language_model and not config.normalize_clip_embeds


@pytest.mark.parametrize("mapping_type", ["mlp", "transformer", "linear"])
def test_round_trip(tmp_path, text_config, clip_config, mapping_type):
    config = ClipCapConfig(
        vision_config=clip_config,
        text_config=text_config,
        mapping_type=mapping_type,
        prefix_length=7,
        normalize_clip_embeds=True,
        mapping_num_layers=3,
        mapping_num_heads=4,
        mapping_mlp_ratio=1.5,
        mapping_layer_norm_eps=1e-6,
        freeze_vision=False,
        freeze_language_model=True,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ClipCapConfig
    assert again.to_json_string() == config.to_json_string()
    assert isinstance(again.vision_config, CLIPVisionConfig) and isinstance(again.text_config, GPT2Config)
    assert again.clip_length == (7 if mapping_type == "transformer" else None)


def test_round_trip_without_a_tower(tmp_path, text_config):
    ClipCapConfig(text_config=text_config, clip_embed_dim=24).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"] is None
    again = ClipCapConfig.from_pretrained(tmp_path)
    assert again.vision_config is None and again.clip_embed_dim == 24


def test_round_trip_with_an_open_clip_tower(tmp_path, text_config, open_clip_configs):
    ClipCapConfig(vision_config=open_clip_configs["vit"], text_config=text_config).save_pretrained(tmp_path)
    again = ClipCapConfig.from_pretrained(tmp_path).vision_config
    assert isinstance(again, OpenClipVisionConfig)
    assert again.vision_cfg == open_clip_configs["vit"].vision_cfg
    assert again.quick_gelu is True


def test_sub_configs_may_be_dicts():
    config = ClipCapConfig(
        vision_config={
            "model_type": "open_clip_vision_model",
            "embed_dim": 640,
            "vision_cfg": {"layers": [4, 6, 10, 6]},
        },
        text_config={"model_type": "opt", "vocab_size": 99, "hidden_size": 8, "word_embed_proj_dim": 8},
    )
    assert isinstance(config.vision_config, OpenClipVisionConfig)
    assert config.text_config.model_type == "opt"
    assert (config.clip_embed_dim, config.image_token_id) == (640, 99)
    # A dictionary without a type is a CLIP tower.
    assert isinstance(ClipCapConfig(vision_config={"projection_dim": 8}).vision_config, CLIPVisionConfig)


def test_embedding_width_is_that_of_the_tower(text_config, clip_config):
    clip_config.projection_dim = 24
    assert ClipCapConfig(vision_config=clip_config, text_config=text_config).clip_embed_dim == 24
    siglip = SiglipVisionConfig(hidden_size=48)
    assert ClipCapConfig(vision_config=siglip, text_config=text_config).clip_embed_dim == 48


def test_clip_embed_dim_contradicts_the_tower(clip_config):
    with pytest.raises(ValueError, match=r"`clip_embed_dim` is 640.*width 16.*Leave `clip_embed_dim` out"):
        ClipCapConfig(vision_config=clip_config, clip_embed_dim=640)


def test_unknown_mapping_type():
    with pytest.raises(Exception, match=r"(?s)mapping_type.*'mlp', 'transformer', 'linear'.*rnn"):
        ClipCapConfig(mapping_type="rnn")


@pytest.mark.parametrize("name", ["prefix_length", "clip_length", "clip_embed_dim", "mapping_num_layers"])
def test_lengths_are_positive(text_config, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        ClipCapConfig(text_config=text_config, mapping_type="transformer", mapping_num_heads=4, **{name: 0})


def test_heads_must_divide_the_hidden_size(text_config):
    with pytest.raises(ValueError, match=r"hidden size 32 is not divisible by `mapping_num_heads` = 5.*[Cc]hoose"):
        ClipCapConfig(text_config=text_config, mapping_type="transformer", mapping_num_heads=5)
    ClipCapConfig(text_config=text_config, mapping_type="mlp", mapping_num_heads=5)  # an MLP has no heads


def test_language_model_must_be_causal():
    with pytest.raises(ValueError, match="`t5` is an encoder-decoder"):
        ClipCapConfig(text_config={"model_type": "t5"})


def test_language_model_whose_embeddings_are_narrower_than_its_layers():
    with pytest.raises(ValueError, match=r"`opt`.*`word_embed_proj_dim` 4.*`hidden_size` 8"):
        ClipCapConfig(text_config={"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4})


def test_prefix_must_fit_the_context(text_config):
    with pytest.raises(ValueError, match=r"`prefix_length` is 64.*context is 64"):
        ClipCapConfig(text_config=text_config, prefix_length=64)


def test_tower_without_a_known_width(text_config):
    with pytest.raises(ValueError, match="embedding width of a `timm_wrapper` tower.*Pass `clip_embed_dim=`"):
        ClipCapConfig(vision_config={"model_type": "timm_wrapper", "num_features": None}, text_config=text_config)


def test_open_clip_config(tmp_path):
    config = OpenClipVisionConfig(embed_dim=16, vision_cfg={"image_size": [96, 64], "layers": 2}, quick_gelu=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is OpenClipVisionConfig
    assert again.to_json_string() == config.to_json_string()
    assert again.image_size == 96
    assert OpenClipVisionConfig().image_size == 224


def test_open_clip_config_never_downloads_timm_weights():
    given = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True}
    assert OpenClipVisionConfig(vision_cfg=given).vision_cfg["timm_model_pretrained"] is False
    assert given["timm_model_pretrained"] is True  # the caller's dictionary stays unchanged


@pytest.mark.parametrize(
    ("text_config", "length"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=96), 96),
        (MptConfig(max_seq_len=48), 48),
        (BloomConfig(), None),
        (XLNetConfig(), None),  # its value is -1
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_context_length(text_config, length):
    assert context_length(text_config) == length
    if length is None and text_config.model_type not in UNSUITED_LANGUAGE_MODELS:
        ClipCapConfig(text_config=text_config, prefix_length=2000)


@pytest.mark.parametrize("model_type", UNSUITED_LANGUAGE_MODELS)
def test_language_models_that_cannot_write_captions(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)  # without weights, which are not needed
    with pytest.raises(ValueError, match=f"A `{model_type}` cannot be a captioner's language model: it "):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(tmp_path))


@pytest.mark.slow
def test_every_other_language_model_reads_embeddings_and_a_mask_and_has_a_cache():
    unsuited = set()
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        except (ImportError, AttributeError):
            continue  # needs another package
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        parameters = inspect.signature(model_class.forward).parameters
        if not {"inputs_embeds", "attention_mask", CACHE} <= parameters.keys():
            unsuited.add(config_class.model_type)
    assistants = {name for name in unsuited if name.endswith("_assistant")}  # read the cache of another model
    assert unsuited - assistants <= UNSUITED_LANGUAGE_MODELS.keys()


@pytest.mark.parametrize(
    "vision_cfg",
    [
        {"image_size": 200_000},
        {"image_size": [224, 10**6]},
        {"width": "wide"},
        {"layers": [1, 10**9]},
        {"layers": 2.5},
    ],
    ids=str,
)
def test_open_clip_sizes_that_no_tower_has(vision_cfg):
    with pytest.raises(ValueError, match=f"`{next(iter(vision_cfg))}` of the open_clip tower must be a whole number"):
        OpenClipVisionConfig(vision_cfg=vision_cfg)
