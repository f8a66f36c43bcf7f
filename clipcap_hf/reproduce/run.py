"""Reproduce the paper's tables: check the data, embed once, train, evaluate, write."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..data.schema import split_name
from ..evaluation import default_metrics
from ..files import lock_folder
from ..metrics import check_requirements
from ..processes import process_state
from . import stages
from .card import write_cards
from .choices import DECODINGS, REPORTED_DECODINGS, grid
from .claims import TABLES
from .grid import write_grid
from .inputs import PublishedSplit, check_inputs
from .ledger import Ledger
from .record import write_record
from .settings import Settings
from .stages import MADE_BY, OFFICIAL_WEIGHTS, Captioner, choices_of_training, file_name
from .status import Score, reasons_against
from .table import Row, build_rows, write_table


def reproduce(settings: Settings, say: Callable[[str], None] | None = None) -> list[Row]:
    """Run every stage that is not done yet, and write the table.

    Args:
        settings: What to reproduce, and how.
        say: Tells the user which stage runs; by default a line on standard error.

    Returns:
        The rows of the table; none for a grid, whose own table is written.

    Raises:
        FileNotFoundError: Files are missing; the message lists all of them, before anything runs.
        ValueError: A setting, a file or a captioner is wrong, or something changed between stages.
    """
    return _Run(settings, say or (lambda line: print(f"clipcap: {line}", file=sys.stderr, flush=True))).run()


class _Run:
    """One run: its settings, the splits that it reads, and the ledger of its stages."""

    def __init__(self, settings: Settings, say: Callable[[str], None]):
        self.settings, self.say = settings, say
        self.out = Path(settings.out)
        self.ledger = Ledger(self.out)
        self.splits: dict[tuple[str, str], PublishedSplit] = {}
        self.data: dict[str, Any] = {}

    def run(self) -> list[Row]:
        self._check_out()
        captioners = self._captioners()
        self._check_requirements()
        with lock_folder(self.out) if process_state().is_main_process else nullcontext():
            if process_state().is_main_process:
                self._remove_leftovers()
            self._check_data()
            scores = [score for captioner in captioners for score in self._scores_of(captioner)]
            if not process_state().is_main_process:
                return []
            return self._write(captioners, scores)

    # -- before anything runs

    def _check_out(self):
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: name a folder by --out.")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / "stages").is_dir():
            if {path.name for path in self.out.iterdir()} - {".lock", "data", "models"}:
                raise ValueError(f"{self.out} has files of something else: name another folder by --out.")

    def _remove_leftovers(self):
        """Remove what killed runs left half-written here; each stage does so in its own folder."""
        for path in (*self.out.glob(".*.tmp"), *(self.out / "stages").glob(".*.tmp")):
            path.unlink(missing_ok=True)

    def _check_requirements(self):
        for table in self.settings.tables:
            protocol = TABLES[table].protocol
            tokenizer = self.settings.tokenizer or protocol.tokenizer
            metrics = default_metrics(protocol, tokenizer, self.settings.spice_home)
            check_requirements(metrics, tokenizer, self.settings.spice_home)

    def _captioners(self) -> list[Captioner]:
        return {
            "train": self._captioners_to_train,
            "official-weights": self._official_captioners,
            "checkpoint": self._existing_captioner,
            "results": lambda: [Captioner(None, self.settings.variants[0], 0, path=self._path())],
        }[self.settings.source]()

    def _captioners_to_train(self) -> list[Captioner]:
        settings = self.settings
        found = []
        for trained_on in dict.fromkeys(TABLES[table].trained_on for table in settings.tables):
            for variant in settings.variants:
                tried = [settings.choices]
                if settings.grid:
                    tried = grid(settings.chosen, variant, models=not settings.rehearsal)
                found += [
                    Captioner(trained_on, variant, seed, choices_of_training(choices, variant))
                    for choices in tried
                    for seed in range(settings.seeds)
                ]
        return found

    def _official_captioners(self) -> list[Captioner]:
        """Name the captioners of the official files, by the files' names or by the settings."""
        path = Path(self._path())
        files = [path / name for name in OFFICIAL_WEIGHTS if (path / name).is_file()] if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} has none of {', '.join(OFFICIAL_WEIGHTS)}.")
        found = []
        for file in files:
            trained_on, variant, normalize = OFFICIAL_WEIGHTS.get(file.name, (None, self.settings.variants[0], "no"))
            if variant not in self.settings.variants:
                continue
            if file.name not in OFFICIAL_WEIGHTS and len(self.settings.variants) > 1:
                raise ValueError(f"{file} has none of the names {', '.join(OFFICIAL_WEIGHTS)}: name its --variant.")
            choices = {"normalize": normalize, **self.settings.chosen}
            kept = choices_of_training({**self.settings.choices, **choices}, variant)
            found.append(Captioner(self.settings.trained_on or trained_on, variant, 0, kept, str(file)))
        if not found:
            raise ValueError(f"{path} has no weights of --variant {', '.join(self.settings.variants)}.")
        return found

    def _existing_captioner(self) -> list[Captioner]:
        path = Path(self._path())
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "clipcap":
            raise ValueError(f"{path} is a {config.model_type} model, not a captioner.")
        if config.mapping_type not in self.settings.variants:
            raise ValueError(f"{path} is of the variant {config.mapping_type}: --variant {config.mapping_type}.")
        made_by = path / MADE_BY
        known = json.loads(made_by.read_text(encoding="utf-8"))["trained_on"] if made_by.is_file() else None
        if known and self.settings.trained_on not in (None, known):
            raise ValueError(
                f"{made_by} says that it was trained on {known}, and --trained-on {self.settings.trained_on}."
            )
        return [Captioner(self.settings.trained_on or known, config.mapping_type, 0, path=str(path))]

    def _path(self) -> str:
        return str(Path(self.settings.path).expanduser())

    # -- data

    def _check_data(self):
        """Find all that is needed before anything runs, and remember what it was."""
        settings = self.settings
        names = [(table, self._split(table)) for table in settings.tables]
        if settings.source == "train":
            for table in settings.tables:
                names += [
                    (TABLES[table].trained_on, split) for split in self._training_splits(TABLES[table].trained_on)
                ]
        self.splits = {name: PublishedSplit(*name, settings.data) for name in dict.fromkeys(names)}
        prints = {}
        self.say("checking the data ...")
        new = {
            name: split for name, split in self.splits.items() if not self.ledger.is_done(f"data-{name[0]}-{name[1]}")
        }
        allow_subset = settings.allow_subset or settings.limit is not None
        check_inputs((split for name, split in self.splits.items() if name in new), allow_subset)
        for (table, name), split in self.splits.items():
            key = f"data-{table}-{name}"
            prints[key] = split.fingerprint()
            self.data[key] = self.ledger.run(key, prints[key], lambda key=key: prints[key], self._quietly)

    def _split(self, table: str) -> str:
        choose_on = TABLES[table].choose_on if self.settings.grid else None
        return choose_on or TABLES[table].split

    def _training_splits(self, table: str) -> list[str]:
        """Training reads the validation split for its loss, unless the claims are about that one."""
        choose_on = TABLES[table].choose_on
        return ["train"] if choose_on is None else ["train", choose_on]

    def _unchanged(self, table: str, split: str) -> dict[str, Any]:
        """Return the fingerprint of a split, or refuse one that changed since this run first saw it."""
        key = f"data-{table}-{split}"
        found = self.splits[table, split].fingerprint()
        if found != self.data[key]:
            changed = ", ".join(name for name in found if found[name] != self.data[key][name])
            raise ValueError(
                f"The files of {table}, {split}, in {self.settings.data} changed since this run began ({changed}): "
                "restore them, or begin again in another folder."
            )
        return found

    # -- stages

    def _scores_of(self, captioner: Captioner) -> list[Score]:
        """Make the captioner, and evaluate it on every table that it is for."""
        folder, training = self._make(captioner)
        scores = []
        for table in self.settings.tables:
            if self.settings.source in ("train", "official-weights") and captioner.trained_on not in (
                None,
                TABLES[table].trained_on,
            ):
                continue
            for decoding in self._decodings(captioner):
                scores.append(self._evaluate(captioner, folder, training, table, decoding))
        return scores

    def _decodings(self, captioner: Captioner) -> list[str | None]:
        if self.settings.source == "results":
            return [None]
        others = DECODINGS if self.settings.grid else REPORTED_DECODINGS
        return list(dict.fromkeys([self.settings.choices["decoding"], *others]))

    def _make(self, captioner: Captioner) -> tuple[Path, dict[str, Any]]:
        """Return the captioner's folder (or the results file), and what is known of its training."""
        if self.settings.source == "train":
            return self._train(captioner)
        if self.settings.source == "official-weights":
            return self._convert(captioner), {}
        return Path(captioner.path), {}

    def _train(self, captioner: Captioner) -> tuple[Path, dict[str, Any]]:
        settings, folder = self.settings, self.out / "captioners" / captioner.name
        embeddings, embedded = self._embed(captioner.trained_on, dict(captioner.choices)["clip"])
        depends_on = {
            "embeddings": embedded,
            "choices": dict(captioner.choices),
            "seed": captioner.seed,
            "recipe": settings.training,
            "dtype": settings.dtype,
            "compile": settings.compile,
        }
        work = lambda: stages.train(settings, captioner, embeddings, folder) | {"weights": _digest(folder)}  # noqa: E731
        training = self.ledger.run(f"train-{captioner.name}", depends_on, work, self.say)
        if _digest(folder) != training["weights"]:
            raise ValueError(f"{folder} changed since it was trained: restore it, or begin again in another folder.")
        return folder, training

    def _embed(self, table: str, clip: str) -> tuple[Path, dict[str, Any]]:
        name = f"{table}-{file_name(clip)}"
        folder = self.out / "embeddings" / name
        splits = {split_name(split): self.splits[table, split] for split in self._training_splits(table)}
        data = {split: self._unchanged(table, found.split) for split, found in splits.items()}
        depends_on = {"data": data, "clip": clip, "dtype": self.settings.dtype}
        work = lambda: stages.embed_once(  # noqa: E731
            self.settings, clip, {split: found.rows for split, found in splits.items()}, folder
        )
        result = self.ledger.run(f"embed-{name}", depends_on, work, self.say)
        if any(result["unreadable"].values()) and table != "conceptual-captions":
            raise ValueError(f"Images cannot be read, see failed.jsonl in {folder}: download them again.")
        return folder, result | {"data": data}

    def _convert(self, captioner: Captioner) -> Path:
        folder = self.out / "captioners" / captioner.name
        depends_on = {"weights": _digest(Path(captioner.path)), "choices": dict(captioner.choices)}
        clip, choices = self.settings.chosen.get("clip"), dict(captioner.choices)
        self.ledger.run(
            f"convert-{captioner.name}", depends_on, lambda: stages.convert(captioner, choices, clip, folder), self.say
        )
        return folder

    def _evaluate(self, captioner: Captioner, folder: Path, training: dict, table: str, decoding: str | None) -> Score:
        settings, split = self.settings, self._split(table)
        name = "-".join([table, split, captioner.name, decoding or "results"])
        depends_on = {
            "data": self._unchanged(table, split),
            "captioner": training.get("weights") or _digest(folder),
            **{key: getattr(settings, key) for key in ("tokenizer", "limit", "allow_subset", "dtype")},
        }
        work = lambda: stages.evaluate(  # noqa: E731
            settings, folder, table, split, decoding, self.out / "evaluations" / name
        )
        found = self.ledger.run(f"evaluate-{name}", depends_on, work, self.say)
        reasons = reasons_against(settings, table, split, captioner, found, training)
        return Score(table, split, captioner, decoding, found["scores"], reasons, found["report"])

    # -- write

    def _write(self, captioners: list[Captioner], scores: list[Score]) -> list[Row]:
        settings = self.settings
        write_record(settings, self.data, self.ledger, [score.report for score in scores])
        if settings.grid:
            write_grid(settings, scores)
            return []
        rows = build_rows(settings, scores)
        write_table(settings, rows)
        if settings.source in ("train", "official-weights"):
            folders = {captioner.name: self.out / "captioners" / captioner.name for captioner in captioners}
        else:
            mine = settings.source == "checkpoint" and settings.update_card
            folders = {captioner.name: Path(captioner.path) for captioner in captioners} if mine else {}
        write_cards(settings, scores, rows, folders)
        return rows

    def _quietly(self, line: str):
        pass


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all that makes a captioner's captions."""
    if path.is_file():
        return _sha256([path])
    return _sha256(sorted(path.glob("*.safetensors")) + sorted(path.glob("*config.json")))


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
