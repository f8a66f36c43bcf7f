"""LoRA adapters on the language model (Hu et al. 2021, arXiv 2106.09685), made by PEFT."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from .base_clipcap import CaptionerParts
from .versions_clipcap import keep_weights, mark_adapted


def add_lora(language_model: PreTrainedModel, lora: dict[str, Any]):
    """Add new LoRA adapters, which change nothing yet, to a language model and freeze its own weights.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): The language model.
        lora (`dict`): Arguments of `peft.LoraConfig`. Without `target_modules` PEFT chooses by the kind of model.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the arguments are wrong for PEFT or for this language model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("This captioner has LoRA adapters (`config.lora`): `pip install peft`.") from error
    for name in ("modules_to_save", "trainable_token_indices"):
        if lora.get(name):
            raise ValueError(f"`lora` trains the adapters only: leave `{name}` out.")
    if lora.get("bias", "none") != "none":
        raise ValueError("`lora` trains the adapters only: leave `bias` out.")
    if lora.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"`init_lora_weights` = {lora['init_lora_weights']!r} changes the language model's own weights, which "
            "`lora` must not: leave it out."
        )
    before = set(language_model.modules())
    try:
        inject_adapter_in_model(LoraConfig(**lora), language_model)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lora` does not suit a `{language_model.config.model_type}`: {error} Pass arguments of peft.LoraConfig."
        ) from error
    ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    if language_model.config.tie_word_embeddings and any(hasattr(end, "lora_A") for end in ends):
        raise ValueError(
            "`lora` adapts the embeddings or the head, which share their weights in this language model and would no "
            "longer do so: leave both out of `target_modules`."
        )
    for module in set(language_model.modules()) - before:
        keep_weights(module)  # the model's own rules would draw the second matrix, which starts as zeros
    mark_adapted(language_model, True)
    freeze_beside_lora(language_model)


def save_lora(language_model: PreTrainedModel, folder: str | os.PathLike):
    """Save the adapters alone, in PEFT's format, for `peft.PeftModel.from_pretrained`.

    `language_model.save_pretrained(folder)` does the same, but from transformers 5.24 on it needs PEFT 0.22.
    """
    try:  # as in `merge_lora`
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("This captioner has LoRA adapters: `pip install peft`.") from error

    (config,) = language_model.peft_config.values()
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(language_model)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def freeze_beside_lora(language_model: PreTrainedModel):
    """Train the adapters only."""
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


class MergesLora(CaptionerParts):
    """Adds `merge_lora` to a captioner."""

    def merge_lora(self):
        """Merge the LoRA adapters into the language model's weights; captions stay the same, up to rounding.

        The language model then differs from the one that was loaded, so checkpoints hold it.
        """
        if self.config.lora is None:
            raise ValueError("This captioner has no LoRA adapters (`config.lora` is None).")
        merge_lora(self.language_model)
        self.config.lora = None
        (self.config.donors or {}).pop("language_model", None)


def merge_lora(language_model: PreTrainedModel):
    """Merge the adapters into the weights that they adapt, and remove them."""
    try:  # outside of `try`, everybody who loads this as remote code would need PEFT
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("This captioner has LoRA adapters: `pip install peft`.") from error

    adapted = {name: layer for name, layer in language_model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in adapted.items():
        layer.merge(safe_merge=True)
        language_model.set_submodule(name, layer.get_base_layer())
    mark_adapted(language_model, False)
    del language_model.peft_config
