"""Files of captions: a table that grows line by line, and a text file next to each image."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from ..files import listed, write_text, writing
from .output import escape, json_line


FORMATS = (".csv", ".tsv", ".jsonl")
OVERWRITE_HINT = "--skip-existing continues where it ends, --overwrite starts again"


class CaptionTable:
    """A `.csv`, `.tsv` or `.jsonl` file with a line per image, written as soon as the image is captioned.

    A killed run leaves complete lines and perhaps part of one, which the next run removes. File names that are not
    UTF-8 keep their bytes in `.csv` and `.tsv` files, and are escaped in `.jsonl`. Control characters are always
    escaped.

    Args:
        path (`str` or `Path`): The file.
        captions (`int`): Number of captions per image.
        skip_existing (`bool`): Keep the lines of an existing file and continue after them.
        overwrite (`bool`): Replace an existing file.
    """

    def __init__(self, path: str | Path, captions: int = 1, skip_existing: bool = False, overwrite: bool = False):
        self.path = Path(path)
        self.suffix = self.path.suffix.lower()
        if self.suffix not in FORMATS:
            raise ValueError(f"--out {path}: the name must end in {', '.join(FORMATS)}")
        if self.path.is_dir() or not self.path.resolve().parent.is_dir():
            raise ValueError(f"--out {path}: this is a folder, or its folder does not exist")
        self.columns = ["image", "caption", *(f"caption_{number}" for number in range(2, captions + 1))]
        self.done: set[str] = set()
        self.size = 0  # bytes of the file that are kept
        self.file: Any = None  # a binary file, once `open` is called
        if self.path.exists() and not overwrite:
            if not skip_existing:
                raise ValueError(f"--out {path} exists already; {OVERWRITE_HINT}")
            self._read()

    def __contains__(self, image: str) -> bool:
        return self._key(image) in self.done

    def _key(self, image: str) -> str:
        return image if self.suffix == ".jsonl" else escape(image)

    def _read(self):
        whole, end, _ = self.path.read_bytes().rpartition(b"\n")
        self.size = len(whole) + len(end)
        lines = whole.decode("utf-8", errors="surrogateescape").split("\n") if end else []
        try:
            self.done = set(self._images_of(lines))
        except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
            raise ValueError(
                f"--out {self.path} is not a file that this command wrote with as many captions per image; choose "
                "another name"
            ) from error

    def _images_of(self, lines: list[str]):
        if self.suffix == ".jsonl":
            for line in lines:
                record = json.loads(line)
                if len(record["captions"]) != len(self.columns) - 1:
                    raise ValueError("another number of captions")
                yield record["image"]
            return
        for number, row in enumerate(csv.reader(lines, **self._dialect())):
            if len(row) != len(self.columns) or (number == 0 and row != self.columns):
                raise ValueError("other columns")
            if number:
                yield row[0]

    def _dialect(self) -> dict:
        if self.suffix == ".csv":
            return {"lineterminator": "\n"}
        # Fields hold no tabs, so nothing needs quotes.
        return {"delimiter": "\t", "lineterminator": "\n", "quoting": csv.QUOTE_NONE, "quotechar": None}

    def open(self):
        """Open the file for new lines; called only after everything else has been checked."""
        self.file = open(self.path, "r+b" if self.size else "wb")
        self.file.truncate(self.size)
        self.file.seek(self.size)
        if not self.size and self.suffix != ".jsonl":
            self._write(self._row(self.columns))

    def add(self, image: str, captions: list[str], record: dict):
        """Add the line of an image and flush it, so that a killed process loses no finished line."""
        self._write(
            json_line(record) + "\n" if self.suffix == ".jsonl" else self._row([escape(image), *map(escape, captions)])
        )
        self.done.add(self._key(image))

    def _row(self, fields: list[str]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, **self._dialect()).writerow(fields)
        return buffer.getvalue()

    def _write(self, text: str):
        with writing(self.path):
            self.file.write(text.encode("utf-8", errors="surrogateescape"))
            self.file.flush()

    def close(self):
        """Close the file and flush it to the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()


class Sidecars:
    """A `.txt` file next to each image, with one caption per line, written whole or not at all.

    Args:
        images (`list[str]`): Paths of the images.
        skip_existing (`bool`): Leave existing files as they are.
        overwrite (`bool`): Replace existing files.
    """

    def __init__(self, images: list[str], skip_existing: bool = False, overwrite: bool = False):
        owners: dict[Path, str] = {}
        for image in images:
            if (other := owners.setdefault(self.path(image), image)) != image:
                raise ValueError(f"--sidecar: {other} and {image} would both have {self.path(image)}")
        self.done = set() if overwrite else {image for path, image in owners.items() if os.path.lexists(path)}
        if self.done and not skip_existing:
            existing = [str(self.path(image)) for image in sorted(self.done)]
            raise ValueError(
                f"--sidecar: {listed(existing)} exist already; --skip-existing leaves those images out, --overwrite "
                "replaces the files"
            )

    @staticmethod
    def path(image: str) -> Path:
        """Return the text file of an image."""
        return Path(image).with_suffix(".txt")

    def __contains__(self, image: str) -> bool:
        return image in self.done

    def add(self, image: str, captions: list[str]):
        """Write the file of an image."""
        write_text(self.path(image), "".join(f"{escape(caption)}\n" for caption in captions))
        self.done.add(image)
