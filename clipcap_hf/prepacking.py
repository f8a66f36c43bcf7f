"""Weights laid out as a CPU multiplies by them, so that captioning does not lay them out again at every step."""

import logging
import platform
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


logger = logging.getLogger(__name__)

# What `torch.compile` uses for frozen weights; torch has no public name for it.
_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_multiply: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def prepack_weights(model: nn.Module) -> int:
    """
    Make the linear layers of a model on a CPU faster for inference, at the cost of a second copy of their weights.

    oneDNN multiplies by weights in a layout of its own. torch's linear layers keep theirs in rows and have them laid
    out at every call, which for the few rows of a decoding step takes longer than the product. Here each layer keeps
    a laid-out copy from its first use on. Weights that change are laid out again; with gradients, autocast or on
    another device a layer works as before. Outputs differ by rounding.

    Args:
        model (`torch.nn.Module`): A captioner, or any model, in float32 or bfloat16. Its `nn.Linear` layers and
            GPT-2's `Conv1D` are taken.

    Returns:
        `int`: Number of layers. 0 where this does not help: not an x86 processor, no oneDNN, or bfloat16 on a
            processor without instructions for it (AVX-512 or AVX-NE-CONVERT).

    Example:

    ```python
    >>> from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, prepack_weights

    >>> model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    >>> layers = prepack_weights(model)

    ```
    """
    dtypes = tuple(dtype for dtype in (torch.float32, torch.bfloat16) if has_onednn(dtype))
    layers = [
        layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D) and layer.weight.dtype in dtypes
    ]
    for layer in layers:
        layer.forward = _PrepackedForward(layer, dtypes)
    return len(layers)


def prepack_where_it_fits(model: nn.Module) -> int:
    """Prepack the weights of a model if the memory that is free would hold two more copies of them."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return prepack_weights(model) if psutil.virtual_memory().available > 2 * size else 0


class _PrepackedForward:
    """The forward pass of a linear layer, (..., in) to (..., out)."""

    def __init__(self, layer: nn.Module, dtypes: tuple[torch.dtype, ...]):
        self.layer = layer
        self.dtypes = dtypes  # that this processor can multiply
        self.packed: torch.Tensor | None = None
        self.packed_from: tuple[int, int] | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight: Any = self.layer.weight
        if weight.dtype not in self.dtypes or not _is_plain_inference(inputs, weight):
            return type(self.layer).forward(self.layer, inputs)
        if self.packed_from != (version := (weight.data_ptr(), weight._version)):
            rows = weight.t() if isinstance(self.layer, Conv1D) else weight
            self.packed, self.packed_from = prepack(rows.detach()), version
        return multiply(inputs, self.packed, self.layer.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "packed": None, "packed_from": None}  # a laid-out copy cannot be copied


def _is_plain_inference(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not weight.is_inference()  # such weights do not tell when they change
        and inputs.device.type == weight.device.type == "cpu"
        and inputs.dtype == weight.dtype
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def prepack(rows: torch.Tensor) -> torch.Tensor:
    """Lay a weight (out, in) out as oneDNN multiplies by it; only [`multiply`] understands the result."""
    return _pack(rows.contiguous(), None)


def multiply(inputs: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply inputs (..., in) by a weight (out, in), laid out by oneDNN or not; without gradients."""
    return _multiply(inputs, rows, bias, "none", [], "")


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Test whether this is an x86 processor and torch offers oneDNN's products of this type there."""
    if _pack is None or _multiply is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with torch.no_grad():
        inputs, weight = torch.ones(2, 16, dtype=dtype), torch.arange(64.0).view(4, 16).to(dtype)
        try:
            product = multiply(inputs, prepack(weight))
        except RuntimeError as error:
            logger.debug(f"No prepacked weights in {dtype}: {error}")
            return False
        return torch.allclose(product, inputs @ weight.t())


__all__ = ["has_onednn", "multiply", "prepack", "prepack_weights", "prepack_where_it_fits"]
