"""Export captioners as ONNX graphs, and caption with onnxruntime alone.

transformers' own `OnnxExporter` writes the language model only, without tower and mapping network, hence this file.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .extras import install_hint
from .files import share, whole_folder
from .model.configuration_clipcap import ClipCapConfig, context_length
from .model.modeling_clipcap import ClipCapForConditionalGeneration
from .model.processing_clipcap import ClipCapProcessor
from .model.versions_clipcap import CACHE


ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


class _Encoder(nn.Module):
    """Tower and mapping network, or the mapping network alone if the captioner has no tower."""

    def __init__(self, model: ClipCapForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        name = "clip_embeds" if self.model.vision_tower is None else "pixel_values"
        return self.model.get_image_features(**{name: inputs}, return_dict=True).pooler_output


class _Decoder(nn.Module):
    """One decoding step on a cache of any length; prefix and tokens may each be empty."""

    def __init__(self, language_model: PreTrainedModel):
        super().__init__()
        self.language_model = language_model

    def forward(self, prefix: torch.Tensor, input_ids: torch.Tensor, past: list[torch.Tensor]):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        embeds = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2])):
            cache.update(keys, values, layer)
        past_length, length = past[0].shape[-2], embeds.shape[1]
        positions = past_length + torch.arange(length)
        hidden = torch.arange(past_length + length) > positions.unsqueeze(-1)
        # All rows have the same length, so the mask is the causal one. Built here, it fits any length.
        mask = torch.zeros(hidden.shape, dtype=embeds.dtype).masked_fill(hidden, torch.finfo(embeds.dtype).min)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask[None, None].expand(embeds.shape[0], -1, -1, -1),
            position_ids=positions.unsqueeze(0).expand(embeds.shape[0], -1),
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **{CACHE: cache},
        )
        present = [tensor for layer in outputs[CACHE].layers for tensor in (layer.keys, layer.values)]
        return outputs.logits[:, -1].float(), *present


def export_onnx(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    folder: str | Path,
    int8: bool = False,
) -> Path:
    r"""
    Write a captioner as two ONNX graphs, with everything else that [`OnnxCaptioner`] needs.

    `encoder.onnx` turns `pixel_values` (batch, 3, height, width), or `clip_embeds` (batch, clip_embed_dim) if the
    captioner has no tower, into the prefix (batch, prefix_length, hidden). `decoder.onnx` takes `prefix`, `input_ids`
    (batch, tokens) and `past.0` ... (batch, heads, past, head size), alternating keys and values. It returns the
    `logits` (batch, vocabulary) of the next token, and `present.0` ... for the next call. The first call has a past of
    length 0, later calls have a prefix of length 0. Needs `pip install onnx onnx_ir onnxscript onnxruntime`.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner, in `torch.float32`. It is exported on the CPU,
            without dropout.
        processor ([`ClipCapProcessor`]): Its processor, which is saved next to the graphs.
        folder (`str` or `Path`): Folder to write; must not exist.
        int8 (`bool`): Store the weights of matrix products in 8 bits and quantise activations dynamically.
            `examples/measurements/onnx_speed.py` measures the effect on scores and speed.

    Returns:
        `Path`: The folder.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        ValueError: If the folder exists, the weights are not float32, or the language model caches something other
            than keys and values (Mamba and other recurrent ones).
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another folder")
    if wrong := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ValueError(f"ONNX export is made for float32, but the weights are {wrong.pop()}: load them in float32.")
    _require_onnx()
    was_training, device = model.training, model.device
    with whole_folder(folder) as scratch:
        model.eval().cpu()
        try:
            with torch.no_grad():
                _export_graphs(model, processor, scratch)
        finally:
            model.train(was_training).to(device)
        if int8:
            _quantize(scratch)
        model.config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        processor.save_pretrained(scratch)
    return folder


def _require_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: {install_hint('onnx')}") from error


