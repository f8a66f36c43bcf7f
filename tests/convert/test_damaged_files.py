"""Files to convert that are missing, of another kind or damaged: the error says which."""

import os
import pickle

import pytest
import torch
from clipcap_hf.cli import main
from clipcap_hf.convert import convert_official_checkpoint, convert_official_embeddings


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(params=["checkpoint", "embeddings"])
def convert(request, tmp_path):
    if request.param == "checkpoint":
        return convert_official_checkpoint
    return lambda path: convert_official_embeddings(path, tmp_path / "out")


def test_what_is_not_a_file(tmp_path, convert):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pointer").write_text(POINTER)
    with pytest.raises(FileNotFoundError, match="There is no .*gone"):
        convert(tmp_path / "gone")
    with pytest.raises(ValueError, match="is not a file, but a folder"):
        convert(tmp_path)
    with pytest.raises(ValueError, match="is not a file, but a pipe"):
        convert(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pointer is a Git LFS pointer.*git lfs pull"):
        convert(tmp_path / "pointer")


def test_a_missing_checkpoint_is_named_before_the_hub_is_asked(tmp_path, capsys):
    assert main(["convert", "official", str(tmp_path / "gone.pt"), "--out", str(tmp_path / "out")]) != 0
    message = capsys.readouterr().err
    assert "gone.pt" in message and "gpt2" not in message


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_never_advises_to_unpickle(tmp_path, legacy):
    path = tmp_path / "state.pt"
    torch.save({"gpt.a": torch.ones(20)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with pytest.raises(ValueError) as found:
            convert_official_checkpoint(path)
        assert "weights_only=False" not in str(found.value)


def test_absurd_sizes_take_no_memory(tmp_path):
    path = tmp_path / "embeddings.pkl"
    whole = pickle.dumps({"clip_embedding": b"x" * 100_000, "captions": []}, protocol=4)
    size = whole.index((100_000).to_bytes(4, "little"))
    path.write_bytes(whole[: size - 1] + b"\x8e" + (2**45).to_bytes(8, "little") + whole[size + 4 :])
    with pytest.raises(ValueError, match="embeddings.pkl is .*damaged"):
        convert_official_embeddings(path, tmp_path / "out")


def test_what_is_wrong_inside_a_file_is_said_with_its_name(tmp_path):
    weights = {"clip_project.modEl.0.weight": torch.zeros(8, 4)}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt"):
        convert_official_checkpoint(tmp_path / "weights.pt")
    rows = {"clip_embedding": torch.zeros(1, 4), "captions": [{"image_id": 0, "cap~ion": "a", "clip_embedding": 0}]}
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(rows))
    with pytest.raises(ValueError, match=r"rows\.pkl: Caption 0 lacks"):
        convert_official_embeddings(tmp_path / "rows.pkl", tmp_path / "out")


@pytest.mark.parametrize(
    "change", [lambda bias: bias.int(), lambda bias: bias.bool(), lambda bias: torch.ones(2, 3).to_sparse()]
)
def test_weights_that_no_training_leaves(tmp_path, change):
    weights = {"gpt.transformer.wte.weight": torch.zeros(8, 4), "clip_project.model.0.bias": torch.zeros(8)}
    weights["clip_project.model.0.bias"] = change(weights["clip_project.model.0.bias"])
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt holds sparse, quantised or whole numbers in clip_project"):
        convert_official_checkpoint(tmp_path / "weights.pt")
