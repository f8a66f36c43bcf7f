"""Files on disk: find images, write a file whole or not at all, and name the first few of many."""

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a scratch file to write; it takes the place of `path` only once it is complete and on the disk.

    If the block fails, or the process is killed, `path` stays as it was. Missing folders are made.

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from clipcap_hf.files import whole_file
    >>> path = Path(tempfile.mkdtemp()) / "scores.json"
    >>> with whole_file(path) as scratch:
    ...     _ = scratch.write_text("{}")
    >>> path.read_text()
    '{}'

    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)  # mkstemp's files are for their owner alone
        sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    sync(path.parent)


def sync(path: str | os.PathLike):
    """Put a file or folder on the disk, so that a power loss after a rename cannot leave it empty."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open folders
    try:
        os.fsync(handle)
    except OSError:
        pass  # and some file systems cannot sync them
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike, text: str):
    """Write a UTF-8 file whole or not at all."""
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def listed(items: Sequence, most: int = 5) -> str:
    """Name the first few items, and say how many more there are.

    ```python
    >>> from clipcap_hf.files import listed
    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'

    ```
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def find_images(arguments: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Find the image files that paths, folders (searched recursively) and glob patterns name, in order, each once.

    Returns:
        `(paths, errors)`: each error says which argument names no image.
    """
    from .model.images_clipcap import raster_formats  # here, since it imports torch

    formats = raster_formats()
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in formats}
    paths, errors = [], []
    for argument in map(str, arguments):
        if os.path.isdir(argument):
            below = sorted(path for path in Path(argument).rglob("*") if path.is_file() or path.is_symlink())
            found = [str(path) for path in below if path.suffix.lower() in extensions]
            if not found:
                errors.append(f"{argument}: the folder holds no image files")
        elif os.path.exists(argument):
            found = [argument]
        elif glob.has_magic(argument):
            found = sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path))
            if not found:
                errors.append(f"{argument}: no file matches")
        else:
            found = []
            errors.append(f"{argument}: no such file or folder")
        paths.extend(found)
    return list(dict.fromkeys(paths)), errors
