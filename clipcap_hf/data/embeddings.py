"""A folder of CLIP embeddings: how it is written so that it survives interruptions, how it is read, and what it is for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model.donors_clipcap import weights_hash


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

MANIFEST = "clip_embeds.json"


def load_embeddings(path: str | os.PathLike, split: str | None = None) -> Dataset | DatasetDict:
    """
    Read the embeddings that [`embed`] or `clipcap embed` wrote, or that were converted from the official code's.

    Args:
        path (`str` or path): The folder.
        split (`str`, *optional*): The split to return, where the folder has several.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.DatasetDict`]: Memory-mapped, with
            `clip_embeds` (clip_embed_dim, or (tokens, dim)) in float32.

    Raises:
        FileNotFoundError: If there are no embeddings.
        ValueError: If they are unfinished, or there is no such split.
    """
    from datasets import DatasetDict, load_from_disk

    from .schema import select_split

    path = Path(path)
    splits = path / "dataset_dict.json"
    if not splits.is_file() and not (path / "state.json").is_file():
        unfinished = [folder for folder in (path, *path.glob("*")) if (folder / MANIFEST).is_file()]
        if unfinished:
            raise ValueError(f"{path} is unfinished: run `embed` again with the same arguments, and it goes on.")
        raise FileNotFoundError(f"There are no embeddings in {path}.")
    data = load_from_disk(os.fspath(path))
    if split is None:
        return data
    return select_split(
        data if isinstance(data, DatasetDict) else DatasetDict({str(data.split): data}), split, str(path)
    )


def embeddings_provenance(dataset: Dataset) -> dict[str, Any] | None:
    """
    What made the embeddings of a data set: `vision` (name and `model_type`), `weights_sha256`, `vision_feature`, `dtype`,
    `transform` (the image processor), `shape`. `None` for embeddings that were not made by [`embed`].
    """
    try:
        provenance = json.loads(dataset.info.description)
    except ValueError:
        return None
    return provenance if isinstance(provenance, dict) and "weights_sha256" in provenance else None


def check_embeddings(dataset: Dataset | str | os.PathLike, model) -> None:
    """
    Make sure that embeddings are those of the model's own vision tower.

    Args:
        dataset ([`~datasets.Dataset`] or path): The embeddings. Those that were not made by [`embed`] have only their
            shape checked, as have those for a model without a tower.
        model ([`ClipCapForConditionalGeneration`]): The captioner that is to be trained on them.

    Raises:
        ValueError: If they are of another width, feature or tower; the message says which tower made them.
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
                f"The embeddings were made by another vision tower than the model's. {made_by} The model's is "
                f"{tower['vision']['name']}, whose weights differ. Embed the images with it."
            )


def _shape(embeds) -> list[int]:
    return list(torch.as_tensor(embeds).shape)


def describe_tower(tower, vision_feature: str = "pooled", name: str = "") -> dict[str, Any]:
    """Name, `model_type` and SHA-256 of the weights of a vision tower."""
    # In float32, so that a tower saved in half precision is the same however it is loaded.
    weights = (value.float() if value.is_floating_point() else value for value in tower.state_dict().values())
    model_type = tower.config.model_type
    return {
        "vision": {"name": tower.config._name_or_path or name or model_type, "model_type": model_type},
        "vision_feature": vision_feature,
        "weights_sha256": weights_hash(weights),
    }


class EmbeddingsFolder:
    """
    The files of embeddings while they are made. A shard is `data-N.arrow`, with `failed-N.jsonl` if images failed; both
    have their names only once they are whole. `state.json`, by which `datasets` knows a data set, comes last of all.
    """

    def __init__(self, path: Path, provenance: dict | None = None, features=None, shape: tuple[int, ...] = ()):
        self.path = path
        self.provenance = provenance
        self.features = None if features is None else _with_embeds(features, shape)
        self.writers = {}
        self.failed: dict[int, list[dict]] = {}

    def begin(self):
        """Make the folder, or make sure that it is of the same data and tower; called by one process alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self._temporary_files():  # of a killed run
            leftover.unlink()
        manifest = self.path / MANIFEST
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if differing := [key for key, value in self.provenance.items() if _differs(key, found.get(key), value)]:
                raise ValueError(
                    f"{self.path} holds embeddings that differ in {', '.join(differing)}: choose another folder, or delete "
                    "this one."
                )
        elif any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no embeddings: choose another folder.")
        else:
            self._write_json(MANIFEST, self.provenance)

    def is_done(self, shard: int) -> bool:
        return (self.path / _data_file(shard)).is_file()

    def write(self, shard: int, rows: list[dict], embeds: list[torch.Tensor], failed: list[dict]):
        from datasets.arrow_writer import ArrowWriter

        if shard not in self.writers:
            self.writers[shard] = ArrowWriter(features=self.features, path=str(self._temporary(_data_file(shard))))
            self.failed[shard] = []
        self.failed[shard] += failed
        if rows:
            columns = {name: [row[name] for row in rows] for name in self.features if name != "clip_embeds"}
            self.writers[shard].write_batch({**columns, "clip_embeds": torch.stack(embeds).numpy()})

    def finish_shard(self, shard: int):
        self.writers[shard].finalize()
        if failed := self.failed.pop(shard):
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in failed)
            self._write_text(_failed_file(shard), lines)  # before the data, which says that the shard is done
        os.replace(self._temporary(_data_file(shard)), self.path / _data_file(shard))
        del self.writers[shard]

    def finish(self, shards: int):
        """Make the folder one that `datasets.load_from_disk` reads; called by one process, when all shards are done."""
        from datasets import Dataset, DatasetInfo

        failed = [self.path / _failed_file(shard) for shard in range(shards)]
        failed = "".join(path.read_text(encoding="utf-8") for path in failed if path.is_file())
        rows = sum(len(Dataset.from_file(str(self.path / _data_file(shard)))) for shard in range(shards))
        if failed:
            self._write_text("failed.jsonl", failed)
            lines = failed.splitlines()
            if not rows:
                raise ValueError(f"No image could be embedded. The first: {json.loads(lines[0])['error']}")
            logger.warning(f"{len(lines)} images could not be embedded: {self.path / 'failed.jsonl'} says why.")
        if (self.path / "state.json").is_file():
            return
        info = DatasetInfo(description=json.dumps(self.provenance), features=self.features)
        info.write_to_directory(str(self.path))
        digest = hashlib.sha256(json.dumps([self.provenance, str(self.path.absolute()), rows]).encode())
        state = {
            "_data_files": [{"filename": _data_file(shard)} for shard in range(shards)],
            "_fingerprint": digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        self._write_json("state.json", state)

    def write_splits(self, names: list[str]):
        self._write_json("dataset_dict.json", {"splits": names})

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        for shard, writer in self.writers.items():  # of an interrupted run
            try:
                writer.close()
            except OSError:
                pass
            self._temporary(_data_file(shard)).unlink(missing_ok=True)
        if exception_type is not None and issubclass(exception_type, OSError):
            logger.error(f"{self.path} could not be written. What was finished is kept: run again to go on.")

    def _temporary_files(self) -> list[Path]:
        return [
            path for name in (MANIFEST, "data-*", "failed*", "state.json") for path in self.path.glob(f".{name}.tmp")
        ]

    def _temporary(self, name: str) -> Path:
        return self.path / f".{name}.tmp"

    def _write_json(self, name: str, value: Any):
        self._write_text(name, json.dumps(value, indent=2))

    def _write_text(self, name: str, text: str):
        temporary = self._temporary(name)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)


def _with_embeds(features, shape: tuple[int, ...]):
    from datasets import Array2D, Features, List, Value

    kept = {name: feature for name, feature in features.items() if name not in ("image", "image_path", "clip_embeds")}
    embeds = List(Value("float32"), length=shape[0]) if len(shape) == 1 else Array2D(shape, "float32")
    return Features({**kept, "image_path": Value("string"), "clip_embeds": embeds})


def _differs(key: str, found: Any, value: Any) -> bool:
    # A folder of the tower may have moved; its weights tell.
    return key != "vision" and found != value


def _data_file(shard: int) -> str:
    return f"data-{shard:05d}.arrow"


def _failed_file(shard: int) -> str:
    return f"failed-{shard:05d}.jsonl"
