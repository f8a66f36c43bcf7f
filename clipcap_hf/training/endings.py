"""Warn of captions that end in another token than those at which captioning stops: such captions run on."""

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from .rows import spread_rows


logger = logging.getLogger(__name__)

MOST_CAPTIONS = 500  # to look at


def warn_of_endings(captions: Sequence[Sequence[str]], tokenizer, stops: int | Sequence[int] | None, append_eos: bool):
    """Warn if most captions end in a token that is no stop token.

    Args:
        captions (`list[list[str]]`): Captions of the training images; empty for a stream.
        tokenizer: The captioner's tokenizer.
        stops (`int` or `list[int]`, *optional*): The stop tokens of captioning.
        append_eos (`bool`): Whether training adds the tokenizer's end token to the captions.
    """
    texts = list(chain.from_iterable(captions))
    if not texts:
        return
    texts = [texts[row] for row in spread_rows(len(texts), MOST_CAPTIONS)]
    stop_ids = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    end = tokenizer.eos_token if append_eos else ""
    tokens = tokenizer([text + end for text in texts], add_special_tokens=False)["input_ids"]
    lasts = [ids[-1] for ids in tokens if ids]
    others = Counter(last for last in lasts if last not in stop_ids)
    if others.total() * 2 <= len(lasts):
        return
    most_common = tokenizer.decode([others.most_common(1)[0][0]])
    stop_names = ", ".join(repr(tokenizer.decode([stop])) for stop in stop_ids) or "no token"
    logger.warning(
        f"{others.total()} of {len(lasts)} training captions end in a token at which captioning does not stop, most "
        f"often {most_common!r}; it stops at {stop_names}. Captions will run on. Train the end token (`append_eos`; "
        "for clipcap reproduce, --choose captions-end=end-token), or end all captions in a stop token."
    )
