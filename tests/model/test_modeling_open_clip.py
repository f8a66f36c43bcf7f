import json
import subprocess
import sys

import open_clip
import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, OpenClipVisionConfig, OpenClipVisionModel
from clipcap_hf.model.modeling_open_clip import is_open_clip_name, load_open_clip_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError
from open_clip.model import CLIP
from safetensors.torch import save_file
from transformers import AutoModel, CLIPVisionModelWithProjection


TIMM = {"timm_pool": "", "timm_proj": "linear"}
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
    "vit-tokens": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 1,
        "head_width": 32,
        "output_tokens": True,
    },
    "vit-attentional-pool": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "vit-sin-cos": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    | {"pos_embed_type": "sin_cos_2d", "pool_type": "avg"},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "efficientnet": {"image_size": 64, "timm_model_name": "tf_efficientnet_lite0", **TIMM, "timm_pool": "avg"},
    "siglip": {
        "image_size": 32,
        "timm_model_name": "vit_test_siglip",
        **TIMM,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "eva": {"image_size": 32, "timm_model_name": "eva_test", "timm_pool": "token", "timm_proj": None},
    "swin": {"image_size": 64, "timm_model_name": "swin_test", **TIMM, "timm_pool": "avg"},
    "convnext": {"image_size": 32, "timm_model_name": "test_convnext", **TIMM, "timm_pool": "avg"},
    "mobileclip": {"image_size": 64, "timm_model_name": "mci_test", "timm_pool": "avg", "timm_proj": None},
    "perception-encoder": {"image_size": 32, "timm_model_name": "pe_test", "timm_pool": "map", "timm_proj": None},
    "vitamin": {"image_size": 64, "timm_model_name": "vitamin_test", **TIMM},
    "relative-positions": {"image_size": 32, "timm_model_name": "relpos_test", **TIMM},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_timm_models():
    """Build towers of the families that open_clip takes from timm, a few kilobytes each."""
    from timm.models import (
        eva,
        fastvit,
        register_model,
        swin_transformer,
        vision_transformer,
        vision_transformer_relpos,
        vitamin,
    )

    small = {"embed_dim": 48, "depth": 2, "num_heads": 2}

    def vit_test_siglip(pretrained=False, **kwargs):
        sizes = {
            "patch_size": 16,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 2,
            "class_token": False,
            "global_pool": "map",
            "img_size": 32,
        }
        return vision_transformer._create_vision_transformer("vit_base_patch16_siglip_224", **{**sizes, **kwargs})

    def eva_test(pretrained=False, **kwargs):
        sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 32}
        return eva._create_eva(
            "eva02_tiny_patch14_224", use_rot_pos_emb=True, ref_feat_shape=(4, 4), **{**sizes, **kwargs}
        )

    def swin_test(pretrained=False, **kwargs):
        sizes = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        return swin_transformer._create_swin_transformer("swin_tiny_patch4_window7_224", **{**sizes, **kwargs})

    def mci_test(pretrained=False, **kwargs):
        return fastvit.fastvit_mci0(layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), **kwargs)

    def pe_test(pretrained=False, **kwargs):
        return eva.vit_pe_core_tiny_patch16_384(**small, img_size=32, ref_feat_shape=(2, 2), **kwargs)

    def vitamin_test(pretrained=False, **kwargs):
        stem = vitamin.VitCfg(
            embed_dim=(16, 24, 48),
            depths=(1, 1, 1),
            stem_width=16,
            conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        )
        return vitamin.vitamin_small_224(**small, img_size=64, embed_cfg=stem, **kwargs)

    def relpos_test(pretrained=False, **kwargs):
        sizes = {**small, "rel_pos_dim": 16, "img_size": 32}
        return vision_transformer_relpos.vit_relpos_medium_patch16_cls_224(**sizes, **kwargs)

    for function in (vit_test_siglip, eva_test, swin_test, mci_test, pe_test, vitamin_test, relpos_test):
        function.__module__ = "timm.models.vision_transformer"
        register_model(function)


