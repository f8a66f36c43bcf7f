"""Pretrained language models and their tokenizers."""

import copy
import importlib.util

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import GELUTanh, NewGELUActivation

from .configuration_clipcap import IMAGE_TOKEN, ClipCapConfig


def load_tokenizer(folder: str, config: PreTrainedConfig, **kwargs) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a language model, if there is one.

    Raises:
        ValueError: If it has more tokens than the language model of this configuration embeds.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError):
        return None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of weights without a tokenizer
        return None
    tokens, rows = placeholder_id(tokenizer), config.get_text_config().vocab_size
    if tokens > rows:
        raise ValueError(
            f"The tokenizer of {folder} has {tokens} tokens, but its language model embeds {rows}: is it another model's "
            "tokenizer? If tokens were added to it, load both, call `resize_token_embeddings(len(tokenizer))` on the "
            "language model, and save it beside the tokenizer."
        )
    return tokenizer


def placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # The first id beyond the tokenizer, which is what ClipCapProcessor takes; it may lie below `vocab_size`, since many
    # language models (OPT, Qwen) have more rows than their tokenizers have tokens.
    return tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))


def fuse_gelu(language_model: PreTrainedModel):
    """Give GPT-2's activation, which takes eight passes over memory, as the one kernel that torch has for it."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def caption_generation_config(
    language_model: PreTrainedModel, config: ClipCapConfig, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    text_config = config.text_config.get_text_config()
    eos_token_id, pad_token_id = _end_ids(language_model, tokenizer), language_model.generation_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    if pad_token_id is not None and pad_token_id >= text_config.vocab_size:
        pad_token_id = 0  # captions that have ended are fed with it, so it needs an embedding
    # 67 is the official decoders' limit. Sampling is theirs to choose who want it: the official code is greedy.
    context = getattr(text_config, "max_position_embeddings", None)
    return GenerationConfig(
        max_new_tokens=67 if context is None else min(67, context - config.prefix_length),
        bos_token_id=language_model.generation_config.bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def _end_ids(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | list[int] | None:
    # Captions are trained to end with the tokenizer's end token, which need not be among those of the language model.
    ends, own = language_model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)
    if own is None or own == ends:
        return ends
    if ends is None:
        return own
    ends = ends if isinstance(ends, list) else [ends]
    return ends if own in ends else [own, *ends]


def load_language_model(name: str, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
    """A causal language model by Hub id or folder; one that is read from GGUF can be saved like any other."""
    if "gguf_file" not in kwargs:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    check_can_read_gguf(name)
    read = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    # transformers takes the model for a quantised one and refuses to save it, though its weights are ordinary ones.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=read.dtype)
    model.generation_config = read.generation_config
    return model


def check_can_read_gguf(name: str):
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"The weights of {name} are a GGUF file, which needs the package gguf: `pip install gguf`.")
