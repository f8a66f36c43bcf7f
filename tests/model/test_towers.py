"""Vision towers of transformers, and finding towers by name."""

import pytest
import torch
import transformers
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.model.modeling_vision import build_vision_tower, embed_pixels, load_vision_config, vision_feature_dim
from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel, SiglipConfig, SiglipModel


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = {**SIZES, "intermediate_size": 48}
STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
# Configuration class and fields, width of the embedding, number and width of the patch tokens at 32 pixels.
TOWERS = {
    "clip": ("CLIPVisionConfig", {**VIT, "projection_dim": 16}, 16, (16, 32)),
    "metaclip2": ("MetaClip2VisionConfig", {**VIT, "projection_dim": 16}, 16, (16, 32)),
    "siglip": ("SiglipVisionConfig", VIT, 32, (16, 32)),
    "dinov2": ("Dinov2Config", SIZES, 32, (16, 32)),
    "dinov2-registers": ("Dinov2WithRegistersConfig", SIZES, 32, (16, 32)),
    "dinov3": ("DINOv3ViTConfig", VIT, 32, (16, 32)),
    "dinov3-convnext": ("DINOv3ConvNextConfig", STAGES, 24, (1, 24)),
    "vit": ("ViTConfig", VIT, 32, (16, 32)),
    "deit": ("DeiTConfig", VIT, 32, (16, 32)),
    "beit": ("BeitConfig", VIT, 32, (16, 32)),
    "convnext": ("ConvNextConfig", STAGES, 24, (1, 24)),
    "swin": ("SwinConfig", WINDOWS, 32, (16, 32)),
    "resnet": ("ResNetConfig", {**STAGES, "embedding_size": 8}, 24, (1, 24)),
    "efficientnet": (
        "EfficientNetConfig", {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}, 320, (1, 320)
    ),
    "hiera": (
        "HieraConfig",
        {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "num_query_pool": 2},
        32, (4, 32),
    ),
    "without-a-pooler": ("IJepaConfig", VIT, 32, (16, 32)),
    "timm": ("TimmWrapperConfig", {"architecture": "test_resnet", "model_args": {}}, 96, (1, 96)),
}  # fmt: skip


def tower_config(name):
    class_name, fields, _, _ = TOWERS[name]
    return getattr(transformers, class_name)(**fields)


@pytest.fixture
def text_folder(tmp_path, text_config, tokenizer):
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_of_transformers(tmp_path, text_folder, name):
    _, _, width, patches = TOWERS[name]
    tower = build_vision_tower(tower_config(name)).eval()
    tower.save_pretrained(tmp_path / "tower")
    pixels = torch.randn(2, 3, 32, 32)
    assert embed_pixels(tower, pixels, "patches")[0].shape == (2, *patches)

    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "tower"), text_folder).eval()
    assert model.config.clip_embed_dim == width
    outputs = tower(pixels)
    if name == "without-a-pooler":
        expected = outputs.last_hidden_state.mean(1)
    else:
        expected = outputs.get("image_embeds")
        expected = outputs.pooler_output.flatten(1) if expected is None else expected
    torch.testing.assert_close(model.get_clip_embeds(pixels), expected)
    captions = model.generate(pixel_values=pixels, max_new_tokens=4)

    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    torch.testing.assert_close(again.get_clip_embeds(pixels), expected)
    assert torch.equal(again.generate(pixel_values=pixels, max_new_tokens=4), captions)


@pytest.mark.parametrize("name", ["dinov2-registers", "deit", "siglip"])
@torch.no_grad()
def test_class_and_register_tokens_are_no_patches(name):
    tower = build_vision_tower(tower_config(name)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    others = {"dinov2-registers": 5, "deit": 2, "siglip": 0}[name]
    tokens = tower(pixels).last_hidden_state
    assert tokens.shape[1] == 16 + others
    assert torch.equal(embed_pixels(tower, pixels, "patches")[0], tokens[:, others:])


@torch.no_grad()
def test_siglip_out_of_a_whole_repository(tmp_path, text_folder):
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    siglip = SiglipModel(SiglipConfig(vision_config=VIT, text_config=text)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "siglip"), text_folder).eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = siglip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(model.get_clip_embeds(pixels), getattr(expected, "pooler_output", expected))


