"""Embed the images of whole data sets with CLIP, each once, by any number of processes; no work is lost."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm

from ..files import lock_folder
from ..model.images_clipcap import edge_that_is_enough, load_image
from ..model.modeling_vision import embed_pixels, place_pixels
from ..processes import default_workers, in_threads, process_state
from .embeddings import EmbeddingsFolder, check_folder_of_splits, describe_tower, load_embeddings
from .readable import undecoded
from .remote import with_bytes


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)


def embed(
    model,
    dataset,
    out: str | os.PathLike,
    image_processor=None,
    batch_size: int = 32,
    num_workers: int | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int = 4096,
    vision_feature: str | None = None,
    progress: bool = True,
    reduce_jpeg: bool = False,
) -> Dataset | DatasetDict:
    r"""
    Encode the images of a data set once and write their CLIP embeddings, for training without the vision tower.

    The work is divided into shards of `shard_size` rows, or into the shards of a streamed data set. Each shard is
    written under a temporary name and renamed when it is complete. After an interruption, run it again with any number
    of processes: it writes the missing shards and ends with the same rows. Under `torchrun` or `accelerate launch` the
    processes share the shards. An image that cannot be read is left out and recorded in `failed.jsonl` with the reason
    and its row (from 0; none for a stream).

    Args:
        model ([`ClipCapForConditionalGeneration`] or [`~transformers.PreTrainedModel`]): A captioner or a vision
            tower, on the device to use.
        dataset ([`~datasets.Dataset`], `IterableDataset` or a dictionary of them by split): From [`load_captions`], or
            with a column `image` ([`~datasets.Image`]); other columns are kept.
        out (`str` or path): Folder to write; each split gets its own folder in it.
        image_processor ([`~transformers.BaseImageProcessor`] or [`ClipCapProcessor`]): The image transform of the
            tower.
        batch_size (`int`): Images per batch.
        num_workers (`int`, *optional*): Processes that read and resize images; chosen by the number of images, the
            cores and the device by default. With 0, threads of this process read them between two batches.
        dtype (`torch.dtype`, *optional*): Data type in which the tower computes. By default bfloat16 on GPUs and CPUs
            that gain from it (CPUs with AMX), float16 on older GPUs, and the model's own elsewhere. Embeddings are
            written in float32.
        shard_size (`int`): Rows per file: the most work that an interruption can cost each process.
        vision_feature (`str`, *optional*): `"pooled"` or `"patches"`, as in [`ClipCapConfig`]; by default what the
            captioner reads, or the pooled embedding for a tower alone.
        progress (`bool`): Show a progress bar on standard error.
        reduce_jpeg (`bool`): Read large JPEG files at a half, a quarter or an eighth of their size, which is faster,
            where that is still twice the size that the tower needs. Embeddings then differ a little, and say so in
            their record.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.DatasetDict`]: The columns of `dataset`, as [`load_embeddings`] reads
        them, with `clip_embeds` (clip_embed_dim, or (tokens, dim)) and `image_path` instead of `image`.

    Raises:
        ValueError: If `out` holds embeddings of other data or of another tower, or if no image could be read.
        OSError: If `out` cannot be written; finished shards are kept.

    Example:

    ```python
    >>> from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
    >>> from clipcap_hf.data import embed, load_emoji

    >>> model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI)
    >>> processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    >>> data = embed(model, load_emoji("validation"), "embeds", processor, progress=False)  # doctest: +SKIP

    ```
    """
    image_processor = getattr(image_processor, "image_processor", image_processor)
    tower = getattr(model, "vision_tower", model)
    if tower is None:
        raise ValueError("This captioner has no vision tower: pass the tower of its CLIP instead (--vision).")
    if image_processor is None:
        raise ValueError("Pass `image_processor`, the transform of the vision tower.")
    vision_feature = vision_feature or getattr(model.config, "vision_feature", "pooled")
    encoder = Encoder(tower, dtype, vision_feature, model.name_or_path)
    preprocess = _Preprocess(image_processor, reduce_jpeg)
    out = Path(out)
    if not isinstance(dataset, dict):
        return _embed_split(encoder, dataset, out, preprocess, batch_size, num_workers, shard_size, progress)
    check_folder_of_splits(out)
    for name, split in dataset.items():
        _embed_split(encoder, split, out / name, preprocess, batch_size, num_workers, shard_size, progress, name)
    if process_state().is_main_process:
        EmbeddingsFolder(out).write_splits(list(dataset))
    process_state().wait_for_everyone()
    return load_embeddings(out)


class Encoder:
    """A vision tower, converted to the data type in which it computes."""

    def __init__(self, tower, dtype: torch.dtype | None = None, vision_feature: str = "pooled", name: str = ""):
        self.device = tower.device
        self.dtype = dtype or _fast_dtype(tower)
        self.vision_feature = vision_feature
        self.description = {
            **describe_tower(tower, vision_feature, name),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if tower.dtype != self.dtype:
            tower = copy.deepcopy(tower).to(self.dtype)
        self.tower = tower.eval()

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return float32 embeddings on the CPU: (batch, dim), or (batch, patches, dim) for patches."""
        pixel_values = place_pixels(pixel_values, self.device, self.dtype)
        return embed_pixels(self.tower, pixel_values, self.vision_feature)[0].float().cpu()


def _fast_dtype(tower) -> torch.dtype:
    if tower.dtype != torch.float32:
        return tower.dtype
    if tower.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if tower.device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):  # five times as fast
        return torch.bfloat16
    return torch.float32


def _embed_split(
    encoder: Encoder,
    dataset,
    out: Path,
    preprocess: _Preprocess,
    batch_size: int,
    num_workers: int | None,
    shard_size: int,
    progress: bool,
    name: str = "",
) -> Dataset:
    process = process_state()
    shards = _Shards(undecoded(dataset), shard_size)
    blank = preprocess.pixels(Image.new("RGB", (64, 64)))
    shape = tuple(encoder(blank[None]).shape[1:])
    provenance = {
        **encoder.description,
        "transform": preprocess.describe(),
        "shape": list(shape),
        "data": shards.describe(),
    }
    folder = EmbeddingsFolder(out, provenance, shards.dataset.features, shape)
    with lock_folder(out) if process.is_main_process else nullcontext():
        if process.is_main_process:
            folder.begin()
        process.wait_for_everyone()
        mine = range(process.process_index, len(shards), process.num_processes)
        todo = [shard for shard in mine if not folder.is_done(shard, shards.rows(shard))]
        loader, expected = _load_batches(
            shards, todo, batch_size, num_workers, preprocess, encoder.device, process.num_processes
        )
        show = progress and process.is_main_process
        bar = tqdm(total=expected, unit="image", desc=f"Embedding {name}".strip(), disable=not show)
        with bar, folder:
            for batch in loader:
                folder.write(batch.shard, *_encode(encoder, batch))
                if batch.is_last:
                    folder.finish_shard(batch.shard)
                bar.update(len(batch.rows))
        process.wait_for_everyone()
        if process.is_main_process:
            folder.finish(len(shards))
        process.wait_for_everyone()
    return load_embeddings(out)


class _Shards:
    """How a data set is divided: every `shard_size` rows, or by its own files if it is streamed."""

    def __init__(self, dataset, shard_size: int):
        self.dataset = dataset
        self.shard_size = shard_size
        self.streamed = not hasattr(dataset, "num_rows")
        if not len(self):
            raise ValueError("The data set has no rows.")

    def __len__(self) -> int:
        return self.dataset.num_shards if self.streamed else -(-self.dataset.num_rows // self.shard_size)

    def span(self, shard: int) -> tuple[int, int]:
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.dataset.num_rows)

    def rows(self, shard: int) -> int | None:
        if self.streamed:
            return None
        start, end = self.span(shard)
        return end - start

    def describe(self) -> dict[str, Any]:
        return {
            "fingerprint": None if self.streamed else data_fingerprint(self.dataset),
            "shards": len(self),
            "shard_size": None if self.streamed else self.shard_size,
        }


def _load_batches(
    shards: _Shards,
    todo: list[int],
    batch_size: int,
    num_workers: int | None,
    preprocess,
    device: torch.device,
    processes: int,
):
    """Return a loader of the batches of some shards, and the number of their rows if it is known."""
    batches: _StreamedBatches | _Batches
    if shards.streamed:
        batches, expected = _StreamedBatches(shards.dataset, todo, batch_size, preprocess), None
    else:
        batches = _Batches(shards, todo, batch_size, preprocess)
        expected = sum(rows for rows in map(shards.rows, todo) if rows is not None)
    if num_workers is None:
        # A stream waits for its source, which the processes that read it do meanwhile.
        shared = None if shards.streamed else device
        num_workers = default_workers(expected, most=8, processes=processes, device=shared)
    if shards.streamed:
        num_workers = min(num_workers, len(todo))
    return DataLoader(batches, batch_size=None, num_workers=num_workers), expected


def data_fingerprint(dataset, column: str = "image") -> str:
    """Return a fingerprint of a data set and its image files, which changes when a file is replaced or repaired."""
    from datasets import Image as ImageFeature

    images = dataset.with_format(None).select_columns(column).cast_column(column, ImageFeature(decode=False))
    digest = hashlib.sha256(dataset._fingerprint.encode())
    for batch in images.iter(1000):
        for image in batch[column]:
            if image is None or image["path"] is None or image["bytes"] is not None:
                continue
            try:
                status = os.stat(image["path"])
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"-\n")
        if all(image and image["bytes"] is not None for image in batch[column]):
            break  # the data set itself holds the images, so its fingerprint covers them
    return digest.hexdigest()[:16]


@dataclass
class _Batch:
    shard: int
    is_last: bool
    rows: list[dict[str, Any]]
    pixels: torch.Tensor | None  # the readable images only
    errors: list[str | None]
    start: int | None  # number of the first row in the data set; None for a stream


def _encode(encoder: Encoder, batch: _Batch) -> tuple[list[dict], list[torch.Tensor], list[dict]]:
    """Return the rows with an embedding, their embeddings, and records of the rows that failed."""
    embeds = iter(() if batch.pixels is None else encoder(batch.pixels))
    rows, kept, failed = [], [], []
    for index, (row, error) in enumerate(zip(batch.rows, batch.errors)):
        if error is None:
            embed = next(embeds)
            if embed.isfinite().all():
                rows.append(row)
                kept.append(embed)
            else:
                error = f"the embedding holds NaN or infinity in {encoder.dtype}"
        if error is not None:
            number = None if batch.start is None else batch.start + index
            failed.append({"row": number, "image_id": row.get("image_id"), "image": row["image_path"], "error": error})
    return rows, kept, failed


class _Preprocess:
    """Read and transform the images of a batch."""

    def __init__(self, image_processor, reduce_jpeg: bool = False):
        self.image_processor = image_processor
        self.enough = edge_that_is_enough(image_processor) if reduce_jpeg else None

    def describe(self) -> dict[str, Any]:
        transform = json.loads(self.image_processor.to_json_string())
        return transform if self.enough is None else {**transform, "jpeg_reduced_to": self.enough}

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def __call__(self, shard: int, is_last: bool, columns: dict[str, list], start: int | None = None) -> _Batch:
        names = list(columns)
        rows = [dict(zip(names, values)) for values in zip(*columns.values())]
        pixels: list[torch.Tensor] = []
        errors: list[str | None] = []
        images = [row.pop("image") for row in rows]
        for row, image, read in zip(rows, images, in_threads(self._try, images)):
            row["image_path"] = image["path"] if image and image["bytes"] is None else None
            if isinstance(read, torch.Tensor):
                pixels.append(read)
                errors.append(None)
            else:
                errors.append(str(read) or type(read).__name__)
        return _Batch(shard, is_last, rows, torch.stack(pixels) if pixels else None, errors, start)

    def _try(self, image: dict | None) -> torch.Tensor | Exception:
        try:
            return self.pixels(_read(image, self.enough))
        except Exception as error:  # decoders raise many kinds of errors for damaged files
            return error


def _read(image: dict | None, enough: int | None) -> Image.Image:
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("there is no image")
    return load_image(with_bytes(image), enough=enough)


class _Batches(TorchDataset):
    """The batches of a data set with random access. No batch crosses a shard, so they are the same in every run."""

    def __init__(self, shards: _Shards, todo: list[int], batch_size: int, preprocess: _Preprocess):
        self.dataset = shards.dataset
        self.preprocess = preprocess
        self.spans = []
        for shard in todo:
            first, end = shards.span(shard)
            for start in range(first, end, batch_size):
                stop = min(start + batch_size, end)
                self.spans.append((shard, start, stop, stop == end))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> _Batch:
        shard, start, stop, is_last = self.spans[index]
        return self.preprocess(shard, is_last, self.dataset[start:stop], start)


class _StreamedBatches(TorchIterableDataset):
    """The batches of a streamed data set; each worker reads its own shards."""

    def __init__(self, dataset, shards: list[int], batch_size: int, preprocess: _Preprocess):
        self.dataset = dataset
        self.shards = shards
        self.batch_size = batch_size
        self.preprocess = preprocess

    def __iter__(self) -> Iterator[_Batch]:
        worker = torch.utils.data.get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        for shard in self.shards[first::step]:
            rows = self.dataset.shard(num_shards=self.dataset.num_shards, index=shard)
            previous = None
            for columns in rows.iter(self.batch_size):
                if previous is not None:
                    yield self.preprocess(shard, False, previous)
                previous = columns
            yield self.preprocess(shard, True, previous or {})
