"""Count the n-grams of a whole corpus at once, for BLEU and CIDEr.

Usual implementations are slow because they use a Python dictionary per caption. Here words and n-grams are integer
ids in flat arrays, and counting is sorting, so that 240,000 captions take seconds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count

import numpy as np


MAX_ORDER = 4


@dataclass
class OrderCounts:
    """The n-grams of one order: h rows for the captions and r for the references, each a distinct n-gram of a text.

    Arrays of the same length belong together and are sorted by text; ids run from 0 to `size` - 1.
    """

    size: int  # number of different n-grams
    caption_image: np.ndarray  # (h,) the image
    caption_ngram: np.ndarray  # (h,) the n-gram's id
    caption_count: np.ndarray  # (h,) how often it occurs in the image's caption
    reference: np.ndarray  # (r,) the number of the reference among those of all images
    reference_ngram: np.ndarray  # (r,)
    reference_count: np.ndarray  # (r,)
    in_caption: np.ndarray  # (r,) the row (of h) with this n-gram in the caption of the same image, or -1
    example: np.ndarray  # (size,) a position in `Corpus.words` where the n-gram begins


class Corpus:
    """Tokenized captions and their references.

    Args:
        captions (`Sequence[str]`): n tokenized captions, one per image.
        references (`Sequence[Sequence[str]]`): n lists of tokenized references, none of them empty.
    """

    def __init__(self, captions: Sequence[str], references: Sequence[Sequence[str]]):
        self.captions, self.references = captions, references
        self.references_per_image = np.array([len(group) for group in references])  # (n,)
        self.image_of_reference = np.repeat(np.arange(len(captions)), self.references_per_image)  # (all references,)

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def _split(self) -> list[list[str]]:
        return [line.split() for line in chain(self.captions, chain.from_iterable(self.references))]

    @cached_property
    def words(self) -> list[str]:
        """The words of all captions, then of all references."""
        return list(chain.from_iterable(self._split))

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(words) for words in self._split])

    @property
    def caption_lengths(self) -> np.ndarray:
        """Number of words in each caption, (n,)."""
        return self._lengths[: len(self)]

    @property
    def reference_lengths(self) -> np.ndarray:
        """Number of words in each reference, (all references,)."""
        return self._lengths[len(self) :]

    @cached_property
    def orders(self) -> list[OrderCounts]:
        """Counts of 1-grams to 4-grams."""
        return [self._count(*ngrams) for ngrams in self._ngrams()]

    def _ngrams(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield for each order the text, the id and the first position of each n-gram, as three arrays."""
        ids: defaultdict[str, int] = defaultdict(count().__next__)
        tokens = np.fromiter(map(ids.__getitem__, self.words), np.int64, len(self.words))
        line = np.repeat(np.arange(len(self._lengths)), self._lengths)
        words_left = np.repeat(np.cumsum(self._lengths), self._lengths) - np.arange(len(tokens))
        start, ngram = np.arange(len(tokens)), tokens
        for order in range(1, MAX_ORDER + 1):
            if order > 1:  # a longer n-gram is the pair of the shorter one and the next word
                fits = words_left[start] >= order
                start = start[fits]
                pairs = ngram[fits] * len(ids) + tokens[start + order - 1]
                ngram = np.unique(pairs, return_inverse=True)[1]
            yield line[start], ngram, start

    def _count(self, line: np.ndarray, ngram: np.ndarray, start: np.ndarray) -> OrderCounts:
        size = int(ngram.max(initial=-1)) + 1
        example = np.empty(size, np.int64)
        example[ngram] = start
        keys, counts = np.unique(line * size + ngram, return_counts=True)
        line, ngram = np.divmod(keys, max(size, 1))
        first = np.searchsorted(line, len(self))  # captions come first, then references
        reference = line[first:] - len(self)
        wanted = self.image_of_reference[reference] * size + ngram[first:]
        place = np.searchsorted(keys[:first], wanted)
        found = np.append(keys[:first], -1)[place] == wanted
        return OrderCounts(
            size=size,
            caption_image=line[:first],
            caption_ngram=ngram[:first],
            caption_count=counts[:first],
            reference=reference,
            reference_ngram=ngram[first:],
            reference_count=counts[first:],
            in_caption=np.where(found, place, -1),
            example=example,
        )
