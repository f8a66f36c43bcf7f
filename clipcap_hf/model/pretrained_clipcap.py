"""Load a captioner, save it, or assemble a new one from pretrained parts."""

import copy
import dataclasses
import difflib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from .base_clipcap import CaptionerParts
from .configuration_clipcap import ClipCapConfig, check_config_sizes
from .damage_clipcap import is_finite_number, load_config, named, naming
from .donors_clipcap import donor_record, leaving_out_frozen, remember_donors, verify_donors, with_donors
from .modeling_text import caption_generation_config, load_language_model, load_tokenizer, placeholder_id
from .modeling_vision import load_vision_config, load_vision_tower, vision_feature_dim
from .packages_clipcap import donor_folder
from .versions_clipcap import keep_weights


MOST_BEAMS = 1000  # memory and time grow with the number of beams
_LARGEST_COUNT = 2**31 - 1

# Generation settings by what they hold; transformers itself checks few of them before they are used.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
_COUNTS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"),
    *("num_beams", "num_return_sequences"),
)
_NUMBERS = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_time"),
    *("repetition_penalty", "length_penalty", "guidance_scale"),
)
_FLAGS = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing")

_Captioner = TypeVar("_Captioner", bound="LoadsAndSaves")


class LoadsAndSaves(CaptionerParts):
    """Adds to a captioner `from_pretrained`, `save_pretrained` and `from_vision_text_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        vision_tower: str | None = None,
        language_model: str | None = None,
        **kwargs,
    ):
        r"""
        Load a captioner as transformers does, except that weights must be complete, sound and all used.

        Parts that the checkpoint leaves out (`save_frozen=False`) are loaded from where they came from, and checked.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder.
            vision_tower (`str`, *optional*): Hub id, folder or open_clip name of the vision tower that the checkpoint
                leaves out, if it has moved.
            language_model (`str`, *optional*): Where the language model is, likewise.
            kwargs: As in transformers.

        Raises:
            OSError: If there is no checkpoint, or a part that it leaves out cannot be found.
            ValueError: If weights are missing, left over, damaged, NaN or infinite, or of another shape than the
                configuration says; if `generation_config.json` cannot be read; or if a part that the checkpoint leaves
                out is not the one that it was trained with.
        """
        given = {"vision_tower": vision_tower, "language_model": language_model}
        moved = {part: name for part, name in given.items() if name is not None}
        wants_info = kwargs.get("output_loading_info", False)
        name = pretrained_model_name_or_path
        donors: list = []
        with named(name), naming(f"The weights in {name}"), ThreadPoolExecutor() as beside:
            if name is not None:
                kwargs, donors = with_donors(cls, name, moved, kwargs, beside)
                _check_generation_config(name, kwargs)
            model, info = cls._load_complete(name, model_args, kwargs)
            damaged = _not_finite(model)
            verify_donors(model, donors)
        if damaged:
            raise ValueError(
                f"The weights of {name} are damaged: {len(damaged)} of them hold NaN or infinity, for example "
                f"{damaged[0]}. Copy or download them again; if a training run made them, it diverged."
            )
        model._freeze()  # loading makes new parameters, which require gradients
        return (model, info) if wants_info else model

    @classmethod
    def _load_complete(cls, name, model_args: tuple, kwargs: dict) -> tuple[Any, dict]:
        accepts_mismatch = kwargs.get("ignore_mismatched_sizes", False)  # otherwise reported below, by name
        # Where a checkpoint leaves parts out, all the weights are at hand already.
        source = name if kwargs.get("state_dict") is None else None
        loaded: Any = super().from_pretrained(
            source, *model_args, **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
        model, info = loaded
        if source is None and name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
        problems = []
        if missing := sorted(info["missing_keys"]):
            problems.append(f"{len(missing)} are missing, for example {missing[0]}")
        if left_over := sorted(info["unexpected_keys"]):
            problems.append(f"{len(left_over)} have no place in the model, for example {left_over[0]}")
        if (mismatched := sorted(info["mismatched_keys"])) and not accepts_mismatch:
            key, found, expected = mismatched[0]
            problems.append(
                f"{len(mismatched)} have another shape, for example {key} {tuple(found)} where the configuration asks "
                f"for {tuple(expected)}"
            )
        if problems:
            raise ValueError(
                f"The weights of {name} do not fit its configuration: {' and '.join(problems)}. Does config.json "
                f"belong to these weights (mapping_type is {model.config.mapping_type!r}, prefix_length "
                f"{model.config.prefix_length})?"
            )
        return model, info

    def save_pretrained(self, save_directory, *args, save_frozen: bool | None = None, **kwargs):
        r"""
        Save as transformers does; frozen parts may be left out, which makes a checkpoint of a few megabytes.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            save_frozen (`bool`, *optional*): With `False`, each part of which nothing is trained and whose donor is
                known (`config.donors`) is not saved: the checkpoint says where it comes from, with its revision and a
                hash of its weights. A part without a donor, or one that differs from its donor, is saved all the same.
                The default is `config.save_frozen`; set that for `Trainer` and `push_to_hub`.
            args, kwargs: As in transformers.

        Raises:
            OSError: If the weights cannot be written, for example to a full disk.
        """
        with leaving_out_frozen(self, self.config.save_frozen if save_frozen is None else save_frozen):
            try:
                return super().save_pretrained(save_directory, *args, **kwargs)
            except SafetensorError as error:  # of a full disk
                raise OSError(f"The weights could not be written to {save_directory}: {error}") from error

    @staticmethod
    def _load_donor(part: str, name: str, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
        load = load_vision_tower if part == "vision_tower" else load_language_model
        return load(donor_folder(name), dtype, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls: type[_Captioner],
        vision: str | PreTrainedModel | None,
        text: str | PreTrainedModel,
        dtype: torch.dtype | str = torch.float32,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config_kwargs,
    ) -> _Captioner:
        r"""
        Start a captioner from a pretrained vision tower and a pretrained language model, with a new mapping network.

        Args:
            vision (`str`, [`~transformers.PreTrainedModel`] or `None`): A Hub id or folder of transformers
                (`"openai/clip-vit-base-patch32"`), an open_clip checkpoint (`"ViT-B-32/openai"`, `"hf-hub:ORG/REPO"`
                or a folder with `open_clip_config.json`; its plain ViTs become `CLIPVisionModelWithProjection`), a
                loaded model, or `None` to caption from embeddings alone.
            text (`str` or [`~transformers.PreTrainedModel`]): A Hub id, folder or loaded model of a causal LM, or
                `"package:NAME"`, the folder of an installed Python package.
            dtype (`torch.dtype`): Type of the parts that are loaded by name; the mapping network takes the language
                model's. Train in `torch.float32`, whatever type the parts were saved in.
            vision_kwargs (`dict`, *optional*): For the tower's `from_pretrained` (`revision`, `token`, ...).
            text_kwargs (`dict`, *optional*): For the language model's (`revision`, `token`, `gguf_file`, ...).
            config_kwargs: Fields of [`ClipCapConfig`]: `mapping_type`, `prefix_length`, `freeze_language_model`, ...

        Raises:
            TypeError: If a name in `config_kwargs` is not a field.
            ValueError: If the parts do not fit each other or the configuration.

        Example:

        ```python
        >>> model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        ...     "openai/clip-vit-base-patch32", "openai-community/gpt2", mapping_type="mlp"
        ... )  # doctest: +SKIP

        ```
        """
        _check_fields(config_kwargs)
        tower = _Part.of("vision_tower", vision, vision_kwargs)
        language_model = _Part.of("language_model", text, text_kwargs)
        # Configurations first, so that parts that do not fit are found before any weights are loaded.
        config_kwargs = _check_fit(tower, language_model, config_kwargs)
        tokenizer = language_model.tokenizer()
        if tokenizer is not None:
            config_kwargs.setdefault("image_token_id", placeholder_id(tokenizer))
        if tower.name is not None:
            tower.kwargs["vision_feature"] = config_kwargs.get("vision_feature", "pooled")
        donors = {part.part: part.load(cls._load_donor, dtype) for part in (tower, language_model) if part.name}
        return cls._assemble(tower.model, language_model.model, tokenizer, donors or None, config_kwargs)

    @classmethod
    def _assemble(cls, vision_tower, language_model, tokenizer, donors: dict | None, config_kwargs: dict):
        # Copies: a new configuration resets the attention implementation of those that it is given.
        config = ClipCapConfig(
            vision_config=None if vision_tower is None else copy.deepcopy(vision_tower.config),
            text_config=copy.deepcopy(language_model.config),
            donors=donors,
            **config_kwargs,
        )
        for part in filter(None, (vision_tower, language_model)):
            keep_weights(part)
        model = cls(config, vision_tower=vision_tower, language_model=language_model)
        model.mapping_network.to(next(language_model.parameters()).dtype)
        model.generation_config = caption_generation_config(language_model, config, tokenizer)
        remember_donors(model)
        return model


@dataclass
class _Part:
    """A vision tower or language model: a loaded model, or a name to load it by, or neither."""

    part: str  # "vision_tower" or "language_model"
    name: str | None
    model: PreTrainedModel | None
    kwargs: dict[str, Any]
    config: PreTrainedConfig | None

    @classmethod
    def of(cls, part: str, given: Any, kwargs: dict | None) -> "_Part":
        is_tower = part == "vision_tower"
        argument = "vision" if is_tower else "text"
        kwargs = dict(kwargs or {})
        given = os.fspath(given) if isinstance(given, os.PathLike) else given
        if isinstance(given, str):
            config = (
                load_vision_config(donor_folder(given), **kwargs) if is_tower else _load_text_config(given, kwargs)
            )
            return cls(part, given, None, kwargs, config)
        if isinstance(given, PreTrainedModel) or (given is None and argument == "vision"):
            return cls(part, None, given, kwargs, getattr(given, "config", None))
        raise TypeError(f"`{argument}` must be the name or folder of a model, or a loaded model, got {given!r}.")

    def tokenizer(self):
        """Load the tokenizer of a language model that is given by name; `None` if it has none."""
        return None if self.name is None else load_tokenizer(donor_folder(self.name), self.config, **self.kwargs)

    def load(self, load_donor, dtype: torch.dtype | str) -> dict[str, Any]:
        """Load the weights.

        Returns:
            `dict`: What `config.donors` says of the part.
        """
        known = {"config": self.config} if self.part == "language_model" else {}
        self.model = load_donor(self.part, self.name, dtype, **known, **self.kwargs)
        return donor_record(self.name, self.model.dtype, self.kwargs)


def _check_fit(tower: _Part, language_model: _Part, config_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check that the parts fit each other, and add the tower's embedding width to the configuration's fields."""
    config_kwargs = dict(config_kwargs)
    if tower.config is not None and config_kwargs.get("clip_embed_dim") is None:
        feature = config_kwargs.get("vision_feature", "pooled")
        config_kwargs["clip_embed_dim"] = vision_feature_dim(tower.config, feature)
    ClipCapConfig(
        vision_config=copy.deepcopy(tower.config), text_config=copy.deepcopy(language_model.config), **config_kwargs
    )
    return config_kwargs


