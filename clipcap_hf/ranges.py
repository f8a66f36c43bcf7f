"""Ranges of the numbers that users set, in Python and on the command line."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


#: Larger than any sensible count, and small enough for all libraries.
MOST = 2**31 - 1
MOST_BEAMS = 1000  # memory and time grow with the number of beams
_MOST_WORKERS = 1024  # processes
_LARGEST_SEED = 2**32 - 1  # of NumPy


class Range(NamedTuple):
    """
    The numbers that an option takes.

    Args:
        low (`float`): The smallest one.
        high (`float`): The largest one.
        above (`bool`): Whether `low` itself is too small.
        also (`tuple` of `float`): Numbers outside of the range that have a meaning of their own.
        hint (`str`): What to do instead of a number outside.
    """

    low: float
    high: float = MOST
    above: bool = False
    also: tuple[float, ...] = ()
    hint: str = ""

    def complaint(self, value: Any) -> str | None:
        """Say which numbers are allowed; return None if this one is."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"must be a number, but is {repr(value)[:40]}"
        inside = self.low <= value <= self.high and not (self.above and value == self.low)  # False for NaN
        if inside or value in self.also:
            return None
        wanted = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high != MOST or value > self.high:
            wanted += f" and at most {self.high:.10g}"
        wanted += "".join(f", or {other:g}" for other in self.also)
        return f"must be {wanted}, but is {str(value)[:40]}" + (f": {self.hint}" if self.hint else "")


ANY = Range(-MOST)
COUNT = Range(1)
COUNT_OR_NONE = Range(0)
BEAMS = Range(1, MOST_BEAMS)
WORKERS = Range(0, _MOST_WORKERS)
PORT = Range(1, 65535)
SEED = Range(0, _LARGEST_SEED)

#: Of the options of training, by field.
TRAINING: dict[str, Range] = {
    **dict.fromkeys(("prefix_length", "clip_length", "clip_embed_dim", "lora_r", "max_caption_length"), COUNT),
    "warm_start": COUNT_OR_NONE,
    "max_train_samples": COUNT._replace(hint="leave it out for all images"),
    "max_eval_samples": COUNT._replace(hint="leave it out for all images or `eval_split none` for no evaluation"),
    "embeds_noise": Range(0, 1),
    "validation_share": Range(0, 0.5),
    "num_train_epochs": Range(0, above=True),
    "max_steps": COUNT._replace(also=(-1,), hint="-1 is for all epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience", "generation_max_length"), COUNT),
    "generation_num_beams": BEAMS,
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), Range(0, above=True)),
    **dict.fromkeys(("warmup_steps", "eval_delay", "neftune_noise_alpha"), COUNT_OR_NONE),
    "learning_rate": Range(0, 1000, above=True),
    "adam_epsilon": Range(0, 1, above=True),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 0.9999999)),
    "weight_decay": Range(0, 1000),
    "max_grad_norm": COUNT_OR_NONE._replace(hint="0 disables clipping"),
    "label_smoothing_factor": Range(0, 0.99),
    "num_samples": COUNT_OR_NONE._replace(hint="0 writes no samples"),
    "dataloader_num_workers": WORKERS,
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), COUNT),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "local_rank": COUNT_OR_NONE._replace(also=(-1,)),
}


def check_ranges(values: Any, ranges: Mapping[str, Range] = TRAINING):
    """Refuse numbers outside their range among the fields of an object; None passes.

    Raises:
        ValueError: If one is; the message names the field and its range.
    """
    for name, allowed in ranges.items():
        value = getattr(values, name, None)
        if value is not None and (complaint := allowed.complaint(value)) is not None:
            raise ValueError(f"`{name}` {complaint}.")


def number(kind: Callable[[str], Any], allowed: Range) -> Callable[[str], Any]:
    """Return a type for `argparse`: `int` or `float` (`kind`), and in the range."""

    def read(text: str):
        value = kind(text)
        if (complaint := allowed.complaint(value)) is not None:
            raise argparse.ArgumentTypeError(complaint)
        return value

    read.__name__ = "whole number" if kind is int else "number"  # argparse says: invalid number value: ''
    return read
