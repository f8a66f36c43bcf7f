"""Read WebDataset shards: tar archives, which are checked first, with the columns of all their samples."""

from __future__ import annotations

import glob
import io
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..files import check_file


logger = logging.getLogger(__name__)

_BLOCK = 512  # bytes; a tar archive consists of blocks, and ends with two that are empty
_MOST_FIELDS = 100
# Files whose content can be wrong, and is small enough to be read in advance.
_CHECKED = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn"}


def load_shards(source, load_kwargs: dict, missing: str):
    """
    Load tar shards with the columns of all their samples.

    `datasets` itself takes the columns of the first five samples for those of all, and refuses them if they differ.
    """
    from datasets import load_dataset

    files = _tar_files(source)
    if load_kwargs.get("features") is None and (paths := _local_paths(files)):
        load_kwargs = {**load_kwargs, "features": _features(paths, missing)}
    with _naming(source):
        return load_dataset("webdataset", data_files=files, **load_kwargs)


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


def _local_paths(files) -> list[str]:
    """Return the paths of shards on this machine; none if some are elsewhere, where reading twice takes long."""
    paths = list(files.values()) if isinstance(files, dict) else [files]
    paths = [path for each in paths for path in (each if isinstance(each, (list, tuple)) else [each])]
    return [os.fspath(path) for path in paths] if all(map(os.path.isfile, paths)) else []


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


def _features(files: list[str], missing: str):
    """Check archives, reading the headers of all their members, and return the columns of all their samples."""
    import datasets
    import pyarrow as pa
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    schema = pa.schema([])
    for file in files:
        found = _schema(file, missing)
        with _damaged(file):
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
    media = {
        name: getattr(datasets, kind)
        for kind in ("Image", "Audio", "Video", "Mesh")  # older releases lack the last
        for name in getattr(WebDataset, f"{kind.upper()}_EXTENSIONS", ())
    }
    features = datasets.Features.from_arrow_schema(schema)
    for field in schema.names:
        if (feature := media.get(_extension(field))) is not None:
            features[field] = feature()
    text = datasets.Value("string")
    return datasets.Features({**features, "__key__": text, "__url__": text})


def _schema(file: str, missing: str):
    """Return the Arrow types of an archive's fields, the parts of its names after the first dot."""
    import pyarrow as pa

    check_file(file, "shard")
    types: dict[str, pa.DataType] = {}
    with _damaged(file):
        with tarfile.open(file, tarinfo=_CheckedMember) as archive:
            for member, field in _members(archive, file):
                if field not in types or _extension(field) in _CHECKED:
                    found = _type(archive, member, field)
                    if types.setdefault(field, found) != found:
                        pair = [pa.schema([(field, each)]) for each in (types[field], found)]
                        types[field] = pa.unify_schemas(pair, promote_options="permissive").field(0).type
                if len(types) > _MOST_FIELDS:
                    raise ValueError(
                        f"its samples have more than {_MOST_FIELDS} kinds of files, such as {field!r}. WebDataset "
                        "takes all that follows the first dot of a name for the kind: write names without other dots"
                    )
            # A compressed archive has its own end mark.
            end = archive.offset if isinstance(archive.fileobj, io.BufferedReader) else None
    if end is not None:
        _check_end(file, end, missing)
    return pa.schema(list(types.items()))


@contextmanager
def _damaged(file: str) -> Iterator[None]:
    """Name the archive in errors, of which decompression raises many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is not a tar archive, or is damaged: {error}.") from error


def _members(archive: tarfile.TarFile, file: str) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Go through the files of an archive that belong to samples, with the field of each."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    last, keys, hidden = None, set(), []
    for member in archive:
        key, field = base_plus_ext(member.name)
        if key is None or not member.isreg():
            continue
        if os.path.basename(member.name).startswith("__"):
            hidden.append(member.name)
            continue
        if key != last and key in keys:
            raise ValueError(
                f"the files of the sample {key!r} do not follow each other, as in a WebDataset. Write the archive in "
                "the order of names, such as with tar --sort=name"
            )
        last = key
        keys.add(key)
        yield member, field
    if hidden:
        logger.warning(f"{file}: {len(hidden)} files are left out, since WebDataset hides names in __: {hidden[0]!r}.")


def _extension(field: str) -> str:
    return field.rpartition(".")[2].lower()


def _type(archive: tarfile.TarFile, member: tarfile.TarInfo, field: str):
    """Read a file as `datasets` would, which stops at what it cannot read in the middle of a run; return its type."""
    import pyarrow as pa
    from datasets.features.features import cast_to_python_objects
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if _extension(field) in WebDataset.IMAGE_EXTENSIONS:
        return pa.binary()
    try:
        # Private, but nothing public reads a file as `datasets` will, compressed ones (.json.gz) among them.
        [sample] = WebDataset._get_pipeline_from_tar(archive.name, [(member.name, archive.extractfile(member))])
        [value] = cast_to_python_objects([sample[field]], only_1d_for_numpy=True)
        return pa.array([value]).type
    except (ValueError, RecursionError, pa.ArrowException) as error:
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
