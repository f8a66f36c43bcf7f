"""The hashes by which weights are known again."""

import time

import torch
from clipcap_hf.model.hashing_clipcap import weights_hash


def test_hash_ignores_names_and_ties_and_sees_everything_else():
    a, b = torch.arange(6.0), torch.ones(2, 3)
    assert weights_hash([a, b]) == weights_hash([b, a, a])
    others = [a.half(), b], [a.view(2, 3), b], [a + 1e-6, b], [a], [a, b, torch.zeros(())]
    assert len({weights_hash(tensors) for tensors in ([a, b], *others)}) == len(others) + 1
    assert weights_hash([b.T]) == weights_hash([b.T.contiguous()])


def test_tied_weights_are_read_once():
    def seconds(tensors):
        start = time.process_time()
        weights_hash(tensors)
        return time.process_time() - start

    weight = torch.zeros(1_000_000)
    assert seconds([weight] * 300) < 30 * min(seconds([weight]) for _ in range(3))
