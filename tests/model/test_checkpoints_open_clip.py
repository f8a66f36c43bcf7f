"""Checkpoints of open_clip's training, intact and damaged."""

import json

import numpy as np
import open_clip
import pytest
import torch
from clipcap_hf import OpenClipVisionModel
from clipcap_hf.model.checkpoints_open_clip import absolute_name, load_open_clip_checkpoint
from clipcap_hf.model.modeling_vision import load_vision_config, load_vision_tower
from safetensors.torch import save_file


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    return open_clip.CLIP(**{key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()})


@pytest.fixture
def architecture(tmp_path_factory):
    """Add the tiny model to open_clip's list of architectures."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-test-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-test-clip.json")
    return "tiny-test-clip"


def checkpoint(model, prefix="module.", **beside):
    weights = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    return {"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {}}, "scaler": None, **beside}


def config_folder(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, **changes}, "preprocess_cfg": {}}))
    return folder


@torch.no_grad()
def assert_same_tower(name, model):
    pixels = torch.randn(2, 3, 32, 32)
    found = load_vision_tower(str(name)).eval()(pixel_values=pixels).image_embeds
    torch.testing.assert_close(found, model.eval().encode_image(pixels), rtol=0, atol=1e-5)


def test_training_checkpoints_by_path(tmp_path, trained, architecture):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    file = run / "checkpoints" / "epoch_3.pt"
    torch.save(checkpoint(trained), file)
    assert_same_tower(f"{architecture}/{file}", trained)
    with pytest.raises(ValueError, match="not their architecture: write 'ARCHITECTURE/.*params.txt"):
        load_vision_config(str(file))
    (run / "params.txt").write_text(
        f"force_image_size: None\nforce_quick_gelu: False\nimage_mean: [0.1, 0.2, 0.3]\nimage_std: None\n"
        f"image_interpolation: bilinear\nmodel: {architecture}\nname: run\n"
    )
    assert_same_tower(file, trained)
    model_cfg, preprocess_cfg, _ = load_open_clip_checkpoint(str(file), with_weights=False)
    assert not model_cfg.get("quick_gelu")
    assert preprocess_cfg == {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "size": 32}
    (run / "params.txt").write_text(f"force_quick_gelu: True\nforce_image_size: [40]\nmodel: {architecture}\n")
    config = load_vision_config(str(file))
    assert config.quick_gelu and config.image_size == 40
    config_folder(run / "checkpoints")
    assert_same_tower(file, trained)  # the configuration next to the file comes first


def test_relative_paths_are_remembered_whole(tmp_path, trained, architecture, monkeypatch):
    torch.save(checkpoint(trained), tmp_path / "epoch_3.pt")
    monkeypatch.chdir(tmp_path)
    assert_same_tower(f"{architecture}/epoch_3.pt", trained)
    assert absolute_name(f"{architecture}/epoch_3.pt") == f"{architecture}/{tmp_path}/epoch_3.pt"
    assert absolute_name("epoch_3.pt") == f"{tmp_path}/epoch_3.pt"
    assert absolute_name("ViT-B-32/openai") == "ViT-B-32/openai"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_distributed_models(tmp_path, trained, prefix):
    torch.save(checkpoint(trained, prefix), config_folder(tmp_path / "clip") / "open_clip_pytorch_model.bin")
    assert_same_tower(tmp_path / "clip", trained)


@pytest.mark.parametrize("best", [np.float64(0.3), np.float32(0.3), np.int64(3), np.bool_(True)])
def test_numpy_scalars_beside_the_weights(tmp_path, trained, best):
    path = config_folder(tmp_path / "clip") / "open_clip_pytorch_model.bin"
    torch.save(checkpoint(trained, best=best), path)
    assert_same_tower(tmp_path / "clip", trained)


class Touch:
    def __reduce__(self):
        return open, ("was-run", "w")


def test_code_in_a_pickle_is_not_run(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (checkpoint(trained, best=Touch()), trained):
        torch.save(content, config_folder(tmp_path / "clip") / "open_clip_pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be read as weights .*whole pickled") as raised:
            load_vision_tower(str(tmp_path / "clip"))
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_damaged_files_and_pointers_are_named(tmp_path, trained, name):
    path = config_folder(tmp_path / "clip") / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, not the weights: run `git lfs pull`"):
        load_vision_tower(str(tmp_path / "clip"))
    weights = {key: value.contiguous() for key, value in trained.state_dict().items()}
    torch.save(weights, path) if name.endswith("bin") else save_file(weights, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-50], b"\0" * 500):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} (cannot be read as weights|holds no weights)"):
            load_vision_tower(str(tmp_path / "clip"))


def test_files_that_are_not_there(tmp_path):
    for name in (f"ViT-B-32/{tmp_path}/gone.pt", "ViT-B-32/gone.pt", f"{tmp_path}/gone.pt"):
        with pytest.raises(ValueError, match="gone.pt: no such file"):
            load_vision_tower(name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": [], "embed_dim": 1}}']
)
def test_damaged_configurations_are_named(tmp_path, text):
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match="open_clip_config.json is not a configuration of open_clip"):
        load_vision_tower(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 10**12), ("layers", 10**9), ("image_size", 200_000), ("patch_size", 0), ("width", "64")],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, trained, field, value):
    folder = config_folder(tmp_path / "clip", vision_cfg={**TINY["vision_cfg"], field: value})
    save_file({"visual.proj": torch.ones(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=f"`?{field}`?"):
        load_vision_tower(str(folder))


def test_images_of_another_size_are_refused(open_clip_configs):
    # A convolutional tower would embed them slightly wrong.
    tower = OpenClipVisionModel(open_clip_configs["timm"]).eval()
    with pytest.raises(ValueError, match="takes images of 64 x 64 pixels, got 32 x 32"):
        tower(torch.zeros(1, 3, 32, 32))
