"""Layers that take less time in training on a CPU: same outputs and gradients, and dropout as often as asked for."""

import copy

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapTrainer, prepack_weights
from clipcap_hf.training.cpu_layers import _helps_here, cpu_layers
from torch import nn
from transformers import Seq2SeqTrainingArguments
from transformers.pytorch_utils import Conv1D


pytestmark = pytest.mark.skipif(not _helps_here(), reason="torch's own layers are fast here")


def outputs_and_gradients(layer: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor | None]:
    inputs = inputs.clone().requires_grad_()
    layer.zero_grad()
    outputs = layer(inputs)
    if outputs.requires_grad:
        (outputs * torch.arange(outputs.numel()).view_as(outputs).cos()).sum().backward()
    return [outputs.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48), (2, 3, 4, 48), (0, 48)])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(48, 70), lambda: nn.Linear(48, 33, bias=False), lambda: Conv1D(70, 48)]
)
def test_outputs_and_gradients(make, frozen, shape):
    torch.manual_seed(0)
    layer, inputs = make(), torch.randn(shape)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    expected = outputs_and_gradients(layer, inputs)
    with cpu_layers(layer):
        found = outputs_and_gradients(layer, inputs)
    assert [value is None for value in found] == [value is None for value in expected]
    for value, wanted in zip(found, expected):
        if value is not None:
            assert value.stride() == wanted.stride()
            torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p):
    layer, inputs = nn.Dropout(p), torch.full((500, 401), 3.0, requires_grad=True)
    with cpu_layers(layer):
        torch.manual_seed(1)
        found = layer(inputs)
        torch.manual_seed(1)
        assert torch.equal(layer(inputs), found)
        assert not torch.equal(layer(inputs), found)
        found.sum().backward()
    assert set(found.unique().tolist()) == {0.0, found.max().item()}
    torch.testing.assert_close(found.max().item(), 3 / (1 - p), atol=0, rtol=1e-3)
    assert torch.equal(inputs.grad, found.detach() / 3)
    dropped = (found == 0).float()
    tolerance = 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.mean().item() - p) < tolerance
    # Neighbours come from one random number of 64 bits, and are dropped independently of each other.
    row = dropped.flatten()
    for distance in (1, 2, 3, 4):
        both = (row[:-distance] * row[distance:]).mean().item()
        assert abs(both - p**2) < 2 * tolerance


def test_dropout_that_is_off():
    inputs = torch.randn(40, 40, requires_grad=True)
    for layer in (nn.Dropout(0.0), nn.Dropout(0.5).eval()):
        with cpu_layers(layer):
            assert torch.equal(layer(inputs), inputs)
    with cpu_layers(layer := nn.Dropout(1.0)):
        assert not layer(inputs).any()


def test_layers_are_as_before_afterwards():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), Conv1D(4, 16))
    prepack_weights(model)
    before = [layer.__dict__.get("forward") for layer in model]
    with pytest.raises(KeyboardInterrupt), cpu_layers(model):
        copied = copy.deepcopy(model)
        assert copied[0].forward.layer is copied[0]
        with torch.no_grad():
            model(torch.randn(3, 16))  # by prepacked weights
        assert before[0].packed is not None
        raise KeyboardInterrupt
    assert [layer.__dict__.get("forward") for layer in model] == before


def test_other_types_are_as_before():
    layer, inputs = nn.Linear(16, 8).double(), torch.randn(4, 16, dtype=torch.double)
    expected = layer(inputs)
    with cpu_layers(layer):
        assert torch.equal(layer(inputs), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.float()(inputs.float()).dtype == torch.bfloat16


def test_trainer(make_model, embeds_processor, tmp_path, monkeypatch):
    """The trainer uses them, and ends with the same weights as without them."""
    rows = [{"clip_embeds": [float(number)] * 16, "captions": "a red heart"} for number in range(4)]
    used, weights = [], []
    for helps in (True, False):
        monkeypatch.setattr("clipcap_hf.training.cpu_layers._helps_here", lambda: helps)
        model = make_model(None, freeze_language_model=True)  # frozen parts have no dropout
        linear = next(layer for layer in model.mapping_network.modules() if type(layer) is nn.Linear)
        linear.register_forward_hook(lambda layer, *_: used.append("forward" in layer.__dict__))
        args = Seq2SeqTrainingArguments(
            tmp_path / str(helps),
            max_steps=3,
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # or the steps of the smallest gradients would be those of their rounding
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
        )
        ClipCapTrainer(model, args, train_dataset=rows, data_collator=CaptioningCollator(embeds_processor)).train()
        weights.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert used == [True] * 3 + [False] * 3
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=2e-6, rtol=0)
