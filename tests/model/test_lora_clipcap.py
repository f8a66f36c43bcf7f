"""Training modes: the mapping network alone, with the language model, or with LoRA on it."""

import importlib.util

import pytest
import torch
from clipcap_hf import (
    CaptioningCollator,
    ClipCapConfig,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ClipCapTrainer,
    OpenClipVisionConfig,
)
from clipcap_hf.model.lora_clipcap import save_lora
from clipcap_hf.model.versions_clipcap import CACHE
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Seq2SeqTrainingArguments,
)


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT: pip install peft")


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        # The paper's table 1 and its ablation, all with RN50x4 and the small GPT-2.
        ({"mapping_type": "mlp"}, 156),
        ({"mapping_type": "mlp", "freeze_language_model": True}, 32),
        ({"mapping_type": "transformer", "clip_length": 10, "freeze_language_model": True}, 43),
        ({"mapping_type": "transformer", "clip_length": 10}, 167),
    ],
)
def test_counts_of_the_paper(settings, millions):
    resnet = {"image_size": 288, "layers": [4, 6, 10, 6], "width": 80, "head_width": 64}
    tower = OpenClipVisionConfig(embed_dim=640, vision_cfg=resnet, quick_gelu=True)
    with torch.device("meta"):
        model = ClipCapForConditionalGeneration(
            ClipCapConfig(vision_config=tower, text_config=GPT2Config(), prefix_length=10, **settings)
        )
    counts = model.parameter_counts()
    trainable, everything = counts["total"]
    assert round(trainable / 1e6) == millions
    assert trainable == model.num_parameters(only_trainable=True)
    assert everything == model.num_parameters()
    assert counts["language_model"][1] == 124_439_808  # GPT-2 small, its tied head counted once
    assert counts["vision_tower"][0] == 0


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Save a Llama with grouped keys, as most current language models have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def start(folder, **kwargs):
    torch.manual_seed(0)
    kwargs = {"clip_embed_dim": 16, "prefix_length": 4, "lora": {"r": 4, "lora_alpha": 8}, **kwargs}
    return ClipCapForConditionalGeneration.from_vision_text_pretrained(None, folder, **kwargs)


def train(model, folder, output_dir, captions, **kwargs):
    processor = ClipCapProcessor.from_vision_text_pretrained(None, folder, prefix_length=4)
    torch.manual_seed(1)
    rows = [{"clip_embeds": torch.randn(16), "captions": caption} for caption in captions]
    settings = {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "no", "per_device_train_batch_size": 8}
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(output_dir),
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{**settings, **kwargs},
    )
    trainer = ClipCapTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=CaptioningCollator(processor)
    )
    trainer.train()
    return trainer


@needs_peft
def test_new_adapters_change_nothing(folder):
    plain, adapted = start(folder, lora=None).eval(), start(folder).eval()
    adapted.mapping_network.load_state_dict(plain.mapping_network.state_dict())
    embeds = torch.randn(2, 16)
    assert torch.equal(
        plain.generate(clip_embeds=embeds, max_new_tokens=6), adapted.generate(clip_embeds=embeds, max_new_tokens=6)
    )
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.startswith("mapping_network")} == {
        f"language_model.model.layers.{layer}.self_attn.{name}_proj.lora_{half}.default.weight"
        for layer in (0, 1)
        for name in ("q", "v")
        for half in ("A", "B")
    }
    # 32 x 4 and 4 x 32 for queries, 32 x 4 and 4 x 16 for values, in two layers
    assert adapted.parameter_counts()["language_model"][0] == 2 * (256 + 192)


@needs_peft
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_adapters_are_trained_and_saved(folder, tmp_path, captions, gradient_checkpointing):
    model = start(folder, save_frozen=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, folder, tmp_path / "run", captions, gradient_checkpointing=gradient_checkpointing)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    trainer.save_model(str(tmp_path / "light"))
    with safe_open(tmp_path / "light" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == changed  # adapters and mapping network, nothing else
    embeds = torch.randn(3, 16)
    expected = model.eval().generate(clip_embeds=embeds, max_new_tokens=6)
    model.save_pretrained(tmp_path / "full", save_frozen=True)
    for saved in ("light", "full"):
        again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / saved)
        assert torch.equal(again.generate(clip_embeds=embeds, max_new_tokens=6), expected)
        assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == changed


@needs_peft
def test_merged_adapters_caption_as_before(folder, tmp_path, captions):
    model = start(folder)
    train(model, folder, tmp_path / "run", captions)
    model.eval()
    embeds = torch.randn(4, 16)
    expected = model.generate(clip_embeds=embeds, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    model.merge_lora()
    assert not any("lora" in name for name, _ in model.named_parameters())
    merged = model.generate(clip_embeds=embeds, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(merged.sequences, expected.sequences)
    torch.testing.assert_close(merged.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged", save_frozen=False)  # merging changes the language model, so it is saved
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.generate(clip_embeds=embeds, max_new_tokens=6), expected.sequences)
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        again.merge_lora()


@needs_peft
@pytest.mark.skipif(
    CACHE == "cache", reason="transformers 5.24 saves adapters only with PEFT 0.22, which is not released yet"
)
def test_adapters_alone_in_the_format_of_peft(folder, tmp_path):
    from peft import PeftModel

    model = start(folder).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.language_model.save_pretrained(tmp_path / "adapters")
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapters").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(other(ids).logits, model.language_model(ids).logits)


@needs_peft
def test_adapters_alone_by_our_own_call(folder, tmp_path):
    from peft import PeftModel

    model = start(folder).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model.language_model, tmp_path / "adapters")
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapters").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(other(ids).logits, model.language_model(ids).logits)


@needs_peft
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, "rank.*arguments of peft.LoraConfig"),
        ({"target_modules": ["no_such"]}, "no_such"),
        ({"modules_to_save": ["lm_head"]}, "leave `modules_to_save` out"),
        ({"trainable_token_indices": [1]}, "leave `trainable_token_indices` out"),
        ({"bias": "all"}, "leave `bias` out"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the language model's own weights"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "share their weights.*leave both out"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_bad_adapters(folder, lora, message):
    with pytest.raises(ValueError, match=message):
        start(folder, lora=lora)


def test_without_peft(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="LoRA adapters.*pip install peft"):
        start(folder)
