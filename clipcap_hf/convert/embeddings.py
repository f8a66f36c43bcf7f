"""Convert pickled CLIP embeddings of the official ClipCap code to a `datasets` folder, without running code."""

import io
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch.nn import functional as F

from ..files import check_file, whole_folder
from ..model.damage_clipcap import is_expanded, named


def convert_official_embeddings(path: str | os.PathLike, out_dir: str | os.PathLike) -> datasets.Dataset:
    r"""
    Convert a pickle of CLIP embeddings and captions that the official `parse_coco.py` or `parse_conceptual.py` wrote.

    Only tensors and plain containers are read; anything else is refused before it is created. The official files
    repeat an image for each of its captions; here it has one row.

    Args:
        path (`str` or `os.PathLike`): The `.pkl` file: `clip_embedding` (rows, dim) and `captions`, dictionaries with
            `image_id`, `caption` and, as `clip_embedding`, the row.
        out_dir (`str` or `os.PathLike`): Folder to write, for `datasets.load_from_disk`; it must not exist.

    Returns:
        `datasets.Dataset`: The rows as written: `image_id` (int64 if all are whole numbers, else string), `captions`
        (list of strings), `clip_embeds` (dim float32 numbers, normalised only if the official file was).

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If `out_dir` exists and is not empty.
        ValueError: If the file holds anything but tensors and plain containers, is damaged, holds NaN or infinity, or
            gives one image several embeddings.
    """
    path, out_dir = Path(path), Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists.")
    with named(path):
        embeds, records = _read_embeddings(path)
        ids, captions, rows = _group_by_image(embeds, records)
    dataset = _to_dataset(ids, captions, embeds[rows].float())
    with whole_folder(out_dir) as scratch:
        dataset.save_to_disk(scratch)
    return datasets.load_from_disk(str(out_dir))


def _to_dataset(ids: list, captions: list[list[str]], embeds: torch.Tensor) -> datasets.Dataset:
    columns = {
        "image_id": pa.array(ids),
        "captions": pa.array(captions),
        # Built as one array, since `Dataset.from_dict` would copy each row separately.
        "clip_embeds": pa.FixedSizeListArray.from_arrays(pa.array(embeds.flatten().numpy()), embeds.shape[1]),
    }
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns))


def _read_embeddings(path: Path) -> tuple[torch.Tensor, list[dict]]:
    check_file(path, "embeddings file")
    with path.open("rb") as file:
        try:
            data = _TensorUnpickler(file).load()
        except _Refused as error:
            raise ValueError(f"{path} was not read: {error}") from error
        except MemoryError as error:
            raise ValueError(f"{path} is damaged: it asks for more memory than is available.") from error
        except Exception as error:  # a damaged pickle can raise almost anything
            raise ValueError(f"{path} is not a pickle of tensors, or is damaged: {error}") from error
    if not isinstance(data, dict) or not {"clip_embedding", "captions"} <= data.keys():
        raise ValueError(
            f"{path} does not hold `clip_embedding` and `captions`, as the official parse_coco.py writes them."
        )
    embeds, records = data["clip_embedding"], data["captions"]
    if isinstance(embeds, (list, tuple)):
        embeds = torch.stack([torch.as_tensor(row).flatten() for row in embeds])
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or not embeds.is_floating_point():
        raise ValueError(f"`clip_embedding` of {path} is not a tensor of the shape (rows, dim).")
    if is_expanded(embeds):
        raise ValueError(f"`clip_embedding` of {path} is damaged: it is larger than what is stored of it.")
    if bad := (~embeds.isfinite()).any(1).nonzero().flatten().tolist():
        raise ValueError(f"`clip_embedding` of {path} holds NaN or infinity in rows {bad[:10]}.")
    if not isinstance(records, list) or not records:
        raise ValueError(f"`captions` of {path} is not a list of dictionaries.")
    return embeds, records


