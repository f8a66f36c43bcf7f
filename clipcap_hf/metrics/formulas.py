"""BLEU, ROUGE-L, CIDEr-D, exact match and diversity, by the formulas of their papers.

Scores equal those of the COCO caption evaluation (pycocoevalcap), with its constants and conventions.
"""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from .ngrams import MAX_ORDER, Corpus


# A score and its value for each image: {"cider": (0.98, array of n)}.
Scores = dict[str, tuple[float, np.ndarray]]


def _sums(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Sum values by index to (size,) floats; without values, bincount would give integers."""
    return np.bincount(index, values, size).astype(float)


def bleu(corpus: Corpus) -> Scores:
    """Compute BLEU-1 to BLEU-4 of the corpus and of each image (Papineni et al., 2002), in 0..1.

    The brevity penalty of an image uses the reference whose length is closest to the caption's, and of two equally
    close ones the shorter. The corpus score comes from summed counts and is not the mean over images.

    Returns:
        `bleu_1` to `bleu_4`.
    """
    tiny, small = 1e-15, 1e-9  # the COCO evaluation's guards against 0 / 0
    images, lengths = len(corpus), corpus.caption_lengths
    # Find the least (distance, length) of each image; as one number, a single reduction finds it.
    base = int(corpus.reference_lengths.max(initial=0)) + 1
    distance = np.abs(corpus.reference_lengths - lengths[corpus.image_of_reference])
    first_references = np.cumsum(corpus.references_per_image) - corpus.references_per_image
    closest = np.minimum.reduceat(distance * base + corpus.reference_lengths, first_references) % base

    correct, guess = np.zeros((MAX_ORDER, images)), np.zeros((MAX_ORDER, images))
    for n, order in enumerate(corpus.orders):
        allowed = np.zeros(len(order.caption_count), np.int64)  # the largest count in a single reference
        shared = order.in_caption >= 0
        np.maximum.at(allowed, order.in_caption[shared], order.reference_count[shared])
        correct[n] = _sums(order.caption_image, np.minimum(allowed, order.caption_count), images)
        guess[n] = np.maximum(lengths - n, 0)

    def geometric_means(correct, guess, length, reference_length):
        precisions = np.cumprod((correct + tiny) / (guess + small), axis=0)
        means = [precision ** (1 / (n + 1)) for n, precision in enumerate(precisions)]
        ratio = (length + tiny) / (reference_length + small)
        return np.array(means) * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1)

    total = geometric_means(correct.sum(1), guess.sum(1), float(lengths.sum()), float(closest.sum()))
    per_image = geometric_means(correct, guess, lengths, closest)
    return {f"bleu_{n + 1}": (float(total[n]), per_image[n]) for n in range(MAX_ORDER)}


def _common_subsequence(positions: Mapping[str, int], size: int, words: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by a bit-parallel algorithm (Hyyrö, 2004).

    `positions` maps each word of the first text, which has `size` words, to a number whose set bits are the word's
    places. A zero bit in `row` marks where the subsequence grows; one addition computes a row of the usual table.
    """
    full = (1 << size) - 1
    row = full
    for word in words:
        match = positions.get(word)
        if match:
            step = row & match
            row = ((row + step) | (row - step)) & full
    return size - row.bit_count()


def rouge_l(corpus: Corpus) -> Scores:
    """Compute ROUGE-L of the corpus, the mean over images, and of each image (Lin, 2004), in 0..1.

    It is the F-measure with beta 1.2 of the best precision and the best recall, which may come from different
    references, as in the COCO evaluation. An empty caption scores 0.
    """
    beta2 = 1.2**2
    scores = np.zeros(len(corpus))
    for image, (caption, references) in enumerate(zip(corpus.captions, corpus.references)):
        if not caption:
            continue
        words = caption.split(" ")  # not split(): a PTB token may contain a no-break space, as in "1 1/2"
        positions: dict[str, int] = {}
        for place, word in enumerate(words):
            positions[word] = positions.get(word, 0) | 1 << place
        precision = recall = 0.0
        for reference in references:
            reference_words = reference.split(" ")
            common = _common_subsequence(positions, len(words), reference_words)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference_words))
        if precision and recall:
            scores[image] = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    return {"rouge_l": (float(scores.mean()), scores)}


def document_frequencies(references: Sequence[Sequence[str]]) -> dict:
    """Count for how many images each n-gram occurs in the references, which gives CIDEr its weights.

    Args:
        references (`Sequence[Sequence[str]]`): Tokenized references of each image of a corpus, such as a training set.

    Returns:
        `dict`: `{"num_documents": images, "document_frequency": {"a cat": 12, ...}}` with n-grams of 1 to 4 words,
        which can be stored as JSON.
    """
    corpus = Corpus([""] * len(references), references)
    table: dict[str, int] = {}
    for n, order in enumerate(corpus.orders):
        frequency = _document_frequency(corpus, order)
        table.update(zip(_ngram_names(corpus, order, n + 1), frequency.tolist()))
    return {"num_documents": len(references), "document_frequency": table}


