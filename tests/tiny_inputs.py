"""Helpers of the model tests: tiny inputs, and comparisons of weights."""

import torch
from torch.nn import functional as F


MAPPINGS = ["mlp", "transformer", "linear"]
TOWERS = ["clip", "vit", "resnet", "timm"]


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
