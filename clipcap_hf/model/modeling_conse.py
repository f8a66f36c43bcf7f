"""ConSE: a vision tower made of an image classifier and the text embeddings of its class names."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple


@strict
class ConseVisionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ConseVisionModel`].

    Args:
        classifier (`str`): Name of the image classifier in timm.
        num_classes (`int`): Number of classes of the classifier.
        embed_dim (`int`): Width of the image embedding and of the class names' text embeddings.
        top_k (`int`): Number of most probable classes that make up the image embedding.
        temperature (`float`): Divisor of the classifier's logits before the softmax.
        image_size (`int`): Side of the classifier's training images, in pixels.

    Example:

    ```python
    >>> from clipcap_hf import ConseVisionConfig

    >>> ConseVisionConfig(embed_dim=256).hidden_size
    256

    ```
    """

    model_type = "conse_vision_model"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "embed_dim"}

    classifier: str = "tf_efficientnet_lite0"
    num_classes: int = 1000
    embed_dim: int = 384
    top_k: int = 20
    temperature: float = 1.0
    image_size: int = 224
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not 1 <= self.top_k <= self.num_classes:
            raise ValueError(f"`top_k` must be between 1 and `num_classes` ({self.num_classes}), got {self.top_k}.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")


def embed_by_classes(
    logits: torch.Tensor, class_embeds: torch.Tensor, top_k: int, temperature: float = 1.0
) -> torch.Tensor:
    """Embed images as the probability-weighted mean of the embeddings of their `top_k` most probable classes.

    Takes `logits` (batch, classes) and `class_embeds` (classes, embed_dim); returns (batch, embed_dim) of L2 norm 1.
    """
    probabilities, classes = (logits.float() / temperature).softmax(-1).topk(top_k)
    return F.normalize((probabilities.unsqueeze(-1) * class_embeds[classes].float()).sum(1), dim=-1)


class ConseVisionModel(PreTrainedModel):
    r"""
    Embed images by a convex combination of semantic embeddings (ConSE).

    After Norouzi et al. 2014, "Zero-Shot Learning by Convex Combination of Semantic Embeddings", arXiv 1312.5650. The
    image embedding is the mean of the class names' text embeddings, weighted by a classifier's probabilities. Images
    thus share the space of the texts that describe them, without training on image-text pairs.

    Takes `pixel_values` (batch, 3, height, width), normalised as in the classifier's training, and returns
    `pooler_output` (batch, embed_dim) of L2 norm 1. Parameters: `network`, the timm classifier, and `class_embeds`
    (num_classes, embed_dim).
    """

    config: ConseVisionConfig
    config_class = ConseVisionConfig
    base_model_prefix = "conse"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: ConseVisionConfig):
        super().__init__(config)
        try:
            from timm import create_model
        except ImportError as error:
            raise ImportError("This model needs timm for its image classifier: `pip install timm`.") from error
        self.network = create_model(config.classifier, pretrained=False, num_classes=config.num_classes)
        self.class_embeds = nn.Parameter(torch.empty(config.num_classes, config.embed_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConseVisionModel):
            init.normal_(module.class_embeds, std=self.config.initializer_range)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        logits = self.network(pixel_values.to(self.dtype))
        embeds = embed_by_classes(logits, self.class_embeds, self.config.top_k, self.config.temperature)
        return BaseModelOutputWithPooling(pooler_output=embeds.to(self.dtype))


__all__ = ["ConseVisionConfig", "ConseVisionModel"]
