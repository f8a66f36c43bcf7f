"""Report the result of a run: best and last epoch, baselines, captions before and after, and a verdict."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .baselines import BEFORE, MOST_COMMON, NEAREST


SHOWN = 6
FEW_HELD_OUT = 5
UNCERTAIN = 10  # held-out images, below which scores are mostly chance
SAME_CAPTION_SHARE = 0.5
RISE = 1.1  # a last loss this many times the best one is a rise
FALL = 0.9  # a loss of this share of the one before training is a fall
SAME_IMAGE = 0.9999
SHARED_START = 0.9  # of the training captions, for words that make a style
SAME_STYLE_SHARE = 0.8
OTHER_LENGTH = 1.5  # times as many words, or as few, are another style


@dataclass
class Evaluation:
    """One evaluation during training: its epoch and step, and its scores without the prefix `eval_`."""

    epoch: float
    step: int
    scores: dict[str, float]


@dataclass
class Ending:
    """
    The results at the end of a run.

    Args:
        evaluations (`list[Evaluation]`): All evaluations of the run, in order.
        saved_step (`int`): Step of the weights that were saved.
        metric (`str`): The measure that picked them.
        scores (`dict[str, dict[str, float]]`): Scores on the held-out images: first of the captioner, then of
            the baselines.
        references (`list[list[str]]`): Captions of the held-out images.
        before (`list[str]`): Captions of some of these images before training.
        after (`list[str]`): Captions of all these images after training.
        before_rows (`list[int]`): Rows of the images that were captioned before training.
        loss_before (`float`, *optional*): Loss on held-out images before training.
        shared_words (`str`): The words that the training captions start with, if these are the same.
        mean_words (`float`): Mean number of words in the training captions.
        overlap (`int`): Held-out images that are the same as a training image.
        notes (`list[str]`): What could not be computed, and why.
    """

    evaluations: list[Evaluation]
    saved_step: int
    metric: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    references: list[list[str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    before_rows: list[int] = field(default_factory=list)
    loss_before: float | None = None
    shared_words: str = ""
    mean_words: float = 0.0
    overlap: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def saved(self) -> Evaluation:
        """The evaluation of the saved weights, or the last one before them."""
        known = [each for each in self.evaluations if each.step <= self.saved_step]
        return (known or self.evaluations)[-1]

    @property
    def last(self) -> Evaluation:
        """The last evaluation of training."""
        return self.evaluations[-1]


def verdict(ending: Ending) -> tuple[str, str]:
    """Return the verdict in one or two words, and a sentence with the reason and advice."""
    if not ending.evaluations or not ending.after:
        return "not judged", "No held-out images were captioned, so check captions of new images yourself."
    if len(ending.after) < FEW_HELD_OUT:
        return "not judged", f"Only {len(ending.after)} images are held out, too few to judge. Add images."
    if ending.overlap > len(ending.after) / 2:
        return "not judged", (
            f"{ending.overlap} of the {len(ending.after)} held-out images are also training images, so scores say "
            "nothing about new ones. Evaluate on other images, or leave out `--eval-data` and `--eval-split`."
        )
    if len({texts[0] for texts in ending.references}) == 1:
        return "not judged", (
            f"All held-out images have the same caption, {ending.references[0][0][:60]!r}, so the captioner writes it "
            "for every image. Give images captions that tell them apart."
        )
    for judge in (_collapsed, _unchanged, _no_better, _below_copying, _overfitted, _half_in_style):
        if reason := judge(ending):
            return reason
    more = ""
    if _rise(ending):
        more += f" The loss rose after epoch {ending.saved.epoch:g}, so fewer epochs are enough."
    if len(ending.after) < UNCERTAIN:
        more += f" With {len(ending.after)} held-out images this is uncertain: look at captions of new images, too."
    return "learned", f"It scores higher on held-out images than copied captions do.{more}"


def _collapsed(ending: Ending) -> tuple[str, str] | None:
    caption, times = Counter(ending.after).most_common(1)[0]
    same = Counter(texts[0] for texts in ending.references).most_common(1)[0][1] / len(ending.references)
    share = times / len(ending.after)
    if share < SAME_CAPTION_SHARE or share < 2 * same:
        return None
    return "collapsed", (
        f"{share:.0%} of the held-out images get the same caption, {caption[:60]!r}. Lower the learning rate, train "
        "for more epochs, or use a vision tower that suits these images: its embeddings may be too weak."
    )


def _unchanged(ending: Ending) -> tuple[str, str] | None:
    pairs = [(text, ending.after[row]) for text, row in zip(ending.before, ending.before_rows)]
    same = sum(before == after for before, after in pairs)
    if not pairs or same < 0.9 * len(pairs):
        return None
    if ending.loss_before is not None and ending.saved.scores["loss"] < 0.8 * ending.loss_before and same < len(pairs):
        return None
    return "did not change", (
        f"{same} of {len(pairs)} captions are the same as before training. Raise the learning rate "
        "(`--learning-rate`, 3 times as high) or the epochs (`--epochs`), or train more of the captioner."
    )


def _no_better(ending: Ending) -> tuple[str, str] | None:
    if BEFORE not in ending.scores or ending.loss_before is None:
        return None
    before, own = ending.scores[BEFORE]["cider"], ending.scores["captioner"]["cider"]
    if before < own:
        return None
    if ending.saved.scores["loss"] < FALL * ending.loss_before:  # it learned a style, which CIDEr hardly counts
        return None
    return "no better", (
        f"Before training, the captioner scored at least as high on these images (CIDEr {before:.1f} against "
        f"{own:.1f}), with a loss of {ending.loss_before:.3f} against {ending.saved.scores['loss']:.3f}. Keep that "
        "captioner, add images, or lower the learning rate (`--learning-rate`)."
    )


def _below_copying(ending: Ending) -> tuple[str, str] | None:
    own = ending.scores["captioner"]["cider"]
    better = [name for name in (NEAREST, MOST_COMMON) if ending.scores.get(name, {}).get("cider", -1) >= own]
    if not better:
        return None
    what = "the caption of the nearest training image" if better[0] == NEAREST else "the most common caption"
    longer = "train for more epochs, " if ending.saved_step >= ending.last.step else ""
    return "below copying", (
        f"Copying {what} scores at least as high (CIDEr {ending.scores[better[0]]['cider']:.1f} against {own:.1f}). "
        f"Add images or captions, {longer}or start from a captioner of similar images (`--model`)."
    )


def _half_in_style(ending: Ending) -> tuple[str, str] | None:
    reason = None
    followed = sum(caption.startswith(ending.shared_words) for caption in ending.after)
    if followed < SAME_STYLE_SHARE * len(ending.after):
        reason = (
            f"{followed} of the {len(ending.after)} captions start with {ending.shared_words!r}, as the training "
            "captions do."
        )
    words = mean_words(ending.after)
    if ending.mean_words and not 1 / OTHER_LENGTH < words / ending.mean_words < OTHER_LENGTH:
        reason = (
            reason or f"Captions have {words:.1f} words on average, but the training captions {ending.mean_words:.1f}."
        )
    if reason is None:
        return None
    advice = (
        "Add images, raise the epochs (`--epochs`, 2 times as many), or raise the learning rate (`--learning-rate`)."
    )
    return (
        "partly learned",
        f"It scores higher than copied captions do, but not all captions are in the new style. {reason} {advice}",
    )


def mean_words(captions: Sequence[str]) -> float:
    """Return the mean number of words; languages without spaces have one word per caption."""
    return sum(len(caption.split()) for caption in captions) / max(1, len(captions))


def shared_words(captions: Sequence[Sequence[str]]) -> str:
    """Return the words that nearly all captions start with, or an empty string if these are fewer than two."""
    starts = [texts[0].split() for texts in captions]
    shared: list[str] = []
    while words := [start[len(shared)] for start in starts if len(start) > len(shared)]:
        word, times = Counter(words).most_common(1)[0]
        if times < SHARED_START * len(starts):
            break
        shared.append(word)
    return " ".join(shared) if len(shared) > 1 else ""


def _overfitted(ending: Ending) -> tuple[str, str] | None:
    saved_last = ending.saved_step >= ending.last.step
    if not _rise(ending) and not (
        saved_last and _best_loss(ending).scores["loss"] * RISE < ending.last.scores["loss"]
    ):
        return None
    best = _best_loss(ending)
    early = ending.evaluations.index(best) < len(ending.evaluations) / 4
    if not (saved_last or early):
        return None
    kept = "" if saved_last else f" The captioner of epoch {ending.saved.epoch:g} was kept."
    return "overfitted", (
        f"The loss on held-out images rose from {best.scores['loss']:.3f} in epoch {best.epoch:g} to "
        f"{ending.last.scores['loss']:.3f}.{kept} Train for fewer epochs or at a lower learning rate, add data, or "
        "freeze more (`--freeze-language-model`, `--lora-r 8`)."
    )


def _rise(ending: Ending) -> bool:
    return ending.last.scores["loss"] > RISE * ending.saved.scores["loss"]


def _best_loss(ending: Ending) -> Evaluation:
    return min(ending.evaluations, key=lambda each: each.scores["loss"])


def disagreement(ending: Ending) -> str | None:
    """Return a warning if loss and CIDEr would pick clearly different epochs."""
    if len(ending.evaluations) < 2 or "cider" not in ending.evaluations[0].scores:
        return None
    by_loss = _best_loss(ending)
    by_cider = max(ending.evaluations, key=lambda each: each.scores["cider"])
    gained = by_cider.scores["cider"] - by_loss.scores["cider"]
    if by_loss is by_cider or gained < max(2, 0.1 * by_cider.scores["cider"]):
        return None
    return (
        f"Loss and CIDEr disagree: the loss is lowest in epoch {by_loss.epoch:g} (CIDEr "
        f"{by_loss.scores['cider']:.1f}), CIDEr "
        f"highest in epoch {by_cider.epoch:g} ({by_cider.scores['cider']:.1f}). CIDEr hardly counts words that all "
        "captions share, and is noisy on few images. `--metric-for-best-model` sets the score that counts."
    )


def report(ending: Ending, files: Sequence[str], out: str) -> str:
    """Return the report as text: tables, captions before and after, the verdict, and the files that were written."""
    lines = [*_epochs(ending), *_scores(ending), *_captions(ending), *ending.notes]
    if 0 < ending.overlap <= len(ending.references) / 2:  # more are the verdict
        lines.append(
            f"{ending.overlap} of the {len(ending.references)} held-out images are also training images, so "
            "scores say less about new images. Remove them from one of the two."
        )
    if len(ending.after) >= FEW_HELD_OUT and (warning := disagreement(ending)):
        lines.append(warning)
    word, why = verdict(ending)
    lines += ["", f"Verdict: {word}. {why}", f"The captioner is in {out}, with {', '.join(files)}."]
    lines.append(f"To caption other images: clipcap caption --model {shlex.quote(out)} IMAGE")
    return "\n".join(lines)


def _epochs(ending: Ending) -> list[str]:
    if not ending.evaluations:
        return []
    total = round(ending.last.epoch, 1)
    saved = ending.saved
    chosen = f"best: epoch {round(saved.epoch, 1):g} of {total:g}, by {ending.metric}"
    if ending.saved_step >= ending.last.step and ending.metric == "last":
        chosen = f"saved: the last epoch, {total:g}"
    names = [name for name in ("loss", "cider", "bleu_4", "rouge_l") if name in saved.scores]
    rows = [("saved", saved), ("last", ending.last)]
    return [
        "",
        chosen,
        f"  {'':<10}{'epoch':>7}" + "".join(f"{name:>10}" for name in names),
        *(
            f"  {name:<10}{each.epoch:>7.1f}"
            + "".join(f"{each.scores[key]:>10.{3 if key == 'loss' else 1}f}" for key in names)
            for name, each in rows
        ),
    ]


def _scores(ending: Ending) -> list[str]:
    if not ending.scores:
        return []
    return [
        "",
        f"on {len(ending.references)} held-out images",
        f"  {'':<24}{'CIDEr':>8}{'BLEU-4':>8}{'ROUGE-L':>9}",
        *(
            f"  {name:<24}{scores['cider']:>8.1f}{scores['bleu_4']:>8.1f}{scores['rouge_l']:>9.1f}"
            for name, scores in ending.scores.items()
        ),
    ]


def _captions(ending: Ending) -> list[str]:
    if not ending.after:
        return []
    before = dict(zip(ending.before_rows, ending.before))
    rows = list(before or range(len(ending.after)))
    shown = min(SHOWN, len(rows))
    picked = [rows[round(place * (len(rows) - 1) / max(1, shown - 1))] for place in range(shown)]
    lines = ["", "held-out images: caption before training -> after (reference)"]
    for row in picked:
        start = f"{_short(before[row])} -> " if row in before else ""
        lines.append(f"  {start}{_short(ending.after[row])} ({_short(ending.references[row][0])})")
    return lines


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