def _group_by_image(embeds: torch.Tensor, records: list[dict]) -> tuple[list, list[list[str]], list[int]]:
    """Return the id, captions and embedding row of each image, in the order of their first captions."""
    captions: dict[str | int, list[str]] = {}
    rows: dict[str | int, int] = {}
    first_rows, caption_rows = [], []
    for number, record in enumerate(records):
        try:
            image_id, caption, row = record["image_id"], record["caption"], record["clip_embedding"]
        except (KeyError, TypeError):
            raise ValueError(
                f"Caption {number} lacks `image_id`, `caption` or `clip_embedding`: {record!r}."
            ) from None
        # In Python, True and False are also ints.
        if not isinstance(image_id, (str, int)) or isinstance(image_id, bool):
            raise ValueError(f"Caption {number}: its `image_id` is neither text nor a whole number: {record!r}.")
        if not isinstance(row, int) or isinstance(row, bool):
            raise ValueError(f"Caption {number}: its `clip_embedding` is not the number of a row: {record!r}.")
        if not isinstance(caption, str) or not 0 <= row < len(embeds):
            raise ValueError(f"Caption {number} has no text, or its embedding does not exist: {record!r}.")
        captions.setdefault(image_id, []).append(caption)
        first_rows.append(rows.setdefault(image_id, row))
        caption_rows.append(row)
    _check_one_embedding_an_image(embeds, records, first_rows, caption_rows)
    ids = list(captions)
    if all(isinstance(i, int) or (isinstance(i, str) and re.fullmatch(r"0|[1-9]\d{0,17}", i)) for i in ids):
        ids = [int(i) for i in ids]
    else:
        ids = [str(i) for i in ids]
    return ids, list(captions.values()), list(rows.values())


def _check_one_embedding_an_image(
    embeds: torch.Tensor, records: list[dict], first_rows: list[int], caption_rows: list[int], chunk_size: int = 16384
):
    # The same CLIP encoded the image for each caption, so embeddings differ at most by fp16 rounding on a GPU.
    repeats = [number for number, (first, row) in enumerate(zip(first_rows, caption_rows)) if first != row]
    for start in range(0, len(repeats), chunk_size):
        chunk = repeats[start : start + chunk_size]
        first = embeds[[first_rows[number] for number in chunk]].float()
        other = embeds[[caption_rows[number] for number in chunk]].float()
        differs = (F.cosine_similarity(first, other) < 0.99) & (first != other).any(1)
        if differs.any():
            image_id = records[chunk[int(differs.nonzero()[0])]]["image_id"]
            raise ValueError(f"`image_id` {image_id!r} has different embeddings: are the ids image ids?")


class _Refused(pickle.UnpicklingError):
    pass


class _Call:
    """A function that a pickle may call but not change: it has no attributes that a pickle's BUILD could write to."""

    __slots__ = ()


class _LoadStorage(_Call):
    __slots__ = ()

    def __call__(self, data: bytes) -> Any:
        # torch's own function would load the storage without `weights_only`, and on its original device.
        try:
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise _Refused(_refusal(found[1] if found else "something else")) from error
        if not isinstance(storage, (torch.storage.TypedStorage, torch.storage.UntypedStorage)):
            raise _Refused(_refusal(type(storage).__name__))
        return storage


class _RebuildTensor(_Call):
    __slots__ = ()

    def __call__(self, storage, offset, size, stride, requires_grad=False, backward_hooks=None, metadata=None):
        if not isinstance(storage, torch.storage.TypedStorage):
            raise _Refused(_refusal(type(storage).__name__))
        # Unlike `set_`, `as_strided` raises an error for a view beyond the end of the storage.
        return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage).as_strided(size, stride, offset)


def _refusal(name: str) -> str:
    return f"it holds `{name}`, and only tensors and plain containers are read, since anything else could run code."


class _TensorUnpickler(pickle.Unpickler):
    """Read tensors, and the containers, strings and numbers that need no import."""

    _ALLOWED = {
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch.storage", "_load_from_bytes"): _LoadStorage(),
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise _Refused(_refusal(f"{module}.{name}")) from None


__all__ = ["convert_official_embeddings"]
