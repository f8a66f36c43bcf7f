"""Measure the limits of the machine: how fast it multiplies matrices, and how fast it reads weights."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..model.modeling_clipcap import ClipCapForConditionalGeneration


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Measure how long a function takes, including its work on the device."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations per second, in a matrix product of a language model's size."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    repeats = 10
    return max(
        repeats * 2 * size**3 / seconds(lambda: [left @ right for _ in range(repeats)], device) for _ in range(3)
    )


def read_bytes(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many bytes of weights per second a product of a large matrix and a vector reads."""
    weights = torch.randn(50_000, 768, device=device, dtype=dtype)
    vector = torch.randn(768, device=device, dtype=dtype)
    weights @ vector
    size = weights.numel() * weights.element_size()
    return max(5 * size / seconds(lambda: [weights @ vector for _ in range(5)], device) for _ in range(3))


def weights_read(model: ClipCapForConditionalGeneration) -> int:
    """Count the bytes of weights that one token reads: all, except embeddings that are only looked up."""
    language_model = model.language_model
    read = {id(p): p.numel() * p.element_size() for p in language_model.parameters()}
    head, looked_up = language_model.get_output_embeddings().weight, language_model.get_input_embeddings().weight
    if head is not looked_up:
        read.pop(id(looked_up), None)
    for name, parameter in language_model.named_parameters():
        if "wpe" in name or "embed_positions" in name:
            read.pop(id(parameter), None)
    return sum(read.values())


def decode_flops(model: ClipCapForConditionalGeneration) -> int:
    """Count floating-point operations per token, without attention, which is small for short captions."""
    element = next(model.language_model.parameters()).element_size()
    return 2 * weights_read(model) // element
