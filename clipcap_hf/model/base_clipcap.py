"""What the mixins of a captioner count on: its parts, by name and type."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_clipcap import ClipCapConfig


class CaptionerParts(PreTrainedModel):
    """Declares the parts of a captioner, and the methods that its mixins call on each other."""

    config: ClipCapConfig
    generation_config: GenerationConfig
    vision_tower: PreTrainedModel | None
    mapping_network: nn.Module
    language_model: PreTrainedModel
    _donor_hashes: dict[str, str]  # of the parts that are known to equal their donors

    get_image_features: Callable[..., BaseModelOutputWithPooling]
    get_clip_embeds: Callable[[torch.Tensor], torch.Tensor]
    get_placeholder_mask: Callable[..., torch.Tensor]
    _check_placeholders: Callable[[torch.Tensor, torch.Tensor], None]
    _load_donor: ClassVar[Callable[..., PreTrainedModel]]


__all__ = ["CaptionerParts"]
