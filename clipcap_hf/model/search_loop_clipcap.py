"""The loop that all searches here share: it runs the language model on the captions that the search asks for."""

from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from .growing_cache_clipcap import with_growing_layers
from .versions_clipcap import CACHE


class Decoder(Protocol):
    """What the searches need of a model: any causal language model of transformers has it, and so do captioners."""

    config: PreTrainedConfig

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict[str, Any]: ...

    def __call__(self, **kwargs) -> Any: ...


class Hypotheses(Protocol):
    @property
    def live_sequences(self) -> torch.Tensor:
        """The captions to extend, with their prompts: (rows, tokens), a row for each row of logits to come."""
        ...

    def extend(self, logits: torch.Tensor) -> torch.Tensor:
        """Take one step on the logits (rows, vocabulary), which may be overwritten.

        Returns:
            For each row of the new `live_sequences`, the row that it continues; nothing when the search is over.
        """
        ...


def search(model: Decoder, input_ids: torch.Tensor, model_kwargs: dict[str, Any], hypotheses: Hypotheses):
    """Extend the hypotheses until they say that the search is over."""
    model_kwargs[CACHE] = with_growing_layers(model_kwargs.get(CACHE))
    outputs = _read_prompts(model, input_ids, model_kwargs)
    while True:
        _add_token(model_kwargs, outputs)
        # float32 as in transformers; the sequences' device decides where the bookkeeping is done.
        logits = outputs.logits[:, -1].to(input_ids.device, torch.float32)
        del outputs  # the first logits may be large
        parent_rows = hypotheses.extend(logits)
        if len(parent_rows) == 0:
            break
        if not _is_every_row(parent_rows, len(logits)):
            _select_rows(model_kwargs, parent_rows)
        model_inputs = model.prepare_inputs_for_generation(
            hypotheses.live_sequences, next_sequence_length=1, **model_kwargs
        )
        outputs = model(**model_inputs, return_dict=True)


def one_row_per_image(
    model: Decoder, input_ids: torch.Tensor, num_beams: int, model_kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Undo that `generate()` repeats every row `num_beams` times, so that a prompt is read once."""
    batch_size = len(input_ids) // num_beams

    def first_of_each(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim:
            # The last of the three dimensions: several images in one prompt.
            return value.unflatten(0, (batch_size, num_beams, -1))[:, 0].flatten(0, 1)
        return value

    model_kwargs = dict(model_kwargs)
    if images := model_kwargs.pop("mm_encoder_outputs", None):
        placeholders = (input_ids == model.config.image_token_id).sum(1)
        if (placeholders != placeholders[0]).any():
            raise ValueError("official_beam_search needs the same number of images in each prompt of a batch.")
        # `generate()` repeats only the prefix among the vision tower's outputs, and only the prefix is needed.
        prefix = type(images["image"])(pooler_output=first_of_each(images["image"].pooler_output))
        model_kwargs["mm_encoder_outputs"] = {"image": prefix}
    one_each = {name: first_of_each(value) for name, value in model_kwargs.items()}
    return first_of_each(input_ids), one_each


def _read_prompts(model: Decoder, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Run the model on whole prompts; their images are in the cache then and leave the inputs."""
    model_inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = model(**model_inputs, return_dict=True)
    for name in ("mm_encoder_outputs", "pixel_values", "clip_embeds", "inputs_embeds"):
        model_kwargs.pop(name, None)
    return outputs


def _add_token(model_kwargs: dict[str, Any], outputs: Any):
    """Make the inputs those of the next token, in place."""
    model_kwargs[CACHE] = outputs[CACHE]
    for name, step in (("attention_mask", None), ("position_ids", 1), ("token_type_ids", 0)):
        if (values := model_kwargs.get(name)) is not None:
            last = torch.ones_like(values[..., -1:]) if step is None else values[..., -1:] + step
            model_kwargs[name] = torch.cat([values, last], dim=-1)


def _is_every_row(rows: torch.Tensor, number: int) -> bool:
    return len(rows) == number and torch.equal(rows, torch.arange(number, device=rows.device))


def _select_rows(model_kwargs: dict[str, Any], rows: torch.Tensor):
    """Make the cache and the other inputs those of the given rows, repeated or left out as needed, in place."""
    model_kwargs[CACHE].reorder_cache(rows)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            model_kwargs[name] = value[rows.to(value.device)]


__all__ = ["Decoder", "Hypotheses", "one_row_per_image", "search"]