def _export_graphs(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, folder: Path):
    config = model.config
    batch = torch.export.Dim("batch", min=1, max=4096)
    if model.vision_tower is None:
        patches = (config.clip_length,) if config.vision_feature == "patches" else ()
        name, inputs = "clip_embeds", torch.randn(2, *patches, config.clip_embed_dim)
    else:
        blank = Image.new("RGB", (64, 64))
        name, inputs = "pixel_values", processor.image_processor([blank] * 2, return_tensors="pt")["pixel_values"]
    _export(_Encoder(model), (inputs,), ({0: batch},), [name], ["prefix"], folder / ENCODER)

    # All lengths of the sample differ, so that the exporter confuses none with another.
    prefix = torch.randn(2, 3, config.language_config.hidden_size)
    cache = DynamicCache()
    model.language_model(inputs_embeds=torch.cat([prefix, prefix[:, :2]], 1), use_cache=True, **{CACHE: cache})
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if not layers or any(tensor is None for layer in layers for tensor in layer):
        raise ValueError(
            f"The cache of a `{model.language_model.config.model_type}` does not hold keys and values, which ONNX "
            "export needs."
        )
    past = [tensor for layer in layers for tensor in layer]
    dynamic = (
        {0: batch, 1: torch.export.Dim.DYNAMIC},
        {0: batch, 1: torch.export.Dim.DYNAMIC},
        [{0: batch, 2: torch.export.Dim.DYNAMIC} for _ in past],
    )
    input_names = ["prefix", "input_ids", *(f"past.{index}" for index in range(len(past)))]
    output_names = ["logits", *(f"present.{index}" for index in range(len(past)))]
    tokens = torch.ones(2, 4, dtype=torch.long)
    _export(
        _Decoder(model.language_model), (prefix, tokens, past), dynamic, input_names, output_names, folder / DECODER
    )


def _export(module: nn.Module, inputs: tuple, dynamic: tuple, input_names: list, output_names: list, path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        # Trace here: on its own, the ONNX exporter silently falls back to methods that fix the sizes.
        traced = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)
        program: Any = torch.onnx.export(
            traced, dynamo=True, input_names=input_names, output_names=output_names, verbose=False
        )
    program.save(path, external_data=True)


