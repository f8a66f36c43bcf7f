import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import datasets
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.convert import convert_official_checkpoint, convert_official_embeddings
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config, T5Config


GOLDEN = Path(__file__).parents[1] / "golden"


def text_config(**kwargs) -> GPT2Config:
    return GPT2Config(**{**json.loads((GOLDEN / "mlp" / "gpt2_config.json").read_text()), **kwargs})


def state_dict(mapping: str = "mlp") -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN / mapping / "state_dict.pt", weights_only=True)


@pytest.fixture
def convert(tmp_path):
    """Save an object and convert the file."""

    def convert(state, config=None, **kwargs):
        torch.save(state, tmp_path / "weights.pt")
        return convert_official_checkpoint(tmp_path / "weights.pt", config or text_config(), **kwargs)

    return convert


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-was-run"


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


# Checkpoints


@pytest.mark.parametrize("mapping", ["mlp", "transformer"])
def test_every_weight_arrives_and_only_old_buffers_are_dropped(mapping, convert):
    state = state_dict(mapping)
    model = convert(state)
    buffers = [key for key in state if key.endswith((".attn.bias", ".attn.masked_bias"))]
    assert len(buffers) == 6
    numbers = sum(value.numel() for key, value in state.items() if key not in buffers)
    assert model.num_parameters() == numbers - state["gpt.lm_head.weight"].numel()  # tied
    for index, block in enumerate(model.language_model.transformer.h):
        assert torch.equal(block.attn.c_attn.bias, state[f"gpt.transformer.h.{index}.attn.c_attn.bias"])
    without = convert({key: value for key, value in state.items() if key not in buffers})
    assert_same_weights(model, without)


def test_keys_come_before_values(convert):
    state = state_dict("transformer")
    attention = convert(state).mapping_network.layers[1].self_attn
    keys, values = state["clip_project.transformer.layers.1.attn.to_keys_values.weight"].split(64)
    assert torch.equal(attention.k_proj.weight, keys) and torch.equal(attention.v_proj.weight, values)


def test_generation_config_is_that_of_the_official_decoders(convert):
    model = convert(state_dict())
    settings = model.generation_config
    assert (settings.eos_token_id, settings.max_new_tokens, settings.do_sample) == (13, 67, False)
    assert not model.training
    assert convert(state_dict(), stop_token_id=7).generation_config.eos_token_id == 7
    assert convert(state_dict(), stop_token_id=None).generation_config.eos_token_id == 999
    # GPT2Config's own end token lies outside a small vocabulary; padding must not.
    settings = convert(state_dict(), text_config(eos_token_id=None, pad_token_id=None)).generation_config
    assert settings.pad_token_id == 13
    with pytest.raises(ValueError, match="stop_token_id"):
        convert(state_dict(), stop_token_id=1000)


def test_data_parallel_prefix(convert):
    state = state_dict()
    parallel = convert({f"module.{key}": value for key, value in state.items()})
    assert_same_weights(parallel, convert(state))


def test_legacy_file_format_and_half_precision(convert, tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in state_dict().items()}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = convert_official_checkpoint(tmp_path / "old.pt", text_config())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert convert(state, dtype=torch.float16).dtype == torch.float16


def test_text_config_from_a_folder(tmp_path, convert):
    text_config().save_pretrained(tmp_path / "gpt2")
    assert_same_weights(convert(state_dict(), str(tmp_path / "gpt2")), convert(state_dict()))


def tower(dim: int) -> CLIPVisionModelWithProjection:
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=dim, **sizes))


