"""The converted model matches the official code; tests/golden/README.md describes the data."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from clipcap_hf.convert import convert_official_checkpoint
from clipcap_hf.model.beam_search_clipcap import official_beam_search
from safetensors.torch import load_file
from transformers import GPT2Config


GOLDEN = Path(__file__).parents[1] / "golden"
MAPPINGS = ["mlp", "transformer", "linear"]


@dataclass
class Golden:
    facts: dict
    tensors: dict
    train: dict
    decode: dict
    model: ClipCapForConditionalGeneration

    @property
    def prefix_length(self) -> int:
        return self.facts["prefix_length"]

    @property
    def embeds(self) -> torch.Tensor:
        return self.tensors["clip_embedding_raw"]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the captions as input, without labels for token 0, which the official loss always ignores."""
        tokens, model = self.tensors["tokens"], self.model
        placeholders = torch.full((len(tokens), self.prefix_length), model.config.image_token_id)
        labels = torch.cat([torch.full_like(placeholders, -100), tokens.masked_fill(tokens == 0, -100)], dim=1)
        return {
            "input_ids": torch.cat([placeholders, tokens], dim=1),
            "attention_mask": self.tensors["mask"].long(),
            "clip_embeds": self.embeds,
            "labels": labels,
        }


def convert(mapping: str, **kwargs) -> ClipCapForConditionalGeneration:
    text_config = GPT2Config(**json.loads((GOLDEN / mapping / "gpt2_config.json").read_text()))
    return convert_official_checkpoint(
        GOLDEN / mapping / "state_dict.pt", text_config, normalize_clip_embeds=mapping == "transformer", **kwargs
    )


@pytest.fixture(scope="module", params=MAPPINGS)
def golden(request):
    folder = GOLDEN / request.param
    facts, train, decode = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("clipcap", "train", "decode")
    )
    return Golden(facts, load_file(folder / "tensors.safetensors"), train, decode, convert(request.param))


def test_config_is_read_off_the_weights(golden):
    config = golden.model.config
    assert config.mapping_type == golden.facts["mapping"]
    assert config.prefix_length == golden.facts["prefix_length"]
    assert config.clip_embed_dim == golden.facts["clip_dim"]
    assert config.clip_length == golden.facts["clip_length"]
    if config.mapping_type == "transformer":
        assert config.mapping_num_layers == golden.facts["mapper_layers"]
        assert config.mapping_mlp_ratio == 2


def test_prefix(golden):
    prefix = golden.model.get_image_features(clip_embeds=golden.embeds).pooler_output
    torch.testing.assert_close(prefix, golden.tensors["prefix_embeds"], atol=1e-5, rtol=0)


def test_logits_and_loss(golden):
    with torch.no_grad():
        outputs = golden.model(**golden.inputs())
    assert outputs.loss.item() == pytest.approx(golden.train["loss"], abs=1e-4)
    start = golden.prefix_length - 1
    lengths = golden.tensors["mask"][:, golden.prefix_length :].sum(1).long().tolist()
    for row, length in enumerate(lengths):
        expected = golden.tensors["logits"][row, :length]
        torch.testing.assert_close(outputs.logits[row, start : start + length], expected, atol=2e-4, rtol=0)


def test_training(golden):
    model = convert(golden.facts["mapping"], freeze_language_model=golden.facts["only_prefix"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, eps=1e-6, weight_decay=0)
    losses = []
    for lr in (0, 0.0005, 0.001, 0.00075, 0.0005, 0.00025):
        optimizer.param_groups[0]["lr"] = lr
        loss = model(**golden.inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(golden.train["losses_torch_adamw_eps1e6_wd0"], abs=2e-3)
    # The official code's AdamW adds epsilon elsewhere than torch's.
    assert losses == pytest.approx(golden.train["losses_official_adamw"], abs=1e-2)

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    if golden.facts["only_prefix"]:
        assert changed == {name for name in before if name.startswith("mapping_network.")}
    else:
        assert changed == set(before)


def test_greedy(golden):
    captions = golden.model.generate(clip_embeds=golden.embeds)[:, golden.prefix_length :].tolist()
    for caption, expected in zip(captions, golden.decode["greedy"], strict=True):
        assert caption[: len(expected)] == expected
        assert set(caption[len(expected) :]) <= {golden.model.generation_config.pad_token_id}


def test_greedy_of_the_saved_model(golden, tmp_path):
    golden.model.save_pretrained(tmp_path)
    model = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    expected = golden.model.generate(clip_embeds=golden.embeds)
    assert torch.equal(model.generate(clip_embeds=golden.embeds), expected)


@pytest.mark.parametrize("batched", [True, False])
def test_official_beam_search(golden, batched):
    batches = [golden.embeds] if batched else golden.embeds.split(1)
    outputs = [
        golden.model.generate(
            clip_embeds=batch,
            custom_generate=official_beam_search,
            num_beams=5,
            num_return_sequences=5,
            return_dict_in_generate=True,
        )
        for batch in batches
    ]
    captions = [row[golden.prefix_length :].tolist() for output in outputs for row in output.sequences]
    scores = torch.cat([output.sequences_scores for output in outputs])
    pad = golden.model.generation_config.pad_token_id
    expected = [beam for record in golden.decode["beam"] for beam in record["tokens"]]
    for caption, tokens in zip(captions, expected, strict=True):
        assert caption[: len(tokens)] == tokens
        assert set(caption[len(tokens) :]) <= {pad}
    expected_scores = [score for record in golden.decode["beam"] for score in record["scores"]]
    torch.testing.assert_close(scores, torch.tensor(expected_scores), atol=1e-5, rtol=0)


def test_beam_search_of_transformers_mostly_agrees():
    # Its rule differs (see official_beam_search), so it may find other captions.
    agree = 0
    for mapping in MAPPINGS:
        model = convert(mapping)
        embeds = load_file(GOLDEN / mapping / "tensors.safetensors")["clip_embedding_raw"]
        records = json.loads((GOLDEN / mapping / "decode.json").read_text())["beam"]
        captions = model.generate(clip_embeds=embeds, num_beams=5)[:, model.config.prefix_length :].tolist()
        agree += sum(
            caption[: record["lengths"][0]] == record["tokens"][0] for caption, record in zip(captions, records)
        )
    assert agree >= 9
