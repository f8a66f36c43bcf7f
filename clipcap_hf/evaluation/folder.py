"""The folder of an evaluation: which files may be replaced, and which process may write into it."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files import lock_folder
from ..processes import process_state
from .coco_files import read_results
from .digests import digest


RESULTS, SCORES, PAGE = "results.json", "scores.json", "index.html"
# These show that a file is ours: a key of scores.json, and a line of index.html.
WRITTEN_BY = "clipcap evaluate"
RESULTS_KEPT = "results_kept"  # in scores.json: results.json was an input, so it is not ours
GENERATOR = f'<meta name="generator" content="{WRITTEN_BY}">'
KEPT_FOR = 7 * 24 * 3600  # seconds that captions of an interrupted run with other settings are kept


def check_folder(folder: str | Path, inputs: Sequence[str | Path] = (), overwrite: bool = False) -> None:
    """Refuse to replace input files, and files that `clipcap evaluate` did not write.

    Args:
        folder (`str` or `Path`): The folder that `write_report` will write into; it need not exist.
        inputs (`Sequence[str | Path]`): The input files. A `results.json` among them is not written, but kept.
        overwrite (`bool`): Also replace files that `clipcap evaluate` did not write, but never inputs.

    Raises:
        ValueError: If a file would be replaced; the message names it and says what to do.
    """
    folder = Path(folder)
    for name in (SCORES, PAGE):
        if is_one_of(folder / name, inputs):
            raise ValueError(f"{folder / name} is read, and would be replaced. Name another folder by --out.")
    if overwrite:
        return
    ours = {PAGE: _is_our_page, SCORES: _is_our_report, RESULTS: _are_our_results}
    foreign = [
        name
        for name, is_ours in ours.items()
        if os.path.lexists(folder / name) and not is_one_of(folder / name, inputs) and not is_ours(folder / name)
    ]
    if foreign:
        raise ValueError(
            f"{folder} has files that {WRITTEN_BY} did not write: {', '.join(foreign)}. Name another folder by --out, "
            "or replace them with --overwrite (overwrite=True)."
        )


def is_one_of(path: Path, inputs: Sequence[str | Path]) -> bool:
    """Tell whether a path is one of the input files, under any name."""
    return path.exists() and any(os.path.exists(each) and os.path.samefile(path, each) for each in inputs)


def _is_our_page(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return GENERATOR.encode() in file.read(1000)
    return False


def _is_our_report(path: Path) -> bool:
    return _report(path).get("written_by") == WRITTEN_BY


def _are_our_results(path: Path) -> bool:
    """Compare the captions with the report's, since the leaderboards' format has no place for a marker."""
    report = _report(path.with_name(SCORES))
    try:
        captions = read_results(path)
    except (ValueError, OSError):
        return False
    if report.get("written_by") != WRITTEN_BY or report.get(RESULTS_KEPT):
        return False
    return report.get("captions_sha256") == captions_digest(captions)


def _report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def captions_digest(captions: dict) -> str:
    """Return the SHA-256 of captions by image id; their order does not count."""
    return digest(sorted((str(image), caption) for image, caption in captions.items()))


@contextmanager
def only_process(folder: str | Path) -> Iterator[None]:
    """Lock the folder against other evaluations, and remove files that killed ones left incomplete.

    Raises:
        ValueError: If another process evaluates into this folder; the message names it.
    """
    with lock_folder(folder):
        _remove_leftovers(Path(folder))
        yield


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Work in the folder as the only evaluation; under torchrun the first process stands for all."""
    if not process_state().is_main_process:
        yield
        return
    with only_process(folder):
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch files of killed runs, and captions of runs that were not continued for a week."""
    scratch = [path for name in (RESULTS, SCORES, PAGE) for path in folder.glob(f".{name}.*.tmp")]
    old = [path for path in folder.glob(".captions-*.jsonl") if time.time() - path.stat().st_mtime > KEPT_FOR]
    for path in (*scratch, *old):
        path.unlink(missing_ok=True)