def build(name, **kwargs):
    torch.manual_seed(0)
    embed_dim = 48 if name in ("siglip", "eva") else 16
    model = OpenClipVisionModel(OpenClipVisionConfig(embed_dim=embed_dim, vision_cfg=TOWERS[name], **kwargs))
    with torch.no_grad():
        for parameter in model.parameters():  # no tower may hide a difference behind zeros
            parameter.add_(0.02 * torch.randn_like(parameter))
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:  # statistics that preserve the signal
            model.train()(torch.randn(8, 3, model.config.image_size, model.config.image_size))
    return model.eval()


def images(model):
    return torch.randn(2, 3, model.config.image_size, model.config.image_size)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_output_is_that_of_open_clip(name):
    model = build(name)
    text_cfg = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    reference = CLIP(model.config.embed_dim, dict(TOWERS[name]), text_cfg).eval()
    reference.visual.load_state_dict(model.visual.state_dict())
    pixels = images(model)
    outputs = model(pixel_values=pixels)
    expected = reference.encode_image(pixels) if name != "vit-tokens" else reference.visual(pixels)[0]
    assert outputs.image_embeds.shape == (2, model.config.embed_dim)
    assert torch.equal(outputs.image_embeds, expected)
    assert not torch.allclose(*outputs.image_embeds)
    if name == "vit-tokens":
        assert torch.equal(outputs.last_hidden_state, reference.visual(pixels)[1])
        assert torch.equal(model(pixel_values=pixels, return_dict=False)[0], outputs.image_embeds)


PATCHES = {
    "vit-attentional-pool": 4,
    "resnet": 1,
    "efficientnet": 4,
    "eva": 16,
    "swin": 64,
    "convnext": 1,
    "vitamin": 16,
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_patches(name):
    model = build(name)
    pixels = images(model)
    outputs = model(pixels, output_patches=True)
    assert outputs.last_hidden_state.shape == (2, PATCHES.get(name, 4), model.config.hidden_size)
    torch.testing.assert_close(outputs.image_embeds, model(pixels).image_embeds, rtol=0, atol=1e-6)
    if not hasattr(model.visual, "trunk"):
        expected = model.visual.forward_intermediates(pixels, indices=1, intermediates_only=True)[
            "image_intermediates"
        ]
    else:
        norm = name not in ("mobileclip", "efficientnet")  # these end with a convolution, not a norm
        expected = model.visual.trunk.forward_intermediates(pixels, indices=1, norm=norm, intermediates_only=True)
    if name not in ("mobileclip", "efficientnet"):
        expected = expected[-1].flatten(2).transpose(1, 2)
        torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_saving_is_exact(tmp_path, name, dtype):
    model = build(name, quick_gelu=name == "vit").to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is OpenClipVisionModel and again.dtype == dtype
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # Tables that are not saved (rotary embeddings, attention masks) must be computed again.
    buffers = dict(again.named_buffers())
    for key, value in model.named_buffers():
        torch.testing.assert_close(buffers[key].to(value.dtype), value, rtol=0, atol=0)
    for tensor in again.parameters():
        tensor.data = tensor.data.clone()  # loaded weights are unaligned, which changes the last bit
    pixels = images(model)  # in fp32, whatever the tower's dtype
    assert torch.equal(again(pixels).image_embeds, model(pixels).image_embeds)


@pytest.mark.parametrize("name", ["eva", "swin"])
@torch.no_grad()
def test_tables_outside_the_checkpoint_inside_a_captioner(tmp_path, text_config, name):
    config = ClipCapConfig(vision_config=build(name).config, text_config=text_config)
    model = ClipCapForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    pixels = images(model.vision_tower)
    torch.testing.assert_close(again.get_clip_embeds(pixels), model.get_clip_embeds(pixels))


def test_quick_gelu_is_stored_and_matters(tmp_path):
    quick, plain = build("vit", quick_gelu=True), build("vit")
    plain.load_state_dict(quick.state_dict())
    pixels = images(quick)
    assert not torch.allclose(quick(pixels).image_embeds, plain(pixels).image_embeds)
    quick.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quick_gelu"] is True
    again = OpenClipVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixels).image_embeds, quick(pixels).image_embeds)


def test_unknown_field():
    with pytest.raises(ValueError, match="unknown fields: layer_count, size"):
        OpenClipVisionModel(OpenClipVisionConfig(vision_cfg={"size": 32, "layer_count": 2, "width": 64}))


