"""The oldest and newest supported transformers: cache names, unknown arguments and refused releases."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.model import beam_search_clipcap
from clipcap_hf.model.versions_clipcap import CACHE
from hub_client import ROOT
from PIL import Image, ImageDraw
from transformers import pipeline


OLD_FOLDER = Path(__file__).parents[1] / "fixtures" / "captioner-0.1.0"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(make_model, name):
    model = make_model()
    input_ids = torch.tensor([[290] * 4 + [5, 6, 7]])
    images = torch.randn(1, 3, 32, 32)
    full = model(input_ids=input_ids, pixel_values=images).logits
    first = model(input_ids=input_ids[:, :5], pixel_values=images, use_cache=True)
    rest = model(input_ids=input_ids[:, 5:], **{name: first[CACHE]})
    torch.testing.assert_close(rest.logits, full[:, 5:])
    read = model(input_ids=input_ids[:, :5], pixel_values=images, use_cache=True)[CACHE]
    going_on = model.generate(input_ids, **{name: read}, max_new_tokens=3, eos_token_id=None)
    expected = model.generate(input_ids, pixel_values=images, max_new_tokens=3, eos_token_id=None)
    assert torch.equal(going_on, expected)


def test_one_name_of_the_cache_at_a_time(make_model):
    model, input_ids = make_model(), torch.tensor([[5, 6]])
    cache = model(input_ids=input_ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="older name of `cache`: pass one of them"):
        model(input_ids=input_ids, cache=cache, past_key_values=cache)


def test_unknown_arguments_do_not_vanish(make_model):
    model, input_ids = make_model(), torch.tensor([[5, 6]])
    with pytest.raises(TypeError, match="a `gpt2`, has the argument `past_keys`"):
        model(input_ids=input_ids, past_keys=1)
    assert model(input_ids=input_ids, output_hidden_states=True, unused=None).hidden_states is not None


# Shows every log level, and any deprecation warning ends the process.
QUIET = """
import torch, warnings
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, official_beam_search
from transformers.utils import logging
logging.set_verbosity_info()
warnings.filterwarnings("error", category=FutureWarning)
warnings.filterwarnings("error", category=DeprecationWarning)
model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
embeds = torch.randn(2, model.config.clip_embed_dim)
for settings in ({}, {"num_beams": 3}, {"num_beams": 3, "custom_generate": official_beam_search},
                 {"num_beams": 2, "repetition_penalty": 1.2}, {"do_sample": True}, {"cache_implementation": "static"}):
    ids = model.generate(clip_embeds=embeds, max_new_tokens=4, **settings)
    assert len(ids) == 2
ids = ids[:, : model.config.prefix_length + 2]
labels = ids.masked_fill(ids == model.config.image_token_id, -100)
outputs = model(input_ids=ids, clip_embeds=embeds, labels=labels, use_cache=True)
dict(outputs), outputs.to_tuple(), outputs[1]
"""


def test_no_deprecation_comes_from_us():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stdout + done.stderr


@pytest.mark.parametrize("release", ["5.19.9", "5.25.0", "6.0.0.dev0"])
def test_other_releases_are_refused_in_a_line(tmp_path, release):
    info = tmp_path / f"transformers-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {release}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", "import clipcap_hf"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: This captioner needs transformers>=5.20,<5.25, but {release} is installed: "
        "`pip install 'transformers>=5.20,<5.25'`."
    )


# Private names of transformers that the package uses but can do without.
INSIDE = ["_prefill", "_update_model_kwargs_for_generation"]


@pytest.mark.parametrize("search", [None, beam_search_clipcap.official_beam_search])
def test_beams_need_no_private_method(make_model, monkeypatch, search):
    model, pixels = make_model(), torch.randn(2, 3, 32, 32)
    settings = {"pixel_values": pixels, "num_beams": 3, "custom_generate": search}
    expected = model.generate(**settings)
    for name in INSIDE:
        monkeypatch.delattr(f"transformers.GenerationMixin.{name}")
    assert torch.equal(model.generate(**settings), expected)


def test_beams_of_transformers_without_the_fast_ones(make_model, monkeypatch):
    """If `generate` calls its searches differently, the stock search captions."""
    model, pixels = make_model(), torch.randn(2, 3, 32, 32)
    expected = model.generate(pixel_values=pixels, num_beams=3)
    monkeypatch.setattr(beam_search_clipcap, "DynamicCache", type("Renamed", (), {}))
    assert torch.equal(model.generate(pixel_values=pixels, num_beams=3), expected)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT: pip install peft")
def test_a_folder_of_the_first_release():
    """With LoRA, and with code next to the weights, in place of which the package's own is used."""
    captioner = pipeline("image-captioning", model=str(OLD_FOLDER))
    assert type(captioner.model) is ClipCapForConditionalGeneration
    picture = Image.new("RGB", (20, 16), "grey")
    ImageDraw.Draw(picture).ellipse((2, 2, 14, 14), fill="red")
    inputs = captioner.processor(images=picture, return_tensors="pt")
    expected = json.loads((OLD_FOLDER / "expected.json").read_text())
    assert captioner.model.generate(**inputs)[0].tolist() == expected["greedy"]
    assert captioner.model.generate(**inputs, num_beams=3)[0].tolist() == expected["beams"]
