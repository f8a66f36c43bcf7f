"""Frozen parts, which a checkpoint can leave out because it knows where they come from (their donors)."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .base_clipcap import CaptionerParts
from .checkpoints_open_clip import absolute_name, is_open_clip_name
from .configuration_clipcap import ClipCapConfig
from .hashing_clipcap import cast_hash, file_hash, weights_hash
from .modeling_text import check_can_read_gguf
from .modeling_vision import load_vision_config
from .packages_clipcap import PACKAGE, donor_folder
from .unchanged_files_clipcap import files_state, hash_once


logger = logging.get_logger(__name__)

# The loading arguments that a record keeps. None is secret, specific to a machine or lets code run:
# `trust_remote_code` is each user's own decision.
_RECORDED_ARGUMENTS = ("revision", "subfolder", "variant", "gguf_file", "vision_feature")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def donor_record(name: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Build the record in `config.donors` of how a part was loaded: name, arguments and dtype."""
    record = {
        "name": absolute_name(name),
        **{key: kwargs[key] for key in _RECORDED_ARGUMENTS if kwargs.get(key) is not None},
    }
    if commit := _cached_commit(name, kwargs):
        record["revision"] = commit
    return {**record, "dtype": str(dtype).removeprefix("torch."), "sha256": None, "in_checkpoint": True}


def _cached_commit(name: str, kwargs: dict[str, Any]) -> str | None:
    """Find the commit of a Hub repository that was just loaded; `None` for other sources."""
    repo = name.removeprefix("hf-hub:")
    if repo.startswith(PACKAGE) or repo.count("/") > 1 or Path(name).exists():
        return None
    filename = "open_clip_config.json" if name.startswith("hf-hub:") else kwargs.get("gguf_file", "config.json")
    if subfolder := kwargs.get("subfolder"):
        filename = f"{subfolder}/{filename}"
    found = try_to_load_from_cache(
        repo, filename, cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision") or "main"
    )
    if not isinstance(found, str):
        return None
    parts = Path(found).parts
    return parts[parts.index("snapshots") + 1]


