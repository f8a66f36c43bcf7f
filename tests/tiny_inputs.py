"""Helpers of the model tests: tiny inputs and language models, and comparisons of weights."""

import torch
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig


MAPPINGS = ["mlp", "transformer", "linear"]
TOWERS = ["clip", "vit", "resnet", "timm"]
# What each kind of language model needs besides the sizes that all share.
SIZES = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED_HEADS = {"num_key_value_heads": 2, "intermediate_size": 48}
LANGUAGE_MODELS = {
    "gpt2": {"n_positions": 128},
    "llama": GROUPED_HEADS,
    "mistral": {**GROUPED_HEADS, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "qwen3": {**GROUPED_HEADS, "head_dim": 8},
}


def tiny_language_model(kind: str, **settings) -> PreTrainedConfig:
    """Make the configuration of a language model of two layers."""
    return AutoConfig.for_model(kind, **{**SIZES, **LANGUAGE_MODELS[kind], **settings})


def pixels(model, batch=2):
    size = model.config.vision_config.image_size
    return torch.randn(batch, 3, size, size)


def prompt_ids(model, *rest):
    """Return `input_ids` of one row: the placeholders and then these tokens."""
    return torch.tensor([[model.config.image_token_id] * model.config.prefix_length + list(rest)])


def left_padded(model, *rows):
    rows = [prompt_ids(model, *row)[0] for row in rows]
    length = max(map(len, rows))
    input_ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask}


def aligned(model):
    """Copy the weights: loading leaves them at odd addresses, which changes the last bit of some products."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def assert_same_weights(model, other):
    state, other = model.state_dict(), other.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
