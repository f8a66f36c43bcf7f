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

from .configuration_clipcap import IMAGE_TOKEN, ClipCapConfig, check_language_model, context_length
from .damage_clipcap import load_config, named, naming


def load_tokenizer(folder: str, config: PreTrainedConfig, **kwargs) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in a language model's folder; return `None` if there is none.

    Raises:
        ValueError: If the language model cannot write captions, or embeds fewer tokens than the tokenizer has.
    """
    check_language_model(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": False, **kwargs})
    except (ImportError, OSError, TypeError, ValueError):  # TypeError: old tokenizers without their files
        return None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers for want of files
        return None
    tokens, rows = placeholder_id(tokenizer), config.get_text_config().vocab_size
    if tokens > rows:
        raise ValueError(
            f"The tokenizer of {folder} has {tokens} tokens, but its language model embeds {rows}: does it belong to "
            "another model? If you added tokens to it, load both, call `resize_token_embeddings(len(tokenizer))` on "
            "the language model, and save both into one folder."
        )
    return tokenizer


def placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the `<image>` placeholder, by default the tokenizer's first unused id.

    It may lie below `vocab_size`: many language models (OPT, Qwen) embed more tokens than their tokenizers have.
    """
    return tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))


def fuse_gelu(language_model: PreTrainedModel):
    """Replace GPT-2's activation, which takes eight passes over memory, by torch's single kernel.

    Unlike `activation_function="gelu_pytorch_tanh"`, this also works on a loaded model and leaves its configuration
    unchanged.
    """
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def has_limited_positions(language_model: PreTrainedModel) -> bool:
    """Tell whether a language model looks its positions up in a table, beyond which it cannot read; RoPE has none."""
    if language_model.config.get_text_config().model_type == "xglm":  # its table grows
        return False
    return not any(name.endswith("inv_freq") for name, _ in language_model.named_buffers())


def caption_generation_config(
    language_model: PreTrainedModel, config: ClipCapConfig, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """Build a new captioner's generation settings: the end of captions and their largest length."""
    text_config = config.language_config
    eos_token_id, pad_token_id = _end_ids(language_model, tokenizer), language_model.generation_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    if pad_token_id is not None and pad_token_id >= text_config.vocab_size:
        pad_token_id = 0  # it pads finished captions while others continue, so it needs an embedding
    # The official decoders stop after 67 tokens.
    context = context_length(text_config)
    return GenerationConfig(
        max_new_tokens=67 if context is None else min(67, context - config.prefix_length),
        bos_token_id=language_model.generation_config.bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def _end_ids(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | list[int] | None:
    # Training captions end with the tokenizer's end token, which the language model's settings may lack.
    ends, own = language_model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)
    if own is None or own == ends:
        return ends
    if ends is None:
        return own
    ends = ends if isinstance(ends, list) else [ends]
    return ends if own in ends else [own, *ends]


def load_language_model(name: str, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
    """Load a causal language model by Hub id or folder.

    Code in its repository only runs with `trust_remote_code=True`.

    Raises:
        ValueError: If this kind of language model cannot write captions, see [`check_language_model`].
    """
    kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" in kwargs:
        return _load_gguf(name, dtype, **kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        config = load_config(name, **kwargs)
    check_language_model(config)
    with named(name), naming(f"The weights in {name}"):
        return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **kwargs)


def _load_gguf(name: str, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
    check_can_read_gguf(name)
    read = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    # transformers considers the model quantised and refuses to save it, though its weights are ordinary.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=read.dtype)
    model.generation_config = read.generation_config
    return model


def check_can_read_gguf(name: str):
    """Raise an `ImportError` that says what to install if the `gguf` package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"The weights of {name} are a GGUF file, which needs the package gguf: `pip install gguf`.")
