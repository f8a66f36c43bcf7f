"""What is trained of an existing captioner, and the options that only a new one has."""

import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapProcessor
from clipcap_hf.training.arguments import DataArguments, ModelArguments
from clipcap_hf.training.captioner import load_captioner
from clipcap_hf.training.recipe import trained_part


def load(**arguments):
    return load_captioner(ModelArguments(model="emoji-mini", **arguments), DataArguments())[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({"freeze_language_model": True}, "mapping network"), ({"lora_r": 4}, "LoRA"), ({}, "everything")],
)
def test_the_part_to_train_can_be_chosen(arguments, part):
    if "lora_r" in arguments:
        pytest.importorskip("peft")
    model = load(**arguments)
    assert trained_part(model) == part
    assert all(weight.requires_grad for weight in model.mapping_network.parameters())
    assert not any(weight.requires_grad for weight in model.vision_tower.parameters())


def test_new_adapters_change_no_caption_and_are_saved(tmp_path):
    pytest.importorskip("peft")
    plain, adapted = load(), load(lora_r=4)
    embeds = torch.randn(2, plain.config.clip_embed_dim)
    assert torch.equal(plain.generate(clip_embeds=embeds), adapted.generate(clip_embeds=embeds))
    # Saved with its processor, a captioner with adapters gets new ones on top of the merged old ones.
    adapted.save_pretrained(tmp_path)
    ClipCapProcessor.from_pretrained(EMOJI_MINI).save_pretrained(tmp_path)
    again, _ = load_captioner(ModelArguments(model=str(tmp_path), lora_r=2), DataArguments())
    assert again.config.lora == {"r": 2} and trained_part(again) == "LoRA"


def test_the_tower_can_be_trained():
    model = load(freeze_vision=False)
    assert all(weight.requires_grad for weight in model.vision_tower.parameters())
    assert not model.config.freeze_vision


def test_options_of_new_captioners_are_refused():
    with pytest.raises(ValueError, match="keeps its own `mapping_type`, `prefix_length`: leave that out, or pass"):
        load(mapping_type="transformer", prefix_length=5)
