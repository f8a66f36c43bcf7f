"""Linear layers and dropout that take less time when a model is trained on a CPU that is not Intel's.

torch multiplies float32 matrices by MKL, which is at its best on Intel's processors. On others oneDNN is up to a tenth
faster. Random numbers for dropout are MKL's too, one number per element; here one of 64 bits serves four elements.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..prepacking import has_onednn, multiply


LEVELS = 2**16  # of a random number; the chance of dropping an element is rounded to one of them


@contextmanager
def cpu_layers(model: nn.Module) -> Iterator[None]:
    """
    Within this context, let the linear layers and the dropout of a model on a CPU take less time in training.

    Outputs and gradients differ by rounding, and dropout draws other random numbers. With other types than float32,
    under autocast, without gradients or on another device, layers work as before. On Intel's processors, and on others
    than x86, nothing changes.

    Args:
        model (`torch.nn.Module`): Any model. Its `nn.Linear`, `nn.Dropout` and GPT-2's `Conv1D` are taken.
    """
    kinds: dict[type, type] = {nn.Linear: _Linear, Conv1D: _Linear, nn.Dropout: _Dropout}
    layers = [layer for layer in model.modules() if type(layer) in kinds] if _helps_here() else []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = kinds[type(layer)](layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@cache
def _helps_here() -> bool:
    return not _is_intel() and has_onednn()


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "Intel" in (cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor())


class _Forward:
    """In place of a layer's `forward`: something faster where it can be used, else what was there before."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.ordinary = layer.forward

    def may_be_faster(self, *tensors: torch.Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)  # not sharded or quantised
            and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
            and tensors[0].numel() > 0
            and tensors[0].ndim > 1
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _Linear(_Forward):
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight: Any = self.layer.weight
        if not self.may_be_faster(inputs, weight):
            return self.ordinary(inputs)
        rows = weight.t() if isinstance(self.layer, Conv1D) else weight
        return _LinearFunction.apply(inputs, rows, self.layer.bias)


class _Dropout(_Forward):
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        p: Any = self.layer.p
        if not self.layer.training or p in (0, 1) or not self.may_be_faster(inputs):
            return self.ordinary(inputs)
        return inputs * dropout_scale(inputs.shape, p)


def dropout_scale(shape: torch.Size, p: float) -> torch.Tensor:
    """Draw what dropout multiplies by: 0 with a chance of `p`, rounded to a multiple of 2 ** -16, else `1 / (1 - p)`.

    Returns:
        `torch.Tensor` of the given shape, float32.
    """
    dropped = min(round(p * LEVELS), LEVELS - 1)
    count = shape.numel()
    random = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    levels = random.view(torch.int16)[:count].view(shape)
    return torch.ge(levels, dropped - LEVELS // 2, out=torch.empty(shape)).mul_(LEVELS / (LEVELS - dropped))


class _LinearFunction(torch.autograd.Function):
    """`inputs @ rows.t() + bias` by oneDNN: (..., in) with rows (out, in) to (..., out)."""

    @staticmethod
    def forward(ctx, inputs, rows, bias):
        ctx.save_for_backward(inputs, rows)
        return multiply(inputs, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inputs, rows = ctx.saved_tensors
        to_inputs, to_rows, to_bias = ctx.needs_input_grad
        outer, inner = gradient.flatten(0, -2), inputs.flatten(0, -2)
        weight_gradient = None
        if to_rows and rows.is_contiguous():
            weight_gradient = multiply(outer.t(), inner.t())
        elif to_rows:  # a Conv1D's weight is (in, out), and so must its gradient be laid out
            weight_gradient = multiply(inner.t(), outer.t()).t()
        return (
            multiply(gradient, rows.t()) if to_inputs else None,
            weight_gradient,
            outer.sum(0) if to_bias else None,
        )


__all__ = ["cpu_layers", "dropout_scale"]
