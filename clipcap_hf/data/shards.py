"""Read WebDataset shards: tar archives, which are checked first, with all their image columns."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..files import check_file


logger = logging.getLogger(__name__)

_BLOCK = 512  # bytes; a tar archive consists of blocks, and ends with two that are empty


def load_shards(source, load_kwargs: dict, missing: str):
    """Load tar shards with all their image columns: `datasets` itself looks only at the first samples."""
    from datasets import Image, load_dataset

    files = _tar_files(source)
    local = isinstance(files, list) and all(os.path.isfile(file) for file in files)
    # A dictionary keeps the order of the columns.
    fields = dict.fromkeys(field for file in files for field in _image_fields(file, missing)) if local else {}
    with _naming(source):
        data = load_dataset("webdataset", data_files=files, **load_kwargs)
        if not local or load_kwargs.get("features") is not None:
            return data
        features = next(iter(data.values())).features
        unseen = {name: Image() for name in fields if name not in features}
        if not unseen:
            return data
        return load_dataset(
            "webdataset", data_files=files, **load_kwargs, features=type(features)({**features, **unseen})
        )


@contextmanager
def _naming(source) -> Iterator[None]:
    """Name the shards in errors of `datasets`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{source} is not a WebDataset, or is damaged: {error}") from error


def _tar_files(source) -> str | list[str] | dict:
    if isinstance(source, (dict, list)) or "://" in str(source):
        return source
    pattern = os.path.join(source, "*.tar") if os.path.isdir(source) else os.fspath(source)
    if not (files := sorted(glob.glob(pattern, recursive=True))):
        raise FileNotFoundError(f"No tar shards match {pattern}.")
    return files


class _CheckedMember(tarfile.TarInfo):
    """A member whose header must be sound: tarfile itself takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(f"damaged header: {error}") from None
            raise


def _image_fields(file: str, missing: str) -> list[str]:
    """Check an archive, reading the headers of all its members, and return the extensions of its images."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    check_file(file, "shard")
    fields: dict[str, None] = {}
    try:
        with tarfile.open(file, tarinfo=_CheckedMember) as archive:
            for member in archive:
                field = os.path.basename(member.name).partition(".")[2].lower()
                if member.isfile() and field.rpartition(".")[2] in WebDataset.IMAGE_EXTENSIONS:
                    fields[field] = None
                _check_text(archive, member, field)
            # A compressed archive has its own end mark.
            end = archive.offset if isinstance(archive.fileobj, io.BufferedReader) else None
    except Exception as error:  # decompression raises errors of many kinds
        raise ValueError(f"{file} is not a tar archive, or is damaged: {error}.") from error
    if end is not None:
        _check_end(file, end, missing)
    return list(fields)


def _check_text(archive: tarfile.TarFile, member: tarfile.TarInfo, field: str):
    """Refuse text that is not UTF-8 and damaged JSON, at which `datasets` would stop in the middle of a run."""
    is_json = field.endswith("json")
    if not (member.isfile() and (is_json or field.endswith("txt"))):
        return
    try:
        with archive.extractfile(member) as file:  # type: ignore[union-attr]  # not None, since the member is a file
            text = file.read().decode("utf-8")
        if is_json:
            json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member.name!r}: {error}") from error


def _check_end(file: str, end: int, missing: str):
    """Refuse an archive that was cut between two members, or that has more after its end."""
    with open(file, "rb") as archive:
        archive.seek(end)
        rest = archive.read(1 << 20)
    if len(rest) >= 2 * _BLOCK and not any(rest):
        return
    if any(rest):
        raise ValueError(f"{file} is damaged: it goes on after its end mark. Download or write it again.")
    message = f"{file} has no end mark: it is truncated, and samples may be missing. Download or write it again"
    if missing == "error":
        raise ValueError(f"{message}, or read the rest with `missing='skip'` (--missing skip).")
    logger.warning(f"{message}. The rest is read.")
