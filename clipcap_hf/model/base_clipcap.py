"""The base class of captioners: the parts that each has, and how new weights start."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_clipcap import ClipCapConfig
from .modeling_mapping import ClipCapTransformerMappingNetwork
from .versions_clipcap import CACHE


class ClipCapPreTrainedModel(PreTrainedModel):
    config: ClipCapConfig
    generation_config: GenerationConfig
    vision_tower: PreTrainedModel | None
    mapping_network: nn.Module
    language_model: PreTrainedModel
    # Methods of `ClipCapForConditionalGeneration` that its mixins call.
    get_image_features: Callable[..., BaseModelOutputWithPooling]
    get_placeholder_mask: Callable[..., torch.Tensor]
    _check_placeholders: Callable[[torch.Tensor, torch.Tensor], None]
    _load_donor: ClassVar[Callable[..., PreTrainedModel]]

    base_model_prefix = ""
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = {"ClipCapMappingLayer"}
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _donor_hashes: dict[str, str]  # of the parts that are known to equal their donors

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Only the mapping network is ours to initialise; as in the official code it starts from torch's defaults.
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, ClipCapTransformerMappingNetwork):
            init.normal_(module.prefix_const)
        else:
            super()._init_weights(module)


__all__ = ["ClipCapPreTrainedModel"]