def _document_frequency(corpus: Corpus, order) -> np.ndarray:
    pairs = corpus.image_of_reference[order.reference] * order.size + order.reference_ngram
    # With counts, np.unique sorts; without, it may hash, which is 50 times slower here.
    pairs, _ = np.unique(pairs, return_counts=True)
    return np.bincount(pairs % max(order.size, 1), minlength=order.size)


def _ngram_names(corpus: Corpus, order, n: int) -> list[str]:
    return [" ".join(corpus.words[place : place + n]) for place in order.example.tolist()]


def cider(corpus: Corpus, frequencies: Mapping | None = None) -> Scores:
    """Compute CIDEr-D of the corpus, the mean over images, and of each image (Vedantam et al., 2015), in 0..10.

    Papers report this variant as "CIDEr": n-grams of 1 to 4 words weighted by tf-idf, with the caption's counts
    clipped to the reference's, and a Gaussian penalty (sigma 6) on the difference in length.

    Args:
        corpus ([`Corpus`]): Tokenized captions and references.
        frequencies (`Mapping`, *optional*): Document frequencies of another corpus, from [`document_frequencies`]. By
            default they are counted over the references; for a single image, all weights and the score are then 0.

    Raises:
        ValueError: If `frequencies` has the wrong form.
    """
    sigma = 6.0
    images, total = len(corpus), _documents(corpus, frequencies)
    similarity = np.zeros(len(corpus.image_of_reference))  # for each reference, summed over the orders
    for n, order in enumerate(corpus.orders):
        if frequencies is None:
            frequency = _document_frequency(corpus, order)
        else:
            known = frequencies["document_frequency"]
            frequency = np.array([known.get(name, 0) for name in _ngram_names(corpus, order, n + 1)], float)
        weight = np.log(float(total)) - np.log(np.maximum(frequency, 1.0))  # (size,), the idf
        caption = order.caption_count * weight[order.caption_ngram]
        reference = order.reference_count * weight[order.reference_ngram]
        caption_norm = np.sqrt(_sums(order.caption_image, caption**2, images))[corpus.image_of_reference]
        reference_norm = np.sqrt(_sums(order.reference, reference**2, len(similarity)))
        shared = order.in_caption >= 0
        clipped = np.minimum(caption[order.in_caption[shared]], reference[shared]) * reference[shared]
        dot = _sums(order.reference[shared], clipped, len(similarity))
        norm = caption_norm * reference_norm
        similarity += np.divide(dot, norm, out=dot, where=norm != 0)
    # The COCO evaluation measures length in bigrams.
    bigrams = np.maximum(corpus.caption_lengths - 1, 0)[corpus.image_of_reference]
    delta = bigrams - np.maximum(corpus.reference_lengths - 1, 0)
    similarity *= np.exp(-(delta**2) / (2 * sigma**2))
    scores = _sums(corpus.image_of_reference, similarity, images) / corpus.references_per_image
    scores *= 10 / MAX_ORDER
    return {"cider": (float(scores.mean()), scores)}


def _documents(corpus: Corpus, frequencies: Mapping | None) -> float:
    """Check the frequencies, and return the number of documents they were counted over."""
    if frequencies is None:
        if len(corpus) == 1:
            warnings.warn(
                "CIDEr of a single image is 0 by definition: every n-gram of its references is in all documents, so "
                "it weighs log(1/1) = 0. Score more images, or pass document_frequencies of a larger corpus.",
                stacklevel=3,
            )
        return len(corpus)
    try:
        total, table = float(frequencies["num_documents"]), frequencies["document_frequency"]
        fits = total >= max(table.values(), default=0)
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            'document_frequencies must be {"num_documents": N, "document_frequency": {"a cat": count <= N, ...}}, as '
            "clipcap_hf.metrics.document_frequencies makes it from the references of a corpus."
        )
    return total


def normalize(text: str) -> str:
    """Normalise text for `exact_match`: NFKC, case folded, punctuation and white space as single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded).split())


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Compute the share of images whose caption equals a reference after `normalize`, in 0..1, and 0 or 1 for each.

    Reads the texts, not their tokens. A caption without letters, digits or symbols matches nothing.
    """
    matches = np.zeros(len(captions))
    for image, (caption, group) in enumerate(zip(captions, references)):
        caption = normalize(caption)
        matches[image] = bool(caption) and any(caption == normalize(reference) for reference in group)
    return {"exact_match": (float(matches.mean()), matches)}


def diversity(captions: Sequence[str]) -> Scores:
    """Measure how varied the captions are (Li et al., 2016), without references.

    Returns:
        `distinct_1` and `distinct_2`, the number of different words and of different word pairs divided by the number
        of words, in 0..1; `vocabulary_size`, the number of different words; `mean_length`, words per caption. Each
        comes with its value for each caption alone.
    """
    split = [caption.split() for caption in captions]

    def measure(lines):
        words = [word for line in lines for word in line]
        pairs = {pair for line in lines for pair in pairwise(line)}
        total, vocabulary = len(words), len(set(words))
        share = max(total, 1)
        return vocabulary / share, len(pairs) / share, float(vocabulary), total / max(len(lines), 1)

    names = ("distinct_1", "distinct_2", "vocabulary_size", "mean_length")
    per_image = np.array([measure([line]) for line in split])
    return {name: (value, per_image[:, n]) for n, (name, value) in enumerate(zip(names, measure(split)))}