def _check_fields(config_kwargs: dict):
    """Refuse names that are not fields, which would be saved in `config.json`: misspelt ones, access tokens."""
    known = ["attn_implementation", *(field.name for field in dataclasses.fields(ClipCapConfig))]
    for name in config_kwargs:
        if name not in known:
            near = difflib.get_close_matches(name.removeprefix("torch_"), [*known, "dtype"], n=1)
            raise TypeError(
                f"ClipCapConfig has no field `{name}`"
                + (f"; did you mean `{near[0]}`? " if near else ". ")
                + "Arguments for loading a part (`token`, `revision`, ...) go into `vision_kwargs` or `text_kwargs`."
            )


def _load_text_config(name: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    try:
        # Unless told otherwise, transformers asks on standard input whether to run a repository's code.
        config = load_config(donor_folder(name), **{"trust_remote_code": False, **kwargs})
    except OSError as error:
        raise OSError(f"Could not load the language model {name!r}: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
            raise ValueError(
                f"{name} is a `{config.model_type}`, which is not a causal language model: choose another one."
            )
    check_config_sizes(f"language model {name}", config.get_text_config())
    return config


def _check_generation_config(name: str | os.PathLike, kwargs: dict[str, Any]):
    """Refuse a `generation_config.json` that cannot be read; transformers would silently use its defaults."""
    if kwargs.get("generation_config") is not None:
        return
    hub_arguments = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
    hub_kwargs = {key: kwargs[key] for key in hub_arguments if kwargs.get(key) is not None}
    path = cached_file(
        name,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
    if path is None:
        return
    try:
        with open(path, encoding="utf-8") as file:
            settings = GenerationConfig.from_dict(dict(json.load(file)))
        _check_settings(settings)
    except Exception as error:  # of any kind: transformers checks the values by using them
        raise ValueError(f"{path} cannot be read as generation settings ({error}): fix it, or delete it.") from error


def _check_settings(settings: GenerationConfig):
    for name in (*_TOKEN_IDS, *_COUNTS, *_NUMBERS, *_FLAGS):
        value = getattr(settings, name, None)
        if value is None:
            continue
        if name in _FLAGS:
            wanted, good = "true or false", isinstance(value, bool)
        elif name in _NUMBERS:
            wanted, good = "a finite number", is_finite_number(value)
        elif name in _COUNTS:
            beams = name in ("num_beams", "num_return_sequences")
            low, high = (1, MOST_BEAMS) if beams else (0, _LARGEST_COUNT)
            wanted, good = f"a whole number from {low} to {high}", _is_whole(value) and low <= value <= high
        else:
            ids = value if isinstance(value, list) and value else [value]
            wanted = "the number of a token" + (" or a list of such" if name == "eos_token_id" else "")
            good = all(_is_whole(token) and abs(token) <= _LARGEST_COUNT for token in ids)  # -1 is none, for some
        if not good:
            raise ValueError(f"`{name}` must be {wanted}, got {str(value)[:80]}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _not_finite(model: PreTrainedModel) -> list[str]:
    """Name the weights that hold NaN or infinity, which a captioner may turn into fluent captions."""
    checked = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [
        key
        for key, weight in model.named_parameters()
        if weight.dtype in checked and not weight.is_meta and weight.numel()
        if not torch.stack(torch.aminmax(weight.detach())).isfinite().all()
    ]
