"""What the paper does not say: each open question with the choice made here and its alternatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """An open question of the paper.

    Attributes:
        name: What `--choose NAME=VALUE` takes.
        question: What is open.
        default: What is done unless another value is chosen.
        alternatives: Other values that the paper may mean; `--grid` tries each.
        free: Whether any other value may be chosen, such as the folder of a model.
        trains: Whether another value needs another training; decoding does not.
    """

    name: str
    question: str
    default: str
    alternatives: tuple[str, ...]
    free: bool = False
    trains: bool = True


DECODINGS = ("official-beam-5", "greedy", "beam-5")
#: Both are always reported: the official code offers the two, and the paper does not say which one its tables used.
REPORTED_DECODINGS = ("official-beam-5", "greedy")

CHOICES = {
    choice.name: choice
    for choice in (
        Choice("decoding", "Which decoding made the tables?", DECODINGS[0], DECODINGS[1:], trains=False),
        Choice(
            "clip",
            "ViT-B/32, as in the official README, or RN50x4, which the count of 43 M parameters fits (with 10/10)?",
            "ViT-B-32/openai",
            ("RN50x4/openai",),
            free=True,
        ),
        Choice(
            "lengths",
            "Prefix and CLIP tokens of the transformer: 40/40, as in the README, or 10/10?",
            "40/40",
            ("10/10",),
            free=True,
        ),
        Choice(
            "normalize",
            "Is the CLIP embedding divided by its norm? The transformer notebook does, the README's command does not.",
            "no",
            ("yes",),
        ),
        Choice(
            "epochs",
            "Ten epochs, or about seven by early stopping on the validation loss?",
            "10",
            ("early-stopping",),
        ),
        Choice(
            "language-model",
            "GPT-2 small, which 156 M trained parameters fit, or a larger one? The paper says 'large'.",
            "openai-community/gpt2",
            ("openai-community/gpt2-medium",),
            free=True,
        ),
        Choice(
            "captions-end",
            "The official code trains no end token and stops at the first full stop; or train the end token?",
            "full-stop",
            ("end-token",),
        ),
    )
}


def read_choices(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE` texts.

    Raises:
        ValueError: An unknown name or value, or a name that is given twice.
    """
    chosen: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in CHOICES or not equals or not value:
            raise ValueError(f"--choose takes NAME=VALUE with a name of {', '.join(CHOICES)}, not {text!r:.80}.")
        if name in chosen:
            raise ValueError(f"--choose {name} is given twice: give it once, or try all values with --grid.")
        choice = CHOICES[name]
        known = (choice.default, *choice.alternatives)
        if not choice.free and value not in known:
            raise ValueError(f"--choose {name} must be one of {', '.join(known)}, not {value!r:.80}.")
        chosen[name] = value
    if "lengths" in chosen:
        lengths_of(chosen)
    return chosen


def complete(chosen: Mapping[str, str]) -> dict[str, str]:
    """Add the default of every choice that was left open."""
    return {name: chosen.get(name, choice.default) for name, choice in CHOICES.items()}


def lengths_of(choices: Mapping[str, str]) -> tuple[int, int]:
    """Return the prefix length and the number of CLIP tokens of the transformer."""
    prefix, _, clip = choices["lengths"].partition("/")
    if not (prefix.isdecimal() and clip.isdecimal() and int(prefix) and int(clip)):
        raise ValueError(f"--choose lengths must be like 40/40, not {choices['lengths']!r:.80}.")
    return int(prefix), int(clip)


def grid(chosen: Mapping[str, str], variant: str, models: bool = True) -> list[dict[str, str]]:
    """List the choices to compare: those made, and each alternative that needs another training, one at a time.

    Without `models`, those of the CLIP and of the language model stay: a rehearsal has no others.
    """
    base = complete(chosen)
    tried = [base]
    for choice in CHOICES.values():
        if not choice.trains or (choice.name == "lengths" and variant != "transformer"):
            continue
        if choice.name in ("clip", "language-model") and not models:
            continue
        others = (choice.default, *choice.alternatives)
        tried += [{**base, choice.name: value} for value in others if value != base[choice.name]]
    return tried


def differences(choices: Mapping[str, str]) -> dict[str, str]:
    """Return the choices that are not the default."""
    return {name: value for name, value in choices.items() if value != CHOICES[name].default}