def original_weights(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a part's `state_dict()` without adapter weights."""
    return {key: value for key, value in part.state_dict().items() if ".lora_" not in key}


def names_beside_adapters(donor_weights: dict[str, torch.Tensor], others: Iterable[str]) -> dict[str, torch.Tensor]:
    """Rename a donor's weights as PEFT does, for modules with LoRA adapters among the `others`."""
    adapted = {key.split(".lora_")[0] for key in others if ".lora_" in key}

    def rename(key: str) -> str:
        module, _, weight = key.rpartition(".")
        return f"{module}.base_layer.{weight}" if module in adapted else key

    return {rename(key): value for key, value in donor_weights.items()}


class Donor:
    """
    A pretrained model that lends its weights to a part of a captioner.

    Args:
        part (`str`): `"vision_tower"` or `"language_model"`.
        record (`dict`): Its entry in `config.donors`.
        moved_to (`str`, *optional*): Its new Hub id, folder, open_clip name or `"package:NAME"`.
        hub_kwargs (`dict`, *optional*): `token`, `cache_dir`, ... for loading it from the Hub.
    """

    def __init__(self, part: str, record: dict[str, Any], moved_to: str | None = None, hub_kwargs: dict | None = None):
        self.part = part
        self.record = dict(record)
        self.label = part.replace("_", " ")
        if moved_to is not None:
            kept = ("gguf_file", "vision_feature", "dtype", "sha256", "in_checkpoint")
            self.record = {"name": absolute_name(moved_to), **{key: record[key] for key in kept if key in record}}
        self.kwargs = {key: self.record[key] for key in _RECORDED_ARGUMENTS if self.record.get(key) is not None}
        self.hub_kwargs = {key: (hub_kwargs or {}).get(key) for key in _HUB_ARGUMENTS if (hub_kwargs or {}).get(key)}
        # Trusting the captioner's repository does not mean trusting the repositories that its configuration names.
        self.hub_kwargs["trust_remote_code"] = bool((hub_kwargs or {}).get("trust_donor_code"))
        self._state: str | None = None  # of its files, before they were read

    @property
    def name(self) -> str:
        return self.record["name"]

    def check(self, config: PreTrainedConfig):
        """Find the donor and compare its configuration, before loading any weights.

        Raises:
            OSError: If the donor cannot be found.
            ValueError: If it is not the recorded model.
        """
        self._state = self._files_state()
        if self.is_gguf:
            self._compare(self.identity({}))
            check_can_read_gguf(self.name)
            return
        try:
            load_config = load_vision_config if self.part == "vision_tower" else AutoConfig.from_pretrained
            where = {key: value for key, value in self.kwargs.items() if key != "vision_feature"}
            found = load_config(donor_folder(self.name), **where, **self.hub_kwargs)
        except (OSError, ValueError) as error:
            raise self._missing(error) from error
        if is_open_clip_name(self.name):
            return  # plain ViTs become transformers' CLIP, with another configuration; the hash decides
        for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            here, there = getattr(config, field, None), getattr(found, field, None)
            if here != there:
                raise self._changed(f"its {field} is {there}, the captioner's {self.label} has {here}")

    def load(self, load_donor: Callable[..., PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Load the donor's weights; [`Donor.verify`] says whether they are the recorded ones.

        Args:
            load_donor (`callable`): The model's `_load_donor`.
            config ([`~transformers.PreTrainedConfig`]): The part's configuration, used for GGUF files only.

        Raises:
            OSError: If the donor cannot be found.
            ValueError: If its weights are damaged.
        """
        dtype = getattr(torch, self.record["dtype"])
        known = {"config": copy.deepcopy(config)} if self.is_gguf else {}
        try:
            model = load_donor(self.part, self.name, dtype, **known, **self.kwargs, **self.hub_kwargs)
        except OSError as error:
            raise self._missing(error) from error
        except ValueError as error:
            raise ValueError(
                f"The {self.label}, which this checkpoint leaves out, cannot be loaded: {error}"
            ) from error
        return model.state_dict()

    def identity(self, weights: dict[str, torch.Tensor]) -> str:
        """Return the hash that identifies the donor, given its weights in the recorded dtype (none for GGUF files)."""
        if (recorded := self.record.get("sha256")) is not None and self._is_at_its_commit:
            return recorded  # a commit of the Hub fixes what is in its files, so that hashing them says nothing new
        state = self._state if self._state == self._files_state() else None  # the same before and after reading
        # Readers may unpack a GGUF file differently, so the hash is that of the file.
        return hash_once(state, lambda: self._gguf_hash if self.is_gguf else weights_hash(weights.values()))

    def verify(self, found: str):
        """Raise a `ValueError` if the `identity` of the loaded weights is not the recorded one; then record it."""
        self._compare(found)
        self.record["sha256"] = found

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.kwargs

    @property
    def _is_at_its_commit(self) -> bool:
        """Whether it is in the Hub's cache at the recorded commit, from which alone it is loaded then."""
        commit = self.record.get("revision")
        return commit is not None and commit == _cached_commit(self.name, {**self.kwargs, **self.hub_kwargs})

    def _files_state(self) -> str | None:
        return files_state(self.name, {**self.kwargs, "part": self.part, "dtype": self.record.get("dtype")})

    @cached_property
    def _gguf_hash(self) -> str:
        hub_kwargs = {key: value for key, value in self.hub_kwargs.items() if key != "trust_remote_code"}
        where = {key: value for key, value in self.kwargs.items() if key in ("revision", "subfolder")}
        try:
            path = cached_file(donor_folder(self.name), self.kwargs["gguf_file"], **where, **hub_kwargs)
        except OSError as error:
            raise self._missing(error) from error
        return file_hash(path)

    def _compare(self, found: str):
        if (expected := self.record.get("sha256")) not in (None, found):
            what = self.kwargs["gguf_file"] if self.is_gguf else "its weights"
            raise self._changed(f"the SHA-256 of {what} is {found}, but {expected} was expected")

    def _where(self) -> str:
        revision = self.record.get("revision")
        return self.name + (f" at revision {revision}" if revision else "")

    def _missing(self, error: Exception) -> OSError:
        if "trust_remote_code" in str(error):
            return OSError(
                f"The frozen {self.label} of this checkpoint, {self._where()}, has code of its own. Trust in the "
                "captioner does not extend to it: read the code, and pass `trust_donor_code=True` to "
                "`from_pretrained` to run it."
            )
        return OSError(
            f"This checkpoint leaves out its frozen {self.label}, which is {self._where()} and could not be "
            f"loaded: {error} If it has moved, pass its folder or Hub id to `from_pretrained` as `{self.part}=`."
        )

    def _changed(self, difference: str) -> ValueError:
        return ValueError(
            f"This checkpoint was trained with another {self.label} than {self._where()}: {difference}. "
            f"Pass the folder or Hub id of the original {self.label} to `from_pretrained` as `{self.part}=`."
        )


def read_checkpoint(folder: str, variant: str | None = None, **hub_kwargs) -> dict[str, torch.Tensor]:
    """Read all safetensors weights of a folder or Hub repository, sharded or not."""

    def find(filename: str) -> str | None:
        if variant:
            stem, _, suffix = filename.rpartition(".")
            filename = f"{stem}.{variant}.{suffix}"
        return cached_file(folder, filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if (path := find(SAFE_WEIGHTS_NAME)) is not None:
        return load_file(path)
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        raise OSError(f"{folder} holds no {SAFE_WEIGHTS_NAME}: is it a captioner's folder?")
    shards, _ = get_checkpoint_shard_files(folder, index, **hub_kwargs)
    return {key: value for shard in shards for key, value in load_file(shard).items()}


def remember_donors(model: CaptionerParts):
    """Store the hashes of a new model's frozen parts in `config.donors`."""
    for part, record in (model.config.donors or {}).items():
        weights = original_weights(getattr(model, part))
        if not _is_frozen(getattr(model, part), weights):
            continue
        donor = Donor(part, record)
        record["sha256"] = donor.identity(weights)
        model._donor_hashes[part] = weights_hash(weights.values()) if donor.is_gguf else record["sha256"]
    _ignore_on_save(model, () if model.config.save_frozen else model._donor_hashes)


@contextmanager
def leaving_out_frozen(model: CaptionerParts, save_frozen: bool) -> Iterator[None]:
    """Make transformers' `save_pretrained` leave out the frozen parts with known donors, within this context."""
    config = model.config
    left_out = {} if save_frozen else _parts_to_leave_out(model)
    if not save_frozen and not left_out:
        logger.warning(
            "`save_frozen` is False, but nothing can be left out: no frozen part has a known donor (`config.donors`). "
            "All weights are saved."
        )
    before = config.donors, config.save_frozen, model._keys_to_ignore_on_save
    if config.donors is not None:
        config.donors = {
            part: left_out.get(part, {**record, "in_checkpoint": True}) for part, record in config.donors.items()
        }
    config.save_frozen = save_frozen
    _ignore_on_save(model, left_out)
    try:
        yield
    finally:
        config.donors, config.save_frozen, model._keys_to_ignore_on_save = before


def _ignore_on_save(model: CaptionerParts, parts: Iterable[str]):
    # When it resumes, Trainer also reads here which weights a checkpoint may lack.
    model._keys_to_ignore_on_save = {
        f"{part}.{key}" for part in parts for key in original_weights(getattr(model, part))
    }


def _parts_to_leave_out(model: CaptionerParts) -> dict[str, dict[str, Any]]:
    """Return the donor records of the frozen parts that need not be saved."""
    records = {}
    for part, record in (model.config.donors or {}).items():
        weights = original_weights(getattr(model, part))
        if not _is_frozen(getattr(model, part), weights):
            continue
        donor, found = Donor(part, record), weights_hash(weights.values())
        if found not in (model._donor_hashes.get(part), record["sha256"]):
            try:
                of_donor = donor.load(model._load_donor, getattr(model, part).config)
                donor.verify(donor.identity(of_donor))
                same = cast_hash(of_donor, like=weights) == found
            except (OSError, ValueError) as error:
                logger.warning("%s", error)
                same = False
            if not same:
                logger.warning(f"The {donor.label} no longer matches {donor.name}, so it is saved with the rest.")
                continue
            model._donor_hashes[part] = found
        records[part] = {**donor.record, "in_checkpoint": False}
        if os.path.isdir(donor.name):
            logger.warning_once(
                f"Checkpoints leave out the {donor.label}, which is the folder {donor.name}. On another machine, pass "
                f"its location to `from_pretrained` as `{part}=`, or save with `save_frozen=True`."
            )
    return records


def _is_frozen(part: torch.nn.Module, weights: Iterable[str]) -> bool:
    trained = {name for name, parameter in part.named_parameters() if parameter.requires_grad}
    return trained.isdisjoint(weights)


def with_donors(
    model_class: type[CaptionerParts], name: str, moved: dict[str, str], kwargs: dict[str, Any], beside: Executor
) -> tuple[dict[str, Any], list[tuple[Donor, Future[str]]]]:
    """
    Load the parts that a checkpoint leaves out. Whether they are the right ones is for [`verify_donors`] to say.

    Args:
        model_class (`type`): The captioner's class.
        name (`str`): The checkpoint's Hub id or folder.
        moved (`dict`): New locations of parts that have moved.
        kwargs (`dict`): The arguments of `from_pretrained`. Among them, `trust_donor_code=True` lets code from the
            donors' repositories run, which `trust_remote_code` does not.
        beside (`Executor`): Its threads hash the weights while others are loaded.

    Returns:
        `(kwargs, donors)`: arguments of `from_pretrained` with all weights as `state_dict`, and the donors with their
        identities. If the checkpoint leaves nothing out, the arguments are unchanged.
    """
    kwargs = dict(kwargs)
    trust = {"trust_donor_code": kwargs.pop("trust_donor_code", False)}
    hub_kwargs = {key: kwargs[key] for key in (*_HUB_ARGUMENTS, "revision", "subfolder") if key in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        found, _ = PreTrainedConfig.get_config_dict(config or name, **hub_kwargs)
        if (model_type := found.get("model_type", "clipcap")) != "clipcap":
            raise ValueError(
                f"{config or name} is a `{model_type}`, not a clipcap captioner. To start a captioner from a vision "
                "tower and a language model, use `from_vision_text_pretrained`."
            )
        config = ClipCapConfig.from_pretrained(config or name, **hub_kwargs)
    left_out = [part for part, record in (config.donors or {}).items() if not record["in_checkpoint"]]
    if needless := sorted(set(moved) - set(left_out)):
        raise ValueError(
            f"{name} holds its own {' and '.join(needless)}: leave `{needless[0]}=` out. To build a captioner from "
            "parts, use `from_vision_text_pretrained`."
        )
    if not left_out:
        return kwargs, []
    config, kwargs = _override_config(config, model_class, name, hub_kwargs, kwargs)
    donors = [Donor(part, config.donors[part], moved.get(part), hub_kwargs | trust) for part in left_out]
    part_configs = {"vision_tower": config.vision_config, "language_model": config.text_config}
    for donor in donors:
        donor.check(part_configs[donor.part])
    weights = read_checkpoint(name, kwargs.pop("variant", None), **hub_kwargs)
    identified: list[tuple[Donor, Future[str]]] = []
    for donor in donors:
        loaded = donor.load(model_class._load_donor, part_configs[donor.part])
        identified.append((donor, beside.submit(donor.identity, loaded)))
        weights |= names_beside_adapters({f"{donor.part}.{key}": value for key, value in loaded.items()}, weights)
    return {**kwargs, "state_dict": weights}, identified


def verify_donors(model: CaptionerParts, donors: Iterable[tuple[Donor, Future[str]]]):
    """Check that the parts which were loaded by [`with_donors`] are the recorded ones, and remember them.

    Raises:
        ValueError: If one of them is another one.
    """
    for donor, identity in donors:
        donor.verify(identity.result())
        model.config.donors = {**(model.config.donors or {}), donor.part: donor.record}
        if not donor.is_gguf and str(getattr(model, donor.part).dtype) == f"torch.{donor.record['dtype']}":
            model._donor_hashes[donor.part] = donor.record["sha256"]


def _override_config(config, model_class, name, hub_kwargs, kwargs) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Apply overrides as `from_pretrained` does with a name; given weights, it skips them."""
    kwargs = {key: value for key, value in kwargs.items() if key not in hub_kwargs}
    if isinstance(kwargs.pop("config", None), PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        # Keyword arguments named like fields of the configuration override them.
        apart = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "attn_implementation") if key in kwargs}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if hasattr(config, key)}
        config = ClipCapConfig.from_dict({**config.to_dict(), **overrides})
        kwargs |= apart
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    kwargs["dtype"] = (config.dtype or torch.float32) if dtype in (None, "auto") else dtype
    if isinstance(kwargs["dtype"], str):
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if kwargs.get("generation_config") is None:
        try:
            kwargs["generation_config"] = GenerationConfig.from_pretrained(name, **hub_kwargs)
        except OSError:
            pass  # transformers derives one
    return config, {**kwargs, "config": config}