def test_with_a_tower(convert, tmp_path):
    vision = tower(512)
    vision.save_pretrained(tmp_path / "tower")
    pixels = torch.randn(2, 3, 32, 32)
    expected = convert(state_dict()).generate(clip_embeds=vision.eval()(pixels).image_embeds)
    for source in (vision, str(tmp_path / "tower")):
        model = convert(state_dict(), vision=source)
        model.save_pretrained(tmp_path / "captioner")
        for captioner in (model, ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")):
            assert torch.equal(captioner.generate(pixel_values=pixels), expected)
    assert model.config.donors["vision_tower"]["name"] == str(tmp_path / "tower")  # a checkpoint may leave it out


def test_tower_of_another_width(convert):
    with pytest.raises(ValueError, match=r"width 512, but `vision` gives 640.*RN50x4"):
        convert(state_dict(), vision=tower(640))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        convert_official_checkpoint(tmp_path / "nowhere.pt")


def test_code_is_not_run(convert, marker):
    with pytest.raises(ValueError, match="mkdir.*could run code"):
        convert({**state_dict(), "extra": Malicious(marker)})
    assert not marker.exists()


def test_whole_model_is_refused(convert):
    with pytest.raises(ValueError, match="more than weights.*state_dict"):
        convert(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html>", "web page"),
        (b"", "not a PyTorch"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
        (None, "damaged"),
    ],
)
def test_not_a_checkpoint(tmp_path, content, message):
    if content is None:
        buffer = io.BytesIO()
        torch.save(state_dict(), buffer)
        content = buffer.getvalue()[:5000]
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "module"])
def test_training_state(convert, key):
    state = {key: state_dict(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}
    with pytest.raises(ValueError, match=rf"whole training state.*\['{key}'\]"):
        convert(state)


@pytest.mark.parametrize("state", [[1, 2], {}, {"a": 1}, {3: torch.zeros(1)}, torch.zeros(2)])
def test_not_a_state_dict(convert, state):
    with pytest.raises(ValueError, match="not a state dict"):
        convert(state)


@pytest.mark.parametrize(
    "key, message",
    [
        ("visual.proj", "does not have: visual.proj"),
        ("gpt.transformer.h.0.attn.rope", r"1 unknown \(transformer.h.0.attn.rope\)"),
        ("gpt.transformer.h.0.crossattention.attn.bias", "unknown"),
        ("clip_project.model.4.weight", "no weights clip_project.model.4.weight"),
    ],
)
def test_unknown_weights_are_named(convert, key, message):
    with pytest.raises(ValueError, match=message):
        convert({**state_dict(), key: torch.zeros(2)})


def test_missing_parts(convert):
    state = state_dict("transformer")
    for prefix in ("gpt.", "clip_project."):
        with pytest.raises(ValueError, match=f"no `{prefix}"):
            convert({key: value for key, value in state.items() if not key.startswith(prefix)})
    with pytest.raises(ValueError, match=r"1 missing \(transformer.ln_f.weight\)"):
        convert({key: value for key, value in state.items() if key != "gpt.transformer.ln_f.weight"})
    for name in ("linear.weight", "transformer.layers.0.mlp.fc1.weight", "transformer.layers.1.norm1.bias"):
        with pytest.raises(ValueError, match=name.replace("norm", "layer_norm").removeprefix("transformer.")):
            convert({key: value for key, value in state.items() if key != f"clip_project.{name}"})


@pytest.mark.parametrize("size", [20, 200, -100])
def test_old_files_cut_short(tmp_path, size):
    torch.save(state_dict(), tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or cut short"):
        convert_official_checkpoint(tmp_path / "weights.pt")


def test_weights_that_are_no_numbers(convert):
    for name, value in (("gpt.transformer.ln_f.weight", torch.nan), ("clip_project.model.0.bias", torch.inf)):
        state = state_dict()
        state[name][1] = value
        with pytest.raises(ValueError, match=f"NaN or infinity in {name}"):
            convert(state)
    old_mask = {"gpt.transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf)}  # -1e9 in 16 bits
    convert({**state_dict(), **old_mask})


def test_encoder_decoders(convert):
    with pytest.raises(ValueError, match="`t5` is an encoder-decoder"):
        convert(state_dict(), T5Config())


def test_text_config_of_another_size(convert):
    with pytest.raises(ValueError, match=r"wte.weight is \(1000, 64\) and not \(50257, 768\)"):
        convert(state_dict(), GPT2Config())
    with pytest.raises(ValueError, match="13 unknown|12 unknown"):
        convert(state_dict(), text_config(n_layer=2))
    medium = {"gpt.transformer.wte.weight": torch.zeros(50257, 1024), "clip_project.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="width is that of gpt2-medium"):
        convert(medium, GPT2Config())


def test_untied_head(convert):
    state = state_dict()
    state["gpt.lm_head.weight"] = state["gpt.lm_head.weight"] + 1
    with pytest.raises(ValueError, match="differs from its embedding"):
        convert(state)
    model = convert(state, text_config(tie_word_embeddings=False))
    assert torch.equal(model.get_output_embeddings().weight, state["gpt.lm_head.weight"])


# Embeddings


def official_embeddings(dtype=torch.float16) -> dict:
    """Two captions of image 9 and one of 42, with an embedding for each caption."""
    embeds = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    embeds[2] = embeds[0]
    captions = [("9", "a dog."), ("42", "A cat"), ("9", "one dog")]
    records = [
        {"image_id": image_id, "id": row, "caption": caption, "clip_embedding": row}
        for row, (image_id, caption) in enumerate(captions)
    ]
    return {"clip_embedding": embeds, "captions": records}


@pytest.fixture
def convert_embeds(tmp_path):
    def convert(data, name="set"):
        (tmp_path / "embeds.pkl").write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
        return convert_official_embeddings(tmp_path / "embeds.pkl", tmp_path / name)

    return convert


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_embeddings(convert_embeds, tmp_path, monkeypatch, device, dtype):
    data = official_embeddings(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: device)  # as a tensor on this device has it
        pickled = pickle.dumps(data)
    assert (b"cuda:0" in pickled) == (device == "cuda:0")
    convert_embeds(pickled)
    dataset = datasets.load_from_disk(str(tmp_path / "set"))
    assert dataset["image_id"][:] == [9, 42]
    assert dataset["captions"][:] == [["a dog.", "one dog"], ["A cat"]]
    assert torch.equal(torch.tensor(dataset["clip_embeds"][:]), data["clip_embedding"][:2].float())
    assert dataset.features["clip_embeds"] == datasets.List(datasets.Value("float32"), length=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeds.pkl", "set"]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_views_and_protocols(convert_embeds, protocol):
    data = official_embeddings()
    wide = torch.zeros(8, 6, dtype=torch.float16)
    wide[:, ::2] = data["clip_embedding"].T
    data["clip_embedding"] = wide[:, ::2].T  # neither contiguous nor at the start of its storage
    dataset = convert_embeds(pickle.dumps(data, protocol))
    assert torch.equal(torch.tensor(dataset["clip_embeds"][:]), data["clip_embedding"][:2].float())


def test_list_of_embeddings_and_other_ids(convert_embeds):
    data = official_embeddings()
    data["clip_embedding"] = [row[None] for row in data["clip_embedding"]]
    for record in data["captions"]:
        record["image_id"] = f"image-{record['image_id']}"
    data["captions"] = list(map(OrderedDict, data["captions"]))
    dataset = convert_embeds(data)
    assert dataset["image_id"][:] == ["image-9", "image-42"]


class MaliciousStorage:
    """Run code from the inner file of a pickled tensor's storage."""

    def __init__(self, marker):
        buffer = io.BytesIO()
        torch.save(Malicious(marker), buffer, _use_new_zipfile_serialization=False)
        self.data = buffer.getvalue()

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("attack", [Malicious, MaliciousStorage])
def test_code_in_embeddings_is_not_run(convert_embeds, marker, tmp_path, attack):
    with pytest.raises(ValueError, match="mkdir.*could run code"):
        convert_embeds({**official_embeddings(), "extra": attack(marker)})
    assert not marker.exists() and not (tmp_path / "set").exists()


def test_a_pickle_cannot_change_torch(convert_embeds):
    # GLOBAL torch._utils._rebuild_tensor_v2, then BUILD with the slot state {"__defaults__": (1,)}.
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match="damaged"):
        convert_embeds(pickled)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


@pytest.mark.parametrize("value", [torch.nn.Linear(1, 1), Path("x"), torch.float16, print])
def test_other_objects_are_refused(convert_embeds, value):
    with pytest.raises(ValueError, match="only tensors and plain containers"):
        convert_embeds({**official_embeddings(), "extra": value})


def test_bad_embeddings(convert_embeds, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pkl"):
        convert_official_embeddings(tmp_path / "nowhere.pkl", tmp_path / "set")
    for data in (b"not a pickle", pickle.dumps(official_embeddings())[:-50]):
        with pytest.raises(ValueError, match="damaged"):
            convert_embeds(data)
    for data in ([1], {"captions": []}):
        with pytest.raises(ValueError, match="does not hold"):
            convert_embeds(data)
    for embeds in (torch.zeros(3), torch.zeros(3, 8, dtype=torch.long), "text"):
        with pytest.raises(ValueError, match="not a tensor of the shape"):
            convert_embeds({**official_embeddings(), "clip_embedding": embeds})
    with pytest.raises(ValueError, match="not a list"):
        convert_embeds({**official_embeddings(), "captions": []})
    data = official_embeddings()
    data["clip_embedding"][1, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in rows \\[1\\]"):
        convert_embeds(data)
    assert [path.name for path in tmp_path.iterdir()] == ["embeds.pkl"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"caption": None}, "Caption 1"),
        ({"clip_embedding": 3}, "Caption 1"),
        ({"clip_embedding": "1"}, "Caption 1"),
        ({"clip_embedding": True}, "Caption 1: its `clip_embedding` is not the number of a row"),
        ({"image_id": [9]}, "Caption 1: its `image_id` is neither text nor a whole number"),
        ({"image_id": None}, "Caption 1: its `image_id` is neither"),
        ({"image_id": True}, "Caption 1: its `image_id` is neither"),
        ({"image_id": "9"}, "has different embeddings"),
    ],
)
def test_bad_captions(convert_embeds, change, message):
    data = official_embeddings()
    data["captions"][1].update(change)
    with pytest.raises(ValueError, match=message):
        convert_embeds(data)
    del data["captions"][1]["image_id"]
    with pytest.raises(ValueError, match="Caption 1 lacks"):
        convert_embeds(data)


def test_existing_folder_is_kept(convert_embeds, tmp_path):
    (tmp_path / "set").mkdir()
    convert_embeds(official_embeddings())  # empty
    before = sorted(path.name for path in (tmp_path / "set").iterdir())
    with pytest.raises(FileExistsError, match="set"):
        convert_embeds(official_embeddings())
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == before
