"""Choose the words that all captions start with, so that a captioner need not learn them from a few images.

Words in front of what a captioner knows how to write move all of it to other positions, and a small language model
then forgets it, however it is trained. If all captions start with the same words, these say nothing about the image:
the processor puts them in front (`caption_start`), and the captioner goes on writing from its first word.
"""

import copy
import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from ..model.processing_clipcap import ClipCapProcessor
from .collator import IGNORED, CaptioningCollator
from .rows import spread_rows
from .trainer import ClipCapTrainer


logger = logging.getLogger(__name__)

MOST_ROWS = 64  # to choose by


def set_caption_start(trainer: ClipCapTrainer, captions: Sequence[Sequence[str]], chosen: str | None, existing: bool):
    """Set the processor's `caption_start` for a run, and log it.

    Args:
        trainer ([`ClipCapTrainer`]): The trainer, before training.
        captions (`list[list[str]]`): Captions of the training images; empty for a stream.
        chosen (`str`, *optional*): The words that the user chose; `""` for none.
        existing (`bool`): Whether the captioner was trained before. A new one can learn all words at once.

    Raises:
        ValueError: If no training caption starts with the words that the user chose.
    """
    processor = trainer.processing_class
    texts = [text for group in captions for text in group]
    if chosen is not None:
        processor.caption_start = _checked(chosen, texts)
    elif existing and len(set(texts)) > 1:
        processor.caption_start = _most_likely(trainer, shared_starts(texts))
    if processor.caption_start:
        logger.info(
            f"All captions start with {processor.caption_start.strip()!r}: these words are put in front of each "
            "caption, and the captioner learns the rest. (`--caption-start ''` makes it learn these words, too.)"
        )


def shared_starts(captions: Sequence[str]) -> list[str]:
    """Return what all captions start with, in whole words: nothing, one word, two words, and so on.

    At least one word of each caption is left over.

    ```python
    >>> from clipcap_hf.training.caption_start import shared_starts
    >>> shared_starts(["a drawing of a cat", "a drawing of two red hearts"])
    ['', 'a ', 'a drawing ', 'a drawing of ']

    ```
    """
    words = [caption.split(" ")[:-1] for caption in captions]
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words))]
    return ["", *(" ".join(shared[:count]) + " " for count in range(1, len(shared) + 1))]


def _checked(start: str, captions: Sequence[str]) -> str:
    if start and captions:
        spaced = start.rstrip() + " "
        start = spaced if any(text.startswith(spaced) for text in captions) else start
        if without := sum(not text.startswith(start) for text in captions):
            if without == len(captions):
                raise ValueError(
                    f"`caption_start`: no training caption starts with {start!r}; the first is {captions[0][:80]!r}."
                )
            logger.warning(
                f"{without} of the {len(captions)} captions do not start with {start!r}; the captioner learns them "
                "whole, and the words are put in front of what it writes."
            )
    return start


def _most_likely(trainer: ClipCapTrainer, starts: list[str]) -> str:
    """Return the start after which the captioner, before training, finds the rest of the captions most likely."""
    if len(starts) == 1:
        return ""
    data: Any = trainer.train_dataset
    rows = [data[row] for row in spread_rows(len(data), MOST_ROWS)]
    processor = copy.copy(trainer.processing_class)
    collator = copy.copy(trainer.data_collator.for_evaluation())
    collator.processor = processor
    surprise = [_surprise(trainer, processor, collator, rows, start) for start in starts]
    return starts[surprise.index(min(surprise))]


@torch.no_grad()
def _surprise(
    trainer: ClipCapTrainer, processor: ClipCapProcessor, collator: CaptioningCollator, rows: list[dict], start: str
) -> float:
    """Return the sum of the losses of all tokens after a start, which itself is certain."""
    processor.caption_start = start
    model, size, total = trainer.model.eval(), trainer.args.eval_batch_size, 0.0
    for first in range(0, len(rows), size):
        batch = trainer._prepare_inputs(collator(rows[first : first + size]))
        del batch["prompt_length"]
        tokens = (batch["labels"] != IGNORED).sum()
        total += float(model(**batch).loss * tokens)
    return total
