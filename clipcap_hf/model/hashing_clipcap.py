"""Hashes (SHA-256) by which weights are known again."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def weights_hash(tensors: Iterable[torch.Tensor]) -> str:
    """Hash the types, shapes and bytes of tensors, ignoring order and names.

    Names do not count because releases of transformers rename weights; tied weights count once.
    """

    def digest(tensor: torch.Tensor) -> bytes:
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    # Tied weights are read once, too.
    distinct = {(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()): t for t in tensors}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the GIL
        digests = set(pool.map(digest, distinct.values()))
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def cast_hash(weights: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> str:
    """Return the hash that weights have after conversion to the floating-point type of others."""
    dtype = next(value.dtype for value in like.values() if value.is_floating_point())
    return weights_hash(value.to(dtype) if value.is_floating_point() else value for value in weights.values())


def file_hash(path: str | os.PathLike) -> str:
    """Hash the bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["cast_hash", "file_hash", "weights_hash"]
