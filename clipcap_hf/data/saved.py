"""Read data sets that `save_to_disk` of `datasets` wrote, and check that their files are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_file, listed


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

#: The last bytes of each file: an Arrow stream that was cut between two batches has fewer rows, and no other mark.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def is_saved(folder: str | os.PathLike) -> bool:
    """Tell whether a folder holds a saved data set."""
    return any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_saved(folder: str | os.PathLike) -> Dataset | DatasetDict:
    """
    Load a saved data set, memory-mapped.

    Args:
        folder (`str` or path): The folder.

    Raises:
        FileNotFoundError: If one of its files does not exist.
        ValueError: If a file is truncated; `datasets` itself would read the rows before the cut.
    """
    from datasets import load_from_disk

    for state in (Path(folder) / "state.json", *sorted(Path(folder).glob("*/state.json"))):
        if state.is_file():
            _check_files(state)
    return load_from_disk(os.fspath(folder))


def _check_files(state: Path):
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        paths = [state.parent / name for name in names]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{state} is damaged: copy the data set again ({type(error).__name__}: {error}).") from None
    for path in paths:
        check_file(path, "file of the data set")
    if cut := [path.name for path in paths if not ends_as_stream(path)]:
        raise ValueError(f"{state.parent}: {listed(cut)} is truncated, so rows are missing: copy the data set again.")


def ends_as_stream(path: Path) -> bool:
    """Tell whether an Arrow file has its end mark."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END_OF_STREAM)))
        return file.read() == END_OF_STREAM
