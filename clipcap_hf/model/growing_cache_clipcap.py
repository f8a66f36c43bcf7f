"""Keys and values with room for more tokens, so that a decoding step writes one token instead of copying all.

When beams change places, only the tokens since the prompt are copied: all beams of an image have the same prompt.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


ROOM = 16  # tokens; more would be copied in vain when beams change places


class GrowingLayer(DynamicLayer):
    """A layer of [`~transformers.DynamicCache`]; keys and values (rows, heads, tokens, head_dim) are views."""

    def __init__(self, spare: "Spare"):
        super().__init__()
        self.spare = spare
        self.buffers: list[torch.Tensor] = []
        self.prompt_length = 0  # tokens that were there before any row was selected
        self.prompts = torch.empty(0, dtype=torch.long)  # of each row, the number of its prompt

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), key_states.shape[-2]
        if not self.buffers or old + new > self.buffers[0].shape[-2]:
            self.buffers = [_with_room(self.keys, key_states, old), _with_room(self.values, value_states, old)]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[..., old : old + new, :] = states
        self.keys, self.values = (buffer[..., : old + new, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        length = self.get_seq_length()
        if length == 0:
            return
        if len(self.prompts) == 0:
            self.prompt_length, self.prompts = length, torch.arange(len(self.keys), device=beam_idx.device)
        prompts = self.prompts[beam_idx]
        if torch.equal(prompts, self.prompts):
            for states in (self.keys, self.values):
                own = states[..., self.prompt_length :, :]
                own.copy_(own.index_select(0, beam_idx.to(own.device)))
            return
        self.prompts = prompts
        self.buffers = [self.spare.select(buffer, beam_idx) for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


class Spare:
    """The memory that the last selection of rows left over: the next one, of another layer, is written there."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None

    def select(self, buffer: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
        shape = (len(rows), *buffer.shape[1:])
        target = self.buffer
        if target is None or target.shape != shape or target.dtype != buffer.dtype or target.device != buffer.device:
            target = buffer.new_empty(shape)
        self.buffer = buffer
        return torch.index_select(buffer, 0, rows.to(buffer.device), out=target)


def _with_room(held: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    rows, heads, tokens, head_dim = new.shape
    buffer = new.new_empty(rows, heads, length + tokens + ROOM, head_dim)
    if length:
        buffer[..., :length, :] = held
    return buffer


def with_growing_layers(cache: Cache | None) -> Cache | None:
    """Give an empty cache layers that grow in place, where it has ordinary ones."""
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        spare = Spare()
        cache.layers = [GrowingLayer(spare) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


__all__ = ["GrowingLayer", "with_growing_layers"]
