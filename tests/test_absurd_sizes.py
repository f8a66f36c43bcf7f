"""Sizes in files that no model or picture has are refused by name, before memory or time is taken for them."""

import json
import pickle
import struct
import sys
import zipfile
import zlib

import damages
import pytest
import torch


HUGE = 10**12
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a child process cannot use a device that its parent has opened
    refusal.folder = tmp_path


@pytest.fixture
def convert(tmp_path, text_config, tokenizer) -> list:
    text_config.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return ["convert", "official", tmp_path / "state.pt", "--text", tmp_path / "gpt2", "--out", tmp_path / "out"]


def refusal(*command) -> str:
    """Run a command that must fail, with little memory, and return its one line of error."""
    done = damages.run(list(command), refusal.folder)
    lines = [line for line in done.err.splitlines() if line.startswith("clipcap: ")]
    assert done.status == 1 and len(lines) == 1, f"{done.status} {done.out}{done.err}"
    assert not any(word in lines[0] for word in ("--debug", "out of memory", "allocate")), lines[0]
    return lines[0]


class Storage:
    """A pickle that names a record of 10^12 numbers."""

    def __init__(self, size):
        self.size = size


def write_checkpoint(path, numbers: int, shape: tuple, stride: tuple):
    """Write a zip checkpoint by hand, whose only tensor has this shape on a storage of this many numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", value.size) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self):
            from torch._utils import _rebuild_tensor_v2

            return _rebuild_tensor_v2, (Storage(numbers), 0, shape, stride, False, {})

    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump({"gpt.a": Tensor()})
        archive.writestr("archive/data/0", b"\0" * 16)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.parametrize(
    ("numbers", "shape", "stride"),
    [(HUGE, (HUGE,), (1,)), (4, (HUGE,), (0,)), (4, (10**6, 10**6), (0, 0)), (4, (2**62,), (1,))],
    ids=["storage", "repeated", "matrix", "view"],
)
def test_tensors_of_a_checkpoint(tmp_path, convert, numbers, shape, stride):
    write_checkpoint(tmp_path / "state.pt", numbers, shape, stride)
    assert "state.pt is damaged" in refusal(*convert)


def test_records_of_a_checkpoint_that_unpack_to_more_than_the_file(tmp_path, convert):
    with zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    message = refusal(*convert)
    assert "state.pt is damaged" in message and "larger than the file" in message


def test_storages_of_a_legacy_checkpoint(tmp_path, convert):
    path = tmp_path / "state.pt"
    torch.save({"gpt.a": torch.zeros(70_000)}, path, _use_new_zipfile_serialization=False)
    whole, number = path.read_bytes(), pickle.dumps(70_000, protocol=2)[2:-1]
    assert number in whole
    path.write_bytes(whole.replace(number, pickle.dumps(HUGE, protocol=2)[2:-1]))
    assert "state.pt is damaged" in refusal(*convert)


def test_tensors_of_embeddings(tmp_path):
    embeds = torch.zeros(4).as_strided((10**6, 10**6), (0, 0))
    with open(tmp_path / "embeddings.pkl", "wb") as file:
        pickle.dump({"clip_embedding": embeds, "captions": [{}]}, file)
    message = refusal("convert", "embeddings", tmp_path / "embeddings.pkl", "--out", tmp_path / "out")
    assert "`clip_embedding` of" in message and "larger than what is stored" in message


@pytest.mark.parametrize("shape", [[HUGE], [2**63, 2**63], [10**6, 10**6]])
def test_shapes_of_safetensors(model_folder, picture, shape):
    header = json.dumps({"mapping_network.fc1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}})
    content = struct.pack("<Q", len(header)) + header.encode() + bytes(16)
    (model_folder / "model.safetensors").write_bytes(content)
    assert str(model_folder) in refusal("caption", "--model", model_folder, picture)


def test_a_header_of_safetensors(model_folder, picture):
    (model_folder / "model.safetensors").write_bytes(struct.pack("<Q", HUGE) + b"{}")
    assert str(model_folder) in refusal("caption", "--model", model_folder, picture)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_config", {"vocab_size": HUGE}),
        ("text_config", {"n_layer": 10**9}),
        ("vision_config", {"num_hidden_layers": 10**9}),
        (None, {"prefix_length": 10**9}),
    ],
)
def test_sizes_of_a_captioner(model_folder, picture, part, changes):
    change(model_folder / "config.json", part, changes)
    name = "num_hidden_layers" if "n_layer" in changes else next(iter(changes))
    assert f"`{name}` of the" in refusal("caption", "--model", model_folder, picture)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"prefix_length": 10**9}, "`prefix_length` of the processor"),
        ("image_processor", {"crop_size": {"height": 10**6, "width": 10**6}}, "`crop_size` in the image processor"),
        ("image_processor", {"size": {"shortest_edge": 10**6}}, "`size` in the image processor"),
    ],
)
def test_sizes_of_a_processor(model_folder, picture, part, changes, message):
    change(model_folder / "processor_config.json", part, changes)
    assert message in refusal("caption", "--model", model_folder, picture)


def test_beams_of_the_generation_settings(model_folder, picture):
    change(model_folder / "generation_config.json", None, {"num_beams": 10**9})
    message = refusal("caption", "--model", model_folder, picture)
    assert "generation_config.json" in message and "`num_beams` must be a whole number from 1 to 1000" in message


def test_sizes_of_a_tower_and_of_a_language_model(
    tmp_path, clip_config, text_config, image_processor, tokenizer, picture
):
    clip_config.save_pretrained(tmp_path / "tower")
    image_processor.save_pretrained(tmp_path / "tower")
    change(tmp_path / "tower" / "config.json", None, {"num_hidden_layers": 10**9})
    embed = ["embed", picture.parent, "--data-format", "imagefolder", "--out", tmp_path / "out"]
    picture.with_suffix(".txt").write_text("a picture")
    assert "`num_hidden_layers` of the vision tower" in refusal(*embed, "--vision", tmp_path / "tower")


def test_sizes_of_a_language_model(tmp_path, convert):
    change(tmp_path / "gpt2" / "config.json", None, {"n_layer": 10**9})
    torch.save({"gpt.a": torch.zeros(1), "clip_project.a": torch.zeros(1)}, tmp_path / "state.pt")
    assert "`num_hidden_layers` of the language model" in refusal(*convert)


def change(path, part, changes):
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))


@pytest.fixture
def picture(tmp_path, images):
    (tmp_path / "pictures").mkdir()
    images[0].save(tmp_path / "pictures" / "0.png")
    return tmp_path / "pictures" / "0.png"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(46)
    )


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, height)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, 10)])
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(4)


@pytest.mark.parametrize(
    "write", [png, bmp, tiff, lambda width, height: b"P6 %d %d 255\n" % (width, height) + bytes(9)]
)
def test_pictures(tmp_path, model_folder, write):
    (tmp_path / "huge.png").write_bytes(write(200_000, 200_000))
    message = refusal("caption", "--model", model_folder, tmp_path / "huge.png")
    assert "huge.png: refused, the image is too large" in message
