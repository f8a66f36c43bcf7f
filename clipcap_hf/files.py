"""Files on disk: find images, write files whole or not at all, and list the first few of many names."""

import glob
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image


LOCK = ".lock"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a scratch file to write; it replaces `path` only once it is complete and on the disk.

    If the block fails or the process is killed, `path` stays as it was. Missing folders are created.

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
        with writing(path):
            yield scratch
            share(scratch)
            sync(scratch)
            os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    sync(path.parent)


def share(scratch: Path):
    """Give a file or folder of `tempfile`, which only its owner can read, the usual permissions."""
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod((0o777 if scratch.is_dir() else 0o666) & ~umask)


def sync(path: str | os.PathLike):
    """Flush a file or folder to the disk, so that a power loss after a rename cannot leave it empty."""
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


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a scratch folder to fill; it becomes `folder`, which must be new or empty, only once it is complete."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp")
    except OSError as error:
        raise OSError(f"There can be no folder {folder} ({error.strerror}): choose another one.") from error
    with aside as temporary:
        scratch = Path(temporary) / folder.name
        scratch.mkdir()
        with writing(folder):
            yield scratch
            os.replace(scratch, folder)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name what is written in errors of a full disk, in which the system names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def lock_folder(folder: str | os.PathLike, name: str = LOCK) -> Iterator[None]:
    """Lock a folder against other processes that ask for the same lock. A killed process loses its lock.

    Args:
        folder (`str` or path): The folder; it is created, and removed again if nothing is written into it.
        name (`str`): Name of the lock file in it.

    Raises:
        OSError: If there can be no such folder, or it takes no files.
        ValueError: If another process holds the lock; the message names it.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"There can be no folder {folder} ({error.strerror}): choose another one.") from error
    try:
        with _locked(folder / name, folder):
            yield
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def lock_file(path: str | os.PathLike) -> Iterator[None]:
    """Lock a file that is about to be written, as [`lock_folder`] locks a folder."""
    path = Path(path)
    if not path.parent.is_dir():
        yield  # who opens the file will say so
        return
    with _locked(path.with_name(f".{path.name}.lock"), path):
        yield


@contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    file_lock = FileLock(lock, blocking=False)
    try:
        file_lock.acquire()
    except Timeout:
        if not lock.exists():
            raise OSError(f"{lock.parent} takes no new files: choose another folder.") from None
        raise ValueError(f"{what} is being written by {_holder(lock)}: wait for it, or choose another.") from None
    except NotImplementedError:  # some network file systems have no locks
        yield
        return
    except OSError as error:
        raise OSError(f"{lock.parent} cannot be written to ({error.strerror}): choose another folder.") from error
    try:
        with suppress(OSError):  # on a full disk, or on Windows, the lock holds, but names no holder
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        file_lock.release()


def _holder(lock: Path) -> str:
    with suppress(OSError, ValueError):
        return lock.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def check_file(path: str | os.PathLike, what: str = "file"):
    """Check that a path is a regular file and not a Git LFS pointer.

    Args:
        path (`str` or path): The file.
        what (`str`): Name of its kind in messages.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is a folder, a pipe, a device or a Git LFS pointer.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no {what} {path}.")
    if not os.path.isfile(path):
        raise ValueError(
            f"The {what} {path} is not a file, but a {'folder' if os.path.isdir(path) else 'pipe or device'}."
        )
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the {what} itself: run `git lfs pull` to download it.")


def listed(items: Sequence, most: int = 5) -> str:
    """List the first few items, and say how many more there are.

    ```python
    >>> from clipcap_hf.files import listed
    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'

    ```
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def files_below(folder: str | os.PathLike, errors: list[str]) -> list[Path]:
    """Return all files in a folder and its subfolders, also in those that are links.

    Args:
        folder (`str` or path): The folder.
        errors (`list[str]`): Gets a message for each subfolder that cannot be read.
    """

    def note(error: OSError):
        errors.append(f"{error.filename}: the folder cannot be read ({error.strerror})")

    real = Path(os.path.realpath(folder))
    above = {str(folder): {str(real), *map(str, real.parents)}}
    found = []
    for parent, folders, names in os.walk(str(folder), onerror=note, followlinks=True):
        entered = above.pop(parent)
        for name in list(folders):
            path = os.path.join(parent, name)
            if (target := os.path.realpath(path)) in entered:
                folders.remove(name)  # a link back to where we came from would never end
            else:
                above[path] = {*entered, target}
        found += [Path(parent) / name for name in names]
    return sorted(found)


def find_images(arguments: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Find the image files of paths, folders (searched recursively) and glob patterns, in order and each once.

    Returns:
        `(paths, errors)`: each error names an argument without images.
    """
    from .model.images_clipcap import raster_formats  # here, since it imports torch

    formats = raster_formats()
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in formats}
    paths: list[str] = []
    errors: list[str] = []
    for argument in map(str, arguments):
        if os.path.isdir(argument):
            below = files_below(argument, errors)
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
