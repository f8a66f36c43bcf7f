"""X-CLIP's video encoder, which transformers offers only together with the text encoder."""

import copy

import torch
from torch import nn
from transformers import XCLIPVisionConfig, XCLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.x_clip.modeling_x_clip import XCLIPMultiframeIntegrationTransformer, XCLIPPreTrainedModel
from transformers.utils import can_return_tuple


class XCLIPVideoModel(XCLIPPreTrainedModel):
    r"""
    Embed videos as [`~transformers.XCLIPModel.get_video_features`] does.

    Takes `pixel_values` (batch, frames, 3, height, width) with `config.num_frames` frames, and returns `pooler_output`
    (batch, `config.mit_hidden_size`). Loads from the repository of a complete X-CLIP.

    Raises:
        ValueError: If `pixel_values` are single images, or have another number of frames.
    """

    config: XCLIPVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("video",)

    def __init__(self, config: XCLIPVisionConfig):
        super().__init__(config)
        self.vision_model = XCLIPVisionModel(config)
        # The projection feeds the integration transformer, so it has that transformer's width.
        self.visual_projection = nn.Linear(config.hidden_size, config.mit_hidden_size, bias=False)
        mit_config = copy.copy(config)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            setattr(mit_config, name, getattr(config, f"mit_{name}"))
        self.mit = XCLIPMultiframeIntegrationTransformer(mit_config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        frames = self.config.num_frames
        if pixel_values.ndim != 5 or pixel_values.shape[1] != frames:
            raise ValueError(
                f"X-CLIP takes videos of {frames} frames, (batch, {frames}, 3, height, width), got "
                f"{tuple(pixel_values.shape)}: pass `videos=` and `num_frames={frames}` to the processor."
            )
        frame_embeds = self.vision_model(pixel_values=pixel_values.flatten(0, 1), **kwargs).pooler_output
        frame_embeds = self.visual_projection(frame_embeds).unflatten(0, (-1, frames))
        return self.mit(frame_embeds)


__all__ = ["XCLIPVideoModel"]
