"""Write, read and check folders of CLIP embeddings; writing survives interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import LOCK, listed, sync, write_text
from ..model.hashing_clipcap import weights_hash
from .saved import ends_as_stream, is_saved, load_saved


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

MANIFEST = "clip_embeds.json"


def load_embeddings(path: str | os.PathLike, split: str | None = None) -> Dataset | DatasetDict:
    """
    Read embeddings that [`embed`] or `clipcap embed` wrote, or that were converted from the official code.

    Args:
        path (`str` or path): The folder.
        split (`str`, *optional*): The split to return, if the folder has several.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.DatasetDict`]: Memory-mapped, with
            `clip_embeds` (clip_embed_dim, or (tokens, dim)) in float32.

    Raises:
        FileNotFoundError: If the folder holds no embeddings.
        ValueError: If they are unfinished or a file is truncated, or the split does not exist.
    """
    from datasets import DatasetDict

    from .schema import select_split

    path = Path(path)
    if not is_saved(path):
        unfinished = [folder for folder in (path, *path.glob("*")) if (folder / MANIFEST).is_file()]
        if unfinished:
            raise ValueError(f"{path} is unfinished: run `embed` again with the same arguments to continue.")
        raise FileNotFoundError(f"There are no embeddings in {path}.")
    data = load_saved(path)
    if split is None:
        return data
    return select_split(
        data if isinstance(data, DatasetDict) else DatasetDict({str(data.split): data}), split, str(path)
    )


def embeds_as_tensors(dataset: Dataset) -> Dataset:
    """Return the data set with `clip_embeds` read as tensors, which is 25 times as fast as lists for patches."""
    return dataset.with_format("torch", columns=["clip_embeds"], output_all_columns=True)


def embeddings_provenance(dataset: Dataset) -> dict[str, Any] | None:
    """
    Return a record of how the embeddings of a data set were made.

    It has `vision` (name and `model_type`), `weights_sha256`, `vision_feature`, `dtype`, `transform` (the image
    processor) and `shape`. It is `None` for embeddings that were not made by [`embed`].
    """
    try:
        provenance = json.loads(dataset.info.description)
    except ValueError:
        return None
    return provenance if isinstance(provenance, dict) and "weights_sha256" in provenance else None


def check_embeddings(dataset: Dataset | str | os.PathLike, model) -> None:
    """
    Check that embeddings come from the model's own vision tower.

    Args:
        dataset ([`~datasets.Dataset`] or path): The embeddings. Only their shape is checked if they were not made
            by [`embed`] or if the model has no tower.
        model ([`ClipCapForConditionalGeneration`]): The captioner to train on them.

    Raises:
        ValueError: If their width, feature or tower differs; the message says which tower made them.
    """
    if isinstance(dataset, (str, os.PathLike)):
        dataset = load_embeddings(dataset)
    if isinstance(dataset, dict):
        for split in dataset.values():
            check_embeddings(split, model)
        return
    if "clip_embeds" not in dataset.column_names:
        raise ValueError(f"The data has no column 'clip_embeds'; it has {', '.join(dataset.column_names)}.")
    provenance = embeddings_provenance(dataset) or {}
    made_by = f"They were made by {provenance['vision']['name']}." if provenance else ""
    shape = provenance.get("shape") or (_shape(dataset[0]["clip_embeds"]) if len(dataset) else [])
    wanted = getattr(model.config, "vision_feature", "pooled")
    feature = provenance.get("vision_feature", "patches" if len(shape) == 2 else "pooled")
    if shape and feature != wanted:
        raise ValueError(f"The model reads {wanted!r} features of its tower, but the embeddings are {feature!r}.")
    if shape and shape[-1] != model.config.clip_embed_dim:
        raise ValueError(
            f"The embeddings have {shape[-1]} dimensions, but the model's mapping network takes "
            f"{model.config.clip_embed_dim}. {made_by} Embed the images with the model's own tower."
        )
    if provenance and model.vision_tower is not None:
        tower = describe_tower(model.vision_tower, wanted, model.name_or_path)
        if tower["weights_sha256"] != provenance["weights_sha256"]:
            raise ValueError(
                f"The embeddings were not made by the model's vision tower. {made_by} The model's is "
                f"{tower['vision']['name']}, whose weights differ. Embed the images with it."
            )


def _shape(embeds) -> list[int]:
    return list(torch.as_tensor(embeds).shape)


def describe_tower(tower, vision_feature: str = "pooled", name: str = "") -> dict[str, Any]:
    """Return the name, `model_type` and SHA-256 of the weights of a vision tower."""
    # In float32, so that the hash does not depend on the precision in which the tower is loaded.
    weights = (value.float() if value.is_floating_point() else value for value in tower.state_dict().values())
    model_type = tower.config.model_type
    return {
        "vision": {"name": tower.config._name_or_path or name or model_type, "model_type": model_type},
        "vision_feature": vision_feature,
        "weights_sha256": weights_hash(weights),
    }


class EmbeddingsFolder:
    """
    A folder of embeddings while it is written.

    A shard is `data-N.arrow`, with `failed-N.jsonl` if images failed. Both get their names only when they are complete
    and on disk. `state.json`, by which `datasets` recognises a data set, is written last.
    """

    def __init__(self, path: Path, provenance: dict | None = None, features=None, shape: tuple[int, ...] = ()):
        self.path = path
        self.provenance = provenance or {}
        self.features: Any = None if features is None else _with_embeds(features, shape)
        self.writers: dict[int, Any] = {}  # `ArrowWriter`s
        self.failed: dict[int, list[dict]] = {}

    def begin(self):
        """Create the folder, or check that its data and tower are the same; call it in the process with the lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.path)
        manifest = self.path / MANIFEST
        if manifest.is_file():
            self._check_manifest(_read_manifest(manifest))
        elif any(path.name != LOCK for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no embeddings: choose another folder.")
        else:
            self._write_json(MANIFEST, self.provenance)

    def _check_manifest(self, found: dict):
        differing = [key for key, value in self.provenance.items() if _differs(key, found.get(key), value)]
        if differing:
            raise ValueError(
                f"{self.path} holds embeddings that differ in {', '.join(differing)}: choose another folder, or "
                "delete this one."
            )

    def is_done(self, shard: int, rows: int | None = None) -> bool:
        """Tell whether a shard is complete; remove a damaged one so that it is written again.

        Args:
            shard (`int`): Its number.
            rows (`int`, *optional*): Rows of the data in it, with and without an embedding; unknown for a stream.
        """
        path = self.path / _data_file(shard)
        if not path.is_file():
            return False
        embedded = _whole_rows(path)
        if embedded is not None and rows in (None, embedded + len(self._failed_lines(shard))):
            return True
        logger.warning(f"{path} is damaged or incomplete: its images are embedded again.")
        (self.path / "state.json").unlink(missing_ok=True)
        path.unlink()
        return False

    def write(self, shard: int, rows: list[dict], embeds: list[torch.Tensor], failed: list[dict]):
        from datasets.arrow_writer import ArrowWriter

        if shard not in self.writers:
            self.writers[shard] = ArrowWriter(features=self.features, path=str(self._scratch(shard)))
            self.failed[shard] = []
        self.failed[shard] += failed
        if rows:
            columns = {name: [row[name] for row in rows] for name in self.features if name != "clip_embeds"}
            self.writers[shard].write_batch({**columns, "clip_embeds": torch.stack(embeds).numpy()})

    def finish_shard(self, shard: int):
        self.writers[shard].finalize()
        failed = self.failed.pop(shard)
        # Write the failures first: the data file marks the shard as done.
        if failed:
            write_text(self.path / _failed_file(shard), "".join(json.dumps(record) + "\n" for record in failed))
        else:
            (self.path / _failed_file(shard)).unlink(missing_ok=True)
        sync(self._scratch(shard))
        os.replace(self._scratch(shard), self.path / _data_file(shard))
        sync(self.path)
        del self.writers[shard]

    def finish(self, shards: int):
        """Make the folder readable by `datasets.load_from_disk`. One process calls it when all shards are done."""
        from datasets import DatasetInfo

        rows = [_whole_rows(self.path / _data_file(shard)) for shard in range(shards)]
        if damaged := [_data_file(shard) for shard, count in enumerate(rows) if count is None]:
            raise ValueError(f"{self.path}: {listed(damaged)} cannot be read back. Run again to write them anew.")
        self._report_failed([line for shard in range(shards) for line in self._failed_lines(shard)], sum(rows))
        if (self.path / "state.json").is_file():
            return
        info = DatasetInfo(description=json.dumps(self.provenance), features=self.features)
        info.write_to_directory(str(self.path))
        sync(self.path / "dataset_info.json")
        digest = hashlib.sha256(json.dumps([self.provenance, str(self.path.absolute()), sum(rows)]).encode())
        state: dict[str, Any] = {
            "_data_files": [{"filename": _data_file(shard)} for shard in range(shards)],
            "_fingerprint": digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        self._write_json("state.json", state)

    def _report_failed(self, lines: list[str], rows: int):
        if not lines:
            (self.path / "failed.jsonl").unlink(missing_ok=True)
            return
        write_text(self.path / "failed.jsonl", "".join(line + "\n" for line in lines))
        if not rows:
            raise ValueError(f"No image could be embedded. The first error: {json.loads(lines[0])['error']}")
        first = json.loads(lines[0])
        name = str(first["image"] or first["image_id"] or f"row {first['row']}")
        reason = first["error"] if name in first["error"] else f"{name}: {first['error']}"
        logger.warning(
            f"{len(lines)} images could not be embedded; see {self.path / 'failed.jsonl'} for the reasons. The first: "
            f"{reason}."
        )

    def write_splits(self, names: list[str]):
        _remove_leftovers(self.path)
        self._write_json("dataset_dict.json", {"splits": names})

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        for shard, writer in self.writers.items():  # left open by an interrupted run
            try:
                writer.close()
            except OSError:
                pass
            self._scratch(shard).unlink(missing_ok=True)
        if exception_type is not None and issubclass(exception_type, OSError):
            logger.error(f"{self.path} could not be written. Finished shards are kept: run again to continue.")

    def _scratch(self, shard: int) -> Path:
        return self.path / f".{_data_file(shard)}.{os.getpid()}.tmp"

    def _failed_lines(self, shard: int) -> list[str]:
        path = self.path / _failed_file(shard)
        # Not `splitlines`: error messages may contain other line separators.
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []

    def _write_json(self, name: str, value: Any):
        write_text(self.path / name, json.dumps(value, indent=2))


def check_folder_of_splits(path: Path):
    """Refuse a folder that holds something other than the embeddings of splits, such as the images themselves."""
    for entry in path.iterdir() if path.is_dir() else ():
        if not (_is_scratch(entry) or entry.name == "dataset_dict.json" or _is_begun(entry)):
            raise ValueError(f"{path} is not empty and holds {entry.name}: choose another folder.")


def _is_begun(folder: Path) -> bool:
    """Tell whether a folder holds embeddings, or nothing yet but what a killed run left."""
    return (folder / MANIFEST).is_file() or (folder.is_dir() and all(map(_is_scratch, folder.iterdir())))


def _is_scratch(path: Path) -> bool:
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _remove_leftovers(folder: Path):
    """Remove the temporary files of runs that were killed."""
    for name in (MANIFEST, "data-", "failed", "state.json", "dataset_dict.json"):
        for leftover in folder.glob(f".{name}*.tmp"):
            leftover.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder, or choose another.") from None


def _whole_rows(path: Path) -> int | None:
    """Count the rows of an Arrow stream; return `None` if it is damaged or has no end mark."""
    import pyarrow as pa

    try:
        if not ends_as_stream(path):
            return None
        with pa.memory_map(os.fspath(path)) as mapped:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(mapped))
    except (OSError, ValueError):  # pyarrow's errors derive from these two
        return None


def _with_embeds(features, shape: tuple[int, ...]):
    from datasets import Array2D, Features, List, Value

    kept = {name: feature for name, feature in features.items() if name not in ("image", "image_path", "clip_embeds")}
    embeds = List(Value("float32"), length=shape[0]) if len(shape) == 1 else Array2D(shape, "float32")
    return Features({**kept, "image_path": Value("string"), "clip_embeds": embeds})


def _differs(key: str, found: Any, value: Any) -> bool:
    # The tower's folder may have moved; its weights identify it.
    return key != "vision" and found != value


def _data_file(shard: int) -> str:
    return f"data-{shard:05d}.arrow"


def _failed_file(shard: int) -> str:
    return f"failed-{shard:05d}.jsonl"
