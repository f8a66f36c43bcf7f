"""BLEU, ROUGE-L, CIDEr-D, exact match and diversity of tokenized captions, from the papers' formulas.

The numbers equal those of the COCO caption evaluation (pycocoevalcap), whose constants and conventions are kept.
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
    """Sum values by index, shape (size,). As floats always: bincount gives integers where there are no values."""
    return np.bincount(index, values, size).astype(float)


def bleu(corpus: Corpus) -> Scores:
    """Compute BLEU-1 to BLEU-4 of the corpus and of each image (Papineni et al., 2002), in 0..1.

    The brevity penalty uses, for each image, the length of the reference that is closest to the caption's (the
    shorter one of two equally close). The corpus score is made of summed counts, it is not the mean over images.

    Returns:
        `bleu_1` to `bleu_4`.
    """
    tiny, small = 1e-15, 1e-9  # the COCO evaluation's guards against 0 / 0
    images, lengths = len(corpus), corpus.caption_lengths
    # The least (distance, length) of each image, as one number so that a single reduction finds it.
    base = int(corpus.reference_lengths.max(initial=0)) + 1
    distance = np.abs(corpus.reference_lengths - lengths[corpus.image_of_reference])
    first_references = np.cumsum(corpus.references_per_image) - corpus.references_per_image
    closest = np.minimum.reduceat(distance * base + corpus.reference_lengths, first_references) % base

    correct, guess = np.zeros((MAX_ORDER, images)), np.zeros((MAX_ORDER, images))
    for n, order in enumerate(corpus.orders):
        allowed = np.zeros(len(order.caption_count), np.int64)  # the most that any one reference has
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
    """Measure the longest common subsequence, bit-parallel (Hyyrö, 2004).

    `positions` maps each word of the first text, of `size` words, to a number with a bit set at each of its places.
    A zero bit in `row` marks where the subsequence grows; one addition does a whole row of the usual table.
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

    F-measure with beta 1.2 of the best precision and the best recall over the references, as the COCO evaluation
    has it: the two may come from different references. An empty caption scores 0.
    """
    beta2 = 1.2**2
    scores = np.zeros(len(corpus))
    for image, (caption, references) in enumerate(zip(corpus.captions, corpus.references)):
        if not caption:
            continue
        words = caption.split(" ")  # and not split(): a PTB token may hold a no-break space, as in "1 1/2"
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
    """Count in how many images' references each n-gram occurs: CIDEr weighs n-grams by it.

    Args:
        references: tokenized references of each image of a corpus, for example of a training set.

    Returns:
        `{"num_documents": images, "document_frequency": {"a cat": 12, ...}}`, n-grams of 1 to 4 words joined by
        spaces; can be stored as JSON.
    """
    corpus = Corpus([""] * len(references), references)
    table: dict[str, int] = {}
    for n, order in enumerate(corpus.orders):
        frequency = _document_frequency(corpus, order)
        table.update(zip(_ngram_names(corpus, order, n + 1), frequency.tolist()))
    return {"num_documents": len(references), "document_frequency": table}


def _document_frequency(corpus: Corpus, order) -> np.ndarray:
    pairs = corpus.image_of_reference[order.reference] * order.size + order.reference_ngram
    # Asked for counts, np.unique sorts; otherwise it may hash, which is 50 times slower here.
    pairs, _ = np.unique(pairs, return_counts=True)
    return np.bincount(pairs % max(order.size, 1), minlength=order.size)


def _ngram_names(corpus: Corpus, order, n: int) -> list[str]:
    return [" ".join(corpus.words[place : place + n]) for place in order.example.tolist()]


def cider(corpus: Corpus, frequencies: Mapping | None = None) -> Scores:
    """Compute CIDEr-D of the corpus, the mean over images, and of each image (Vedantam et al., 2015), in 0..10.

    This is the variant that the field reports as "CIDEr": n-grams of 1 to 4 words weighted by tf-idf, caption counts
    clipped to the reference's, and a Gaussian penalty (sigma 6) on the difference in length.

    Args:
        corpus: tokenized captions and references.
        frequencies: what `document_frequencies` returned for another corpus. By default the references themselves
            are the corpus; with one image all weights are then log(1) = 0, and so is the score.

    Raises:
        ValueError: `frequencies` has the wrong form.
    """
    sigma = 6.0
    images, total = len(corpus), _documents(corpus, frequencies)
    similarity = np.zeros(len(corpus.image_of_reference))  # of each reference, summed over the orders
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
    """Check the frequencies and return the number of documents they were counted over."""
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
    """Bring text to the form of `exact_match`: NFKC, case folded, punctuation and white space as single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded).split())


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Compute the share of images whose caption equals a reference after `normalize`, in 0..1, and 0 or 1 for each.

    Works on the texts as they are, not on tokens. A caption without letters, digits or symbols matches nothing.
    """
    matches = np.zeros(len(captions))
    for image, (caption, group) in enumerate(zip(captions, references)):
        caption = normalize(caption)
        matches[image] = bool(caption) and any(caption == normalize(reference) for reference in group)
    return {"exact_match": (float(matches.mean()), matches)}


def diversity(captions: Sequence[str]) -> Scores:
    """Measure how varied the captions are (Li et al., 2016), without references.

    Returns:
        `distinct_1`, `distinct_2`: different words or word pairs over the number of all words, in 0..1;
        `vocabulary_size`: different words; `mean_length`: words per caption. For each image: the same of its caption.
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
