"""Keys and values with room for more tokens, so that a decoding step writes one token instead of copying all.

When beams change places, only the tokens since the prompt are copied: all beams of an image have the same prompt.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


ROOM = 16  # tokens; more would be copied in vain when beams change places


class GrowingLayer(DynamicLayer):
    """A layer of [`~transformers.DynamicCache`]; keys and values (rows, heads, tokens, head_dim) are views."""

    def __init__(self, shared: "Shared"):
        super().__init__()
        self.shared = shared
        self.buffers: list[torch.Tensor] = []
        self.prompt_length: int | None = None  # tokens that were there when rows were first selected
        self.selections = 0

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
        self.selections += 1
        length = self.get_seq_length()
        if length == 0:
            return
        if self.prompt_length is None:
            self.prompt_length = length
        if self.shared.prompts_stay(self.selections, len(self.buffers[0]), beam_idx):
            for buffer in self.buffers:
                own = buffer[..., self.prompt_length : length, :]
                own.copy_(own.index_select(0, beam_idx.to(own.device)))
            return
        self.buffers = [self.shared.select(buffer, beam_idx) for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


class Shared:
    """What the layers of a cache share: which prompt each row has, and spare memory."""

    def __init__(self):
        self.selections = 0
        self.prompts: torch.Tensor | None = None  # (rows,)
        self.stay = False
        self.buffer: torch.Tensor | None = None

    def prompts_stay(self, selection: int, number: int, rows: torch.LongTensor) -> bool:
        """Tell whether a selection of rows leaves each prompt in its place; all layers make the same ones."""
        if selection != self.selections:
            before = torch.arange(number, device=rows.device) if self.prompts is None else self.prompts
            self.selections, self.prompts = selection, before[rows]
            self.stay = torch.equal(before, self.prompts)
        return self.stay

    def select(self, buffer: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
        """Select rows into the memory that the last selection left over."""
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
        shared = Shared()
        cache.layers = [GrowingLayer(shared) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


__all__ = ["GrowingLayer", "with_growing_layers"]
