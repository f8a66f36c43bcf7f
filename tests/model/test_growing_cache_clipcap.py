"""A cache that grows in place holds what transformers' cache holds."""

import torch
from clipcap_hf.model.growing_cache_clipcap import ROOM, GrowingLayer, with_growing_layers
from transformers import DynamicCache, GPT2Config, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def test_holds_the_same_after_steps_and_changes_of_rows():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3)
    ordinary, growing = DynamicCache(config=config), with_growing_layers(DynamicCache(config=config))
    rows, tokens = 2, 5
    for step in range(2 * ROOM):
        for layer in range(3):
            states = torch.randn(2, rows, 4, tokens, 8)
            expected = ordinary.update(states[0], states[1], layer)
            found = growing.update(states[0], states[1], layer)
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
        if step % 3 == 0:  # beams change places, are repeated, and leave
            order = torch.randint(rows, (1 + step % 7,))
            rows = len(order)
            ordinary.reorder_cache(order)
            growing.reorder_cache(order)
        tokens = 1
        assert growing.get_seq_length() == ordinary.get_seq_length()


def test_beams_that_change_places_leave_the_prompt_where_it_is():
    """It is the same for all beams of an image; here there are three images, with two beams each."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2)
    ordinary, growing = DynamicCache(config=config), with_growing_layers(DynamicCache(config=config))
    places: list[tuple] = []
    for order in (
        [0, 0, 1, 1, 2, 2],
        [1, 0, 2, 2, 5, 4],
        [0, 0, 3, 2, 4, 4],
        [0, 1, 4, 5],
        [1, 0, 3, 3],
        [2, 3, 0, 1],
    ):
        tokens, rows = (1, len(growing.layers[0].keys)) if places else (5, 3)
        for layer in range(2):
            states = torch.randn(2, rows, 4, tokens, 8)
            ordinary.update(states[0], states[1], layer)
            growing.update(states[0], states[1], layer)
        ordinary.reorder_cache(torch.tensor(order))
        growing.reorder_cache(torch.tensor(order))
        for found, expected in zip(growing.layers, ordinary.layers):
            assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)
        places.append(tuple(layer.keys.data_ptr() for layer in growing.layers))
    # The prompts move when an image leaves, and when images change places.
    assert [here == before for before, here in zip(places, places[1:])] == [True, True, False, True, False]


def test_a_step_copies_nothing():
    layer = with_growing_layers(DynamicCache(config=GPT2Config(n_layer=1))).layers[0]
    layer.update(torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8))
    places = layer.keys.data_ptr(), layer.values.data_ptr()
    layer.update(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    assert places == (layer.keys.data_ptr(), layer.values.data_ptr())


def test_other_layers_stay():
    sliding = MistralConfig(num_hidden_layers=1, sliding_window=4)
    assert type(with_growing_layers(DynamicCache(config=sliding)).layers[0]) is DynamicSlidingWindowLayer
    full = DynamicCache(config=GPT2Config(n_layer=1))
    full.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    assert type(with_growing_layers(full).layers[0]) is DynamicLayer
    assert type(with_growing_layers(DynamicCache(config=GPT2Config(n_layer=1))).layers[0]) is GrowingLayer
    assert with_growing_layers(None) is None