def test_encoders_of_anything_but_plain_images(tmp_path, text_config):
    for config in (transformers.Siglip2VisionConfig(hidden_size=32, num_attention_heads=4), text_config):
        with pytest.raises(ValueError, match=f"A `{config.model_type}` is not an encoder of plain images"):
            vision_feature_dim(config, "pooled")
    with pytest.raises(ValueError, match="transformers' AutoModel does not support `blip_vision_model`"):
        vision_feature_dim(transformers.BlipVisionConfig(**VIT), "pooled")
    with pytest.raises(ValueError, match="`vit_mae` tower hides patches at random"):
        vision_feature_dim(transformers.ViTMAEConfig(**VIT), "pooled")


def test_weights_that_would_be_random(tmp_path, text_folder):
    # As in repositories of classifiers, which have no pooling layer.
    transformers.ViTModel(tower_config("vit"), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    with pytest.raises(
        ValueError, match=r"lacks 2 weights of its `vit` tower, for example pooler\.dense\.bias.*patches"
    ):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "vit"), text_folder)
    kwargs = {"vision_feature": "patches", "mapping_type": "transformer", "mapping_num_heads": 4}
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "vit"), text_folder, **kwargs)
    assert model.config.clip_embed_dim == 32


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("ViT-B-33/openai", "'ViT-B-32/openai'"),
        ("ViT-B/32", "'ViT-B-32/openai'"),
        ("RN50x4", "'RN50x4/openai'"),
        ("openai/clip-vit-base-patch-32", "'openai/clip-vit-base-patch32'"),
        ("google/siglp2-base-patch16-224", "'google/siglip2-base-patch16-224'"),
    ],
)
def test_unknown_names(text_folder, name, suggestion):
    with pytest.raises(ValueError, match=f"There is no vision tower '{name}'; did you mean .*{suggestion}"):
        load_vision_config(name)
    for from_names in (
        ClipCapForConditionalGeneration.from_vision_text_pretrained,
        ClipCapProcessor.from_vision_text_pretrained,
    ):
        with pytest.raises(ValueError, match=f"There is no vision tower '{name}'; did you mean .*{suggestion}"):
            from_names(name, text_folder)


@pytest.mark.parametrize(
    ("name", "found"), [("EVA02", "'EVA02-"), ("siglip", "SigLIP"), ("mobileclip", "'MobileCLIP")]
)
def test_parts_of_names(name, found):
    with pytest.raises(ValueError, match=f"There is no vision tower '{name}'; did you mean .*{found}"):
        load_vision_config(name)


def test_a_known_name_that_cannot_be_loaded():
    name = "openai/clip-vit-base-patch32"
    with pytest.raises(ValueError, match=f"Could not load the vision tower '{name}': "):
        load_vision_config(name)


def test_captioners_are_no_towers(model_folder):
    with pytest.raises(ValueError, match="is a captioner, not a vision tower"):
        load_vision_config(str(model_folder))


def test_tower_of_a_model_without_projection(tmp_path, clip_config):
    llava = transformers.LlavaConfig(vision_config=clip_config)
    llava.save_pretrained(tmp_path)
    assert load_vision_config(str(tmp_path)).projection_dim == clip_config.projection_dim


def test_names_near_nothing():
    with pytest.raises(ValueError, match=r"There is no vision tower 'no/such-thing'\. \("):
        load_vision_config("no/such-thing")


def test_widths_are_compared_before_weights_are_loaded(tmp_path, clip_config, text_folder):
    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`clip_embed_dim` is 640, but the vision tower gives embeddings of width 16"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path / "clip"), text_folder, clip_embed_dim=640
        )
    # open_clip names, whose weights would need a download.
    with pytest.raises(
        ValueError, match="`clip_embed_dim` is 512, but the vision tower gives embeddings of width 640"
    ):
        ClipCapForConditionalGeneration.from_vision_text_pretrained("RN50x4/openai", text_folder, clip_embed_dim=512)


def test_width_by_hand(text_config):
    # Without `hidden_size`, but with an explicit width.
    config = ClipCapConfig(vision_config=tower_config("resnet"), text_config=text_config, clip_embed_dim=24)
    assert config.clip_embed_dim == 24
    with pytest.raises(ValueError, match="Cannot tell the embedding width of a `resnet` tower.*`clip_embed_dim="):
        ClipCapConfig(vision_config=tower_config("resnet"), text_config=text_config)