def _quantize(folder: Path):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in (ENCODER, DECODER):
        # Leave convolutions alone: onnxruntime has no fast kernel for dynamically quantised ones.
        model = onnx.load(folder / name)
        for file in folder.glob(f"{name}*"):
            file.unlink()
        quantize_dynamic(
            model,
            folder / name,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        for file in folder.glob(f"{name}*"):
            share(file)  # onnxruntime makes them readable by their owner only


class OnnxCaptioner:
    r"""
    Caption greedily with onnxruntime, from a folder that [`export_onnx`] wrote.

    The captions are those of `generate(num_beams=1, do_sample=False)`.

    Args:
        folder (`str` or `Path`): The folder with the graphs.
        providers (`list`, *optional*): onnxruntime's execution providers; `["CPUExecutionProvider"]` by default.
        session_options (`onnxruntime.SessionOptions`, *optional*): Number of threads and other settings.

    Example:

    ```python
    >>> captioner = OnnxCaptioner("captioner-onnx")  # doctest: +SKIP
    >>> captioner(["drawing-1.png", "drawing-2.png"])  # doctest: +SKIP
    ['red heart', 'woman running']

    ```
    """

    def __init__(self, folder: str | Path, providers: list | None = None, session_options=None):
        _require_onnx()
        import onnxruntime

        folder = Path(folder)
        if missing := [name for name in (ENCODER, DECODER) if not (folder / name).is_file()]:
            raise ValueError(f"{folder} has no {' and no '.join(missing)}: write it with `clipcap export onnx`.")
        self.config = ClipCapConfig.from_pretrained(folder)
        self.context = context_length(self.config.text_config)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.processor = ClipCapProcessor.from_pretrained(folder)
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / name, session_options, providers or ["CPUExecutionProvider"])
            for name in (ENCODER, DECODER)
        )

    def __call__(
        self,
        images: Iterable | None = None,
        clip_embeds: np.ndarray | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> list[str]:
        """Caption images or embeddings.

        Args:
            images (list of images, paths or URLs, *optional*): Images to caption.
            clip_embeds (`np.ndarray` of shape `(images, clip_embed_dim)`, *optional*): Embeddings to caption, if the
                captioner has no tower.
            prompt (`str`, *optional*): A beginning that every caption continues.
            max_new_tokens (`int`, *optional*): Longest caption, in tokens; by default as in the generation config.
            batch_size (`int`): Images per batch.

        Returns:
            `list[str]`: A caption for each, including the prompt.
        """
        (name,) = (graph_input.name for graph_input in self.encoder.get_inputs())
        rows = {"pixel_values": images, "clip_embeds": clip_embeds}[name]
        if rows is None or (images is not None and clip_embeds is not None):
            raise ValueError(f"This captioner takes {'images' if name == 'pixel_values' else '`clip_embeds`'}.")
        rows = rows if isinstance(rows, np.ndarray) else list(rows)
        captions: list[str] = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            kwargs = (
                {"images": batch} if name == "pixel_values" else {"clip_embeds": torch.as_tensor(np.asarray(batch))}
            )
            inputs = self.processor(text=prompt, return_tensors="np", **kwargs)
            (prefix,) = self.encoder.run(["prefix"], {name: inputs[name].astype(np.float32)})
            ids = inputs["input_ids"].astype(np.int64)
            start_ids, _, prompt_ids = np.split(ids, self._prefix_bounds(ids), axis=1)
            tokens = self.generate(prefix, prompt_ids, max_new_tokens, start_ids=start_ids)
            texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
            captions.extend(text.strip() for text in texts)
        return captions

    def _prefix_bounds(self, input_ids: np.ndarray) -> tuple[int, int]:
        # All rows have the same text, so the placeholders are in the same place.
        start = int((input_ids[0] == self.config.image_token_id).argmax())
        return start, start + self.config.prefix_length

    def generate(
        self,
        prefix: np.ndarray,
        input_ids: np.ndarray,
        max_new_tokens: int | None = None,
        start_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Continue a prefix and a prompt greedily.

        Args:
            prefix (`np.ndarray` of shape `(batch, prefix_length, hidden)`): From `encoder.onnx`.
            input_ids (`np.ndarray` of shape `(batch, prompt)`): Ids of the prompt, which may have length 0.
            max_new_tokens (`int`, *optional*): Longest caption, in tokens; by default as in the generation config.
            start_ids (`np.ndarray` of shape `(batch, start)`, *optional*): Ids of the text before the prefix, which a
                `prompt_template` may have.

        Returns:
            `np.ndarray` of shape `(batch, start + prompt + caption)`: Token ids, padded after the end token.
        """
        if start_ids is None:
            start_ids = input_ids[:, :0]
        max_new_tokens = max_new_tokens or self.generation_config.max_new_tokens
        if max_new_tokens is None:
            raise ValueError("The generation config has no `max_new_tokens`: pass it.")
        given, context = start_ids.shape[1] + prefix.shape[1] + input_ids.shape[1], self.context
        if context is not None and given + max_new_tokens > context:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}, but after {given} tokens of prefix and prompt the language "
                f"model's context of {context} leaves room for {max(context - given, 0)}."
            )
        eos_token_id = self.generation_config.eos_token_id
        end_ids = np.atleast_1d([] if eos_token_id is None else eos_token_id)
        pad_id = self.generation_config.pad_token_id or 0
        past_inputs = self.decoder.get_inputs()[2:]
        past = [np.zeros((len(prefix), p.shape[1], 0, p.shape[3]), np.float32) for p in past_inputs]

        def run_decoder(prefix, ids, past):
            named_past = {past_input.name: values for past_input, values in zip(past_inputs, past)}
            return self.decoder.run(None, {"prefix": prefix, "input_ids": ids, **named_past})

        if start_ids.shape[1]:
            _, *past = run_decoder(prefix[:, :0], start_ids, past)
        sequences, step_ids = np.concatenate([start_ids, input_ids], axis=1), input_ids
        finished = np.zeros(len(prefix), dtype=bool)
        for _ in range(max_new_tokens):
            logits, *past = run_decoder(prefix, step_ids, past)
            step_ids = np.where(finished, pad_id, logits.argmax(-1))[:, None]
            sequences = np.concatenate([sequences, step_ids], axis=1)
            finished |= np.isin(step_ids[:, 0], end_ids)
            if finished.all():
                break
            prefix = prefix[:, :0]
        return sequences


__all__ = ["OnnxCaptioner", "export_onnx"]
