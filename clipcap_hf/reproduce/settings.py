"""The settings of a reproduction, and the checks that need nothing but them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .choices import complete
from .claims import PAPER_TABLES, TABLES, TRAINABLE, VARIANTS


SOURCES = ("train", "official-weights", "checkpoint", "results")


@dataclass
class Settings:
    """What to reproduce, and how.

    Attributes:
        tables: Names of `TABLES`.
        variants: Names of `VARIANTS`.
        data: The folder of the publishers' files.
        out: The folder for everything that is written.
        source: Where the captions come from: "train", "official-weights", "checkpoint" or "results".
        path: The weights, the captioner or the results file, unless `source` is "train".
        trained_on: The table whose training images a checkpoint or official weights saw.
        seeds: How many captioners are trained, with the seeds 0, 1, ...
        chosen: The choices that were made, see `choices.py`; the others are the defaults.
        grid: Compare the alternatives on the validation split instead.
        training: Other training options than the recipe's; the numbers are then no reproduction.
        limit: Caption so many images only; the numbers are then no reproduction.
        tokenizer: Another one than the benchmark's; the numbers are then no reproduction.
        allow_subset: Score a part where images or captions are missing, which is no reproduction.
        rehearsal: The data are made up; the numbers are never shown as verified, nor written into a card.
        device, dtype, compile: Where and how the models compute; they compute in float32 unless `dtype` says.
        batch_size, workers: For embedding and captioning.
        spice_home: Folder of SPICE's jars, see `clipcap_hf.metrics`.
        update_card: Also write into the card of a `checkpoint`; captioners made here always get theirs.
    """

    tables: tuple[str, ...]
    variants: tuple[str, ...]
    out: str
    data: str | None = None
    source: str = "train"
    path: str | None = None
    trained_on: str | None = None
    seeds: int = 1
    chosen: dict[str, str] = field(default_factory=dict)
    grid: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    tokenizer: str | None = None
    allow_subset: bool = False
    rehearsal: bool = False
    device: str | None = None
    dtype: str = "float32"
    compile: bool = False
    batch_size: int = 32
    workers: int | None = None
    spice_home: str | None = None
    update_card: bool = False

    def __post_init__(self):
        self.tables = PAPER_TABLES if self.tables == ("all",) else tuple(dict.fromkeys(self.tables))
        self.variants = tuple(VARIANTS) if self.variants == ("all",) else tuple(dict.fromkeys(self.variants))
        _check(self)

    @property
    def choices(self) -> dict[str, str]:
        return complete(self.chosen)

    def record(self) -> dict[str, Any]:
        """Return the settings as they are recorded."""
        return {**asdict(self), "choices": self.choices}


def _check(settings: Settings):
    for name in settings.tables:
        if name not in TABLES:
            raise ValueError(f"--table must be one of {', '.join(TABLES)} or all, not {name!r:.80}.")
    for name in settings.variants:
        if name not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)} or all, not {name!r:.80}.")
    if settings.source not in SOURCES:
        raise ValueError(
            f"--from must be train, official-weights PATH or checkpoint DIR, not {settings.source!r:.80}."
        )
    if settings.data is None:
        raise ValueError("Name the folder of the publishers' files: --data ROOT.")
    if settings.source == "train":
        if untrained := [name for name in settings.tables if name not in TRAINABLE]:
            raise ValueError(
                f"{', '.join(untrained)}: its system was not trained by the paper's recipe; score a "
                "captioner with --from checkpoint DIR, or a file of captions with --results FILE."
            )
        if settings.trained_on:
            raise ValueError("--trained-on is for --from official-weights and checkpoint: training here is recorded.")
    elif settings.path is None:
        raise ValueError(f"--from {settings.source} needs a path.")
    elif not Path(settings.path).expanduser().exists():
        raise FileNotFoundError(f"There is no {settings.path} (--from {settings.source}).")
    elif settings.seeds > 1:
        raise ValueError("--seeds is for --from train: an existing captioner, or a file of captions, has one seed.")
    if settings.source == "results" and (len(settings.tables) > 1 or len(settings.variants) > 1):
        raise ValueError(
            "A results file has the captions of one table by one captioner: name both by --table and --variant."
        )
    if settings.choices["epochs"] == "early-stopping" and settings.source == "train":
        for name in settings.tables:
            if TABLES[TABLES[name].trained_on].choose_on is None:
                raise ValueError(f"--choose epochs=early-stopping needs a validation split, and {name} has none.")
    if settings.grid:
        _check_grid(settings)


def _check_grid(settings: Settings):
    if settings.source != "train":
        raise ValueError("--grid compares trainings: it goes with --from train.")
    for name in settings.tables:
        if TABLES[name].choose_on is None:
            reason = (
                "is scored with COCO's captioner"
                if TABLES[name].trained_on != name
                else "publishes references of one split only, the one that the paper claims"
            )
            raise ValueError(f"--grid needs a validation split, and {name} {reason}: choose on coco (--table coco).")