def write_open_clip(folder, model, **model_cfg):
    folder.mkdir()
    config = {
        "model_cfg": {
            "embed_dim": model.config.embed_dim,
            "vision_cfg": model.config.vision_cfg,
            "text_cfg": {},
            **model_cfg,
        },
        "preprocess_cfg": {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({**model.state_dict(), "logit_scale": torch.ones(1)}, folder / "open_clip_model.safetensors")
    return str(folder)


@torch.no_grad()
def test_from_open_clip_folder(tmp_path):
    donor = build("vit", quick_gelu=True)
    name = write_open_clip(tmp_path / "vit", donor, quick_gelu=True)
    assert is_open_clip_name(name)
    model = OpenClipVisionModel.from_open_clip(name).eval()
    assert model.config.quick_gelu
    pixels = images(donor)
    torch.testing.assert_close(model(pixels).image_embeds, donor(pixels).image_embeds)
    assert OpenClipVisionModel.from_open_clip(name, dtype=torch.bfloat16).dtype == torch.bfloat16
    _, preprocess_cfg, weights = load_open_clip_checkpoint(name, with_weights=False)
    assert preprocess_cfg["mean"] == [0.1, 0.2, 0.3] and not weights


def test_weights_that_do_not_fit_the_configuration(tmp_path):
    donor = build("vit")
    donor.config.vision_cfg["layers"] = 3
    name = write_open_clip(tmp_path / "vit", donor)
    with pytest.raises(ValueError, match=rf"(?s)The weights of {name} do not fit.*resblocks\.2"):
        OpenClipVisionModel.from_open_clip(name)


def test_names_are_told_apart_without_importing_open_clip():
    """Its import takes half a second, which loading a tower from the Hub should not."""
    script = """
import json, sys
from clipcap_hf.model.checkpoints_open_clip import is_open_clip_name
names = sys.stdin.read().split()
found = [is_open_clip_name(name) for name in names]
print(json.dumps({"found": found, "imported": "open_clip" in sys.modules}))
"""
    names = [f"{architecture}/openai" for architecture in open_clip.list_models()]
    others = ["openai/clip-vit-base-patch32", "vit-b-32/openai"]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input="\n".join(names + others), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"found": [True] * len(names) + [False] * 2, "imported": False}


def test_names_of_open_clip(tmp_path):
    assert is_open_clip_name("ViT-B-32/openai") and is_open_clip_name("hf-hub:laion/CLIP-ViT-B-32")
    assert not is_open_clip_name("openai/clip-vit-base-patch32")
    assert not is_open_clip_name("ViT-B-32") and not is_open_clip_name(str(tmp_path))
    with pytest.raises(ValueError, match="no weights 'nobody' for ViT-B-32. It has: openai, "):
        load_open_clip_checkpoint("ViT-B-32/nobody")
    with pytest.raises(ValueError, match="Did you mean 'ViT-B-32/laion2b_s34b_b79k'?"):
        load_open_clip_checkpoint("ViT-B-32/laion2b_s34b_b79")


def test_repositories_without_a_connection(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="hf-hub:org/name could not be reached, and its open_clip_config.json is not in"):
        load_open_clip_checkpoint("hf-hub:org/name")
    # Pickled weights in the cache also work.
    folder = write_open_clip(tmp_path / "vit", build("vit"))
    torch.save({"a": torch.ones(1)}, tmp_path / "vit" / "open_clip_pytorch_model.bin")
    (tmp_path / "vit" / "open_clip_model.safetensors").unlink()

    def cached(repo, filename, **kwargs):
        if (path := tmp_path / "vit" / filename).is_file():
            return str(path)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    assert load_open_clip_checkpoint("hf-hub:org/name")[2] == {"a": torch.ones(1)}
    (tmp_path / "vit" / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(
        OSError, match="open_clip_model.safetensors or open_clip_pytorch_model.bin is not in the cache"
    ):
        load_open_clip_checkpoint("hf-hub:org/name")
    with pytest.raises(ValueError, match="has neither"):
        load_open_clip_checkpoint(folder)


def test_tag_says_which_activation_its_weights_need():
    config, preprocess_cfg, _ = load_open_clip_checkpoint("ViT-B-32/openai", with_weights=False)
    assert config["quick_gelu"] is True
    assert preprocess_cfg["size"] == 224 and preprocess_cfg["mean"][0] == pytest.approx(0.48145466)
    config, _, _ = load_open_clip_checkpoint("ViT-B-32/laion2b_s34b_b79k", with_weights=False)
    assert config["quick_gelu"] is False


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("name", ["vit", "vit-tokens", "vit-sin-cos-tok"])
@torch.no_grad()
def test_plain_vits_become_models_of_transformers(tmp_path, name, quick_gelu):
    TOWERS["vit-sin-cos-tok"] = {**TOWERS["vit"], "pos_embed_type": "sin_cos_2d", "norm_kwargs": {"eps": 1e-3}}
    donor = build(name, quick_gelu=quick_gelu)
    model = donor.to_clip_vision_model()
    assert type(model) is CLIPVisionModelWithProjection and not model.training
    assert model.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    pixels = images(donor)
    expected = donor(pixels, output_patches=True)
    model.save_pretrained(tmp_path)
    for tower in (model, CLIPVisionModelWithProjection.from_pretrained(tmp_path)):
        outputs = tower(pixels)
        torch.testing.assert_close(outputs.image_embeds, expected.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs.last_hidden_state[:, 1:], expected.last_hidden_state, rtol=0, atol=2e-6)
    assert not torch.allclose(*model(pixels).image_embeds)
    assert donor.to(torch.bfloat16).to_clip_vision_model().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("resnet", "the layers of a ResNet"),
        ("siglip", "a timm architecture, vit_test_siglip"),
        ("vit-attentional-pool", "`attentional_pool` True"),
        ("vit-sin-cos", "`pool_type` 'avg'"),
    ],
)
def test_towers_that_transformers_does_not_have(name, obstacle):
    with pytest.raises(ValueError, match=f"cannot become a CLIPVisionModelWithProjection: it has {obstacle}"):
        build(name).to_clip_vision_model()


