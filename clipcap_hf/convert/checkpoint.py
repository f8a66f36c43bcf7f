"""Convert official ClipCap checkpoints (`.pt`) to captioners."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from ..files import check_file, listed
from ..model.configuration_clipcap import check_config_sizes
from ..model.damage_clipcap import check_archive, is_expanded, named
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.modeling_vision import load_vision_config, vision_feature_dim


GPT2_FULL_STOP = 13  # the id of "." in the vocabulary of GPT-2
_LANGUAGE_MODEL, _MAPPER = "gpt.", "clip_project."
# Causal masks that transformers once kept in checkpoints. Whole names: `attn.c_attn.bias` is a weight.
_OLD_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
_GPT2_BY_WIDTH = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}

_TRANSFORMER_LAYER = re.compile(r"transformer\.(layers\.\d+)\.([a-z0-9_.]+)\.(weight|bias)")
_TRANSFORMER_LAYER_PARTS = {
    "norm1": "layer_norm1",
    "attn.to_queries": "self_attn.q_proj",
    "attn.project": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_WHOLE_NAMES = {
    "mlp": {"model.0": "fc1", "model.2": "fc2"},
    "linear": {"": "linear"},
    "transformer": {"linear": "clip_projection"},
}


def convert_official_checkpoint(
    path: str | os.PathLike,
    text_config: PreTrainedConfig | str | None = None,
    vision: str | PreTrainedModel | None = None,
    normalize_clip_embeds: bool = False,
    *,
    mapping_num_heads: int = 8,
    stop_token_id: int | None = GPT2_FULL_STOP,
    dtype: torch.dtype = torch.float32,
    vision_kwargs: dict[str, Any] | None = None,
    text_kwargs: dict[str, Any] | None = None,
    **config_kwargs: Any,
) -> ClipCapForConditionalGeneration:
    r"""
    Convert a checkpoint of the official ClipCap code (`torch.save(model.state_dict())` of its `train.py`).

    The tensors' shapes give the kind of mapping network, the embedding width, `prefix_length`, `clip_length` and the
    number of layers. No code in the file is run. The generation configuration follows the official decoders:
    greedy, at most 67 tokens, ending with the first full stop.

    Args:
        path (`str` or `os.PathLike`): The `.pt` file.
        text_config ([`~transformers.PreTrainedConfig`] or `str`, *optional*): Configuration of the language model, or
            Hub id or folder to read it from; GPT-2 small by default. The file does not record the number of attention
            heads or the activation, so these cannot be checked.
        vision (`str` or [`~transformers.PreTrainedModel`], *optional*): The CLIP that the checkpoint was trained with,
            as for [`ClipCapForConditionalGeneration.from_vision_text_pretrained`]; without it the captioner accepts
            only embeddings.
        normalize_clip_embeds (`bool`): Whether it was trained with `--normalize_prefix`. The file does not record it;
            the weights of the transformer notebook were.
        mapping_num_heads (`int`): Number of heads in a transformer mapping. The file does not record it; the official
            code uses 8.
        stop_token_id (`int`, *optional*): Id of the token that ends a caption, by default "." in GPT-2's vocabulary;
            `None` keeps the language model's own end token.
        dtype (`torch.dtype`): Data type of all weights.
        vision_kwargs (`dict`, *optional*): Arguments for loading the tower (`revision`, `token`, ...).
        text_kwargs (`dict`, *optional*): Arguments for loading the language model's configuration.
        config_kwargs: Further fields of [`ClipCapConfig`], for example `freeze_language_model=True`.

    Returns:
        [`ClipCapForConditionalGeneration`]: In evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, holds anything but weights, or holds unknown weights, or if the
            language model or the tower does not fit it.

    Example:

    ```python
    >>> model = convert_official_checkpoint("coco_weights.pt", vision="ViT-B-32/openai")  # doctest: +SKIP

    ```
    """
    with named(path):
        weights = _read_state_dict(Path(path))
        text_weights, mapper_weights = _split(weights, path)
        if not isinstance(text_config, PreTrainedConfig):
            text_config = (
                GPT2Config() if text_config is None else AutoConfig.from_pretrained(text_config, **text_kwargs or {})
            )
        check_config_sizes("language model", text_config)
        if text_config.is_encoder_decoder:
            raise ValueError(
                f"`text_config` must be of a causal language model, but a `{text_config.model_type}` is an "
                "encoder-decoder."
            )
        text_class = _check_text_config(text_weights, text_config)
        mapper_config = _mapper_config(mapper_weights, text_config.get_text_config().hidden_size)
        mapper_weights = _rename_mapper(mapper_weights, mapper_config["mapping_type"])

    if vision is not None:
        if isinstance(vision, str):
            vision_config = load_vision_config(vision, **(vision_kwargs or {}))
        else:
            vision_config = vision.config
        _check_tower(vision_feature_dim(vision_config, "pooled"), mapper_config["clip_embed_dim"])
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        vision,
        _load_language_model(text_class, text_config, text_weights, dtype),
        dtype=dtype,
        vision_kwargs=vision_kwargs,
        normalize_clip_embeds=normalize_clip_embeds,
        **{"mapping_num_heads": mapping_num_heads, **mapper_config, **config_kwargs},
    )
    try:
        model.mapping_network.load_state_dict(mapper_weights)
    except RuntimeError as error:
        raise ValueError(f"The mapping network of {path} is not an official one: {error}") from error
    _stop_as_official(model, stop_token_id)
    return model.eval()


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    check_file(path, "checkpoint")
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip file or a pickle
        raise ValueError(f"{path} is not a PyTorch checkpoint; was a web page saved in place of the file?")
    # For a truncated file, torch suggests `weights_only=False`, as if the file held code.
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends loading the file anyway.
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found and "Unsupported" not in str(error):
            raise ValueError(f"{path} is damaged or cut short: download it again.") from error
        what = f"`{found[1]}`" if found else "something else"
        raise ValueError(
            f"{path} holds more than weights ({what}), and reading that could run code, so it was not read. If you "
            "trust the file, load it where it was made and save the weights alone: `torch.save(model.state_dict(), "
            "PATH)`."
        ) from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path} is damaged or cut short: download it again ({error}).") from error
    _check_is_state_dict(state, path)
    if views := [key for key, value in state.items() if value.layout == torch.strided and is_expanded(value)]:
        raise ValueError(f"{path} is damaged: {listed(views)} are larger than what is stored of them.")
    if all(key.startswith("module.") for key in state):  # saved from DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _check_is_state_dict(state: Any, path: Path):
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict (names and tensors).")
    others = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if not others:
        return
    inner = [key for key in others if _is_weights(state[key])]
    if inner:
        raise ValueError(
            f"{path} is a whole training state ({', '.join(map(str, state))}). Take the weights out of it: "
            f"`torch.save(torch.load(PATH, weights_only=True)[{inner[0]!r}], NEW_PATH)`."
        )
    raise ValueError(f"{path} is not a state dict: {listed(others, 6)} are not tensors.")


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _split(weights: dict[str, torch.Tensor], path: str | os.PathLike) -> tuple[dict, dict]:
    text = {
        key.removeprefix(_LANGUAGE_MODEL): value for key, value in weights.items() if key.startswith(_LANGUAGE_MODEL)
    }
    mapper = {key.removeprefix(_MAPPER): value for key, value in weights.items() if key.startswith(_MAPPER)}
    unknown = [key for key in weights if not key.startswith((_LANGUAGE_MODEL, _MAPPER))]
    if unknown:
        raise ValueError(f"{path} holds weights that the official code does not have: {listed(unknown, 6)}.")
    if not text or not mapper:
        missing = _MAPPER if text else _LANGUAGE_MODEL
        raise ValueError(f"{path} is not an official ClipCap checkpoint: it holds no `{missing}*` weights.")
    text = {key: value for key, value in text.items() if not _OLD_BUFFER.fullmatch(key)}
    for part, prefix in ((text, _LANGUAGE_MODEL), (mapper, _MAPPER)):
        _check_numbers(part, prefix, path)
    return text, mapper


def _check_numbers(weights: dict[str, torch.Tensor], prefix: str, path: str | os.PathLike):
    dense = {key: value.layout == torch.strided and value.is_floating_point() for key, value in weights.items()}
    if odd := [prefix + key for key, is_dense in dense.items() if not is_dense]:
        raise ValueError(
            f"{path} holds sparse, quantised or whole numbers in {listed(odd, 6)}, which no training leaves."
        )
    bad = [prefix + key for key, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} holds NaN or infinity in {listed(bad, 6)}: its training diverged, or the file is damaged."
        )


def _check_text_config(weights: dict[str, torch.Tensor], text_config: PreTrainedConfig) -> type[PreTrainedModel]:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(text_config)
    shapes = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    if text_config.tie_word_embeddings:
        shapes = {key: shape for key, shape in shapes.items() if key in weights or not key.startswith("lm_head")}
    unknown = sorted(set(weights) - set(shapes))
    missing = sorted(set(shapes) - set(weights))
    other = [
        f"{key} is {tuple(weights[key].shape)} and not {shape}"
        for key, shape in shapes.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    if not (unknown or missing or other):
        return type(skeleton)
    faults = [f"{len(other)} of another shape ({listed(other, 2)})"] if other else []
    faults += [f"{len(unknown)} unknown ({listed(unknown, 3)})"] if unknown else []
    faults += [f"{len(missing)} missing ({listed(missing, 3)})"] if missing else []
    embeddings = weights.get("transformer.wte.weight")
    name = None if embeddings is None else _GPT2_BY_WIDTH.get(embeddings.shape[-1])
    hint = f" Its width is that of {name}." if name and other else ""
    raise ValueError(
        f"The checkpoint's language model does not fit the `{text_config.model_type}` of `text_config`; weights: "
        f"{'; '.join(faults)}.{hint} Pass the `text_config` of the language model that it was trained with."
    )


def _load_language_model(
    text_class: type[PreTrainedModel],
    text_config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    weights = {key: value.to(dtype) for key, value in weights.items()}
    # `from_pretrained` without a name skips the random initialisation, which takes longer than everything else.
    model = text_class.from_pretrained(None, config=text_config, state_dict=weights, dtype=dtype)
    # If the file's head differs from its embedding, transformers only warns and leaves them untied.
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if text_config.tie_word_embeddings and head is not embedding:
        raise ValueError(
            "The checkpoint's head differs from its embedding: set `tie_word_embeddings=False` in `text_config`."
        )
    return model


def _mapper_config(weights: dict[str, torch.Tensor], hidden_size: int) -> dict[str, Any]:
    """Return the fields of [`ClipCapConfig`] that describe the mapping network."""

    def vectors(name: str) -> int:
        count, rest = divmod(len(weights[name]), hidden_size)
        if rest or not count:
            raise ValueError(
                f"`{_MAPPER}{name}` has {len(weights[name])} rows, which is no multiple of the language model's "
                f"hidden size {hidden_size}: does `text_config` belong to this checkpoint?"
            )
        return count

    try:
        if "prefix_const" in weights:
            layers = {found[1] for key in weights if (found := _TRANSFORMER_LAYER.fullmatch(key))}
            return {
                "mapping_type": "transformer",
                "clip_embed_dim": weights["linear.weight"].shape[1],
                "prefix_length": len(weights["prefix_const"]),
                "clip_length": vectors("linear.weight"),
                "mapping_num_layers": len(layers),
                "mapping_mlp_ratio": len(weights["transformer.layers.0.mlp.fc1.weight"]) / hidden_size,
            }
        kind, first, last = (
            ("mlp", "model.0.weight", "model.2.weight")
            if "model.0.weight" in weights
            else ("linear", "weight", "weight")
        )
        return {
            "mapping_type": kind,
            "clip_embed_dim": weights[first].shape[1],
            "prefix_length": vectors(last),
        }
    except KeyError as error:
        names = [_MAPPER + key for key in weights]
        raise ValueError(
            f"The mapping network has no `{_MAPPER}{error.args[0]}`, so it is not an official one. It has "
            f"{listed(names, 6)}."
        ) from None


def _rename_mapper(weights: dict[str, torch.Tensor], mapping_type: str) -> dict[str, torch.Tensor]:
    renamed, unknown = {}, []
    for key, value in weights.items():
        part, _, kind = key.rpartition(".")
        layer = _TRANSFORMER_LAYER.fullmatch(key) if mapping_type == "transformer" else None
        if key == "prefix_const" and mapping_type == "transformer":
            renamed[key] = value
        elif part in _WHOLE_NAMES[mapping_type] and kind in ("weight", "bias"):
            renamed[f"{_WHOLE_NAMES[mapping_type][part]}.{kind}"] = value
        elif layer and layer[2] in _TRANSFORMER_LAYER_PARTS:
            renamed[f"{layer[1]}.{_TRANSFORMER_LAYER_PARTS[layer[2]]}.{kind}"] = value
        elif layer and layer[2] == "attn.to_keys_values":
            # Rows are keys first, then values.
            for name, half in zip(("k_proj", "v_proj"), value.chunk(2)):
                renamed[f"{layer[1]}.self_attn.{name}.{kind}"] = half
        else:
            unknown.append(_MAPPER + key)
    if unknown:
        raise ValueError(f"An official `{mapping_type}` mapping network has no weights {listed(unknown, 6)}.")
    return renamed


def _check_tower(tower_dim: int, mapper_dim: int):
    if tower_dim != mapper_dim:
        raise ValueError(
            f"The checkpoint's mapping network takes embeddings of width {mapper_dim}, but `vision` gives "
            f"{tower_dim}. Pass the CLIP that it was trained with (ViT-B/32 gives 512, RN50x4 640)."
        )


def _stop_as_official(model: ClipCapForConditionalGeneration, stop_token_id: int | None):
    generation_config, vocab_size = model.generation_config, model.config.language_config.vocab_size
    generation_config.do_sample = False
    if stop_token_id is None:
        return
    if not 0 <= stop_token_id < vocab_size:
        raise ValueError(f"`stop_token_id` is {stop_token_id}, but the vocabulary has {vocab_size} tokens.")
    generation_config.eos_token_id = stop_token_id
    # The language model also processes padding, so the padding id must be in its vocabulary.
    if generation_config.pad_token_id is None or generation_config.pad_token_id >= vocab_size:
        generation_config.pad_token_id = stop_token_id


__all__ = ["convert_official_checkpoint"]