def test_weights_as_pickles(tmp_path):
    donor = build("vit")
    name = write_open_clip(tmp_path / "vit", donor)
    (tmp_path / "vit" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither open_clip_model.safetensors nor open_clip_pytorch_model.bin"):
        OpenClipVisionModel.from_open_clip(name)
    weights = {f"module.{key}": value for key, value in donor.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "vit" / "open_clip_pytorch_model.bin")
    model = OpenClipVisionModel.from_open_clip(name).eval()
    assert torch.equal(model.visual.conv1.weight, donor.visual.conv1.weight)


REPRESENTATIVE = [
    "ViT-B-32",
    "ViT-H-14-378-quickgelu",
    "RN50x4",
    "ViT-SO400M-14-SigLIP2-378",
    "ViT-B-16-SigLIP-i18n-256",
]
REPRESENTATIVE += ["EVA02-B-16", "convnext_base_w_320", "MobileCLIP-S1", "MobileCLIP2-B", "coca_ViT-B-32"]
REPRESENTATIVE += ["PE-Core-B-16", "ViTamin-S", "swin_base_patch4_window7_224", "roberta-ViT-B-32", "nllb-clip-base"]


def check_real_size(architecture):
    """Check that the tower in its real size, without weights, embeds an image with the stated width."""
    model_cfg = open_clip.get_model_config(architecture)
    config = OpenClipVisionConfig(embed_dim=model_cfg["embed_dim"], vision_cfg=model_cfg["vision_cfg"])
    with torch.device("meta"), torch.no_grad():
        model = OpenClipVisionModel(config).eval()
        size = config.image_size
        outputs = model(torch.empty(1, 3, size, size), output_patches=True)
    assert outputs.image_embeds.shape == (1, model_cfg["embed_dim"])
    assert size == model_cfg["vision_cfg"]["image_size"] and model.visual.image_size in (size, (size, size))
    assert outputs.last_hidden_state.shape[-1] == config.hidden_size


@pytest.mark.parametrize("architecture", REPRESENTATIVE)
def test_real_sizes(architecture):
    check_real_size(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", open_clip.list_models())
def test_real_sizes_of_all_architectures(architecture):
    check_real_size(architecture)
