"""The mapping networks: they turn a CLIP embedding into the prefix (sections 3.2 and 3.3 of the paper)."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_clipcap import ClipCapConfig


class ClipCapMLPMappingNetwork(nn.Module):
    """Section 3.2 of the paper: two layers with tanh between; the prefix is (batch, prefix_length, hidden)."""

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        self.prefix_length = config.prefix_length
        prefix_size = config.prefix_length * config.language_config.hidden_size
        self.fc1 = nn.Linear(config.clip_embed_dim, prefix_size // 2)
        self.fc2 = nn.Linear(prefix_size // 2, prefix_size)

    def forward(self, clip_embeds: torch.Tensor) -> torch.Tensor:
        prefix = self.fc2(torch.tanh(self.fc1(clip_embeds)))
        return prefix.unflatten(-1, (self.prefix_length, -1))


class ClipCapLinearMappingNetwork(nn.Module):
    """One linear layer, which the official `predict.py` uses for prefixes of more than 10 vectors."""

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        self.prefix_length = config.prefix_length
        hidden_size = config.language_config.hidden_size
        self.linear = nn.Linear(config.clip_embed_dim, config.prefix_length * hidden_size)

    def forward(self, clip_embeds: torch.Tensor) -> torch.Tensor:
        return self.linear(clip_embeds).unflatten(-1, (self.prefix_length, -1))


def eager_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, scaling: float, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by plain matrix products, (batch, heads, tokens, head_dim), for `attn_implementation="eager"`."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ClipCapMappingAttention(nn.Module):
    """Self-attention over all tokens; only the output projection has a bias."""

    is_causal = False

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        hidden_size = config.language_config.hidden_size
        self.config = config
        self.head_dim = hidden_size // config.mapping_num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(self, query, key, value, None, scaling=self.head_dim**-0.5)
        return self.out_proj(attended.flatten(-2))


class ClipCapMappingLayer(GradientCheckpointingLayer):
    """Pre-norm transformer encoder layer with ReLU."""

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        hidden_size = config.language_config.hidden_size
        intermediate_size = int(hidden_size * config.mapping_mlp_ratio)
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=config.mapping_layer_norm_eps)
        self.self_attn = ClipCapMappingAttention(config)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=config.mapping_layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.fc2(F.relu(self.fc1(self.layer_norm2(hidden_states))))


def pool_patches(patches: torch.Tensor, clip_length: int) -> torch.Tensor:
    """Average patch tokens (batch, patches, dim), row by row over the image, to `clip_length` tokens.

    Where both numbers are squares, the square grid of patches is cut into a square grid of cells (adaptive average
    pooling); otherwise the sequence is cut into runs. Up to `clip_length` patches are returned unchanged, so pooling
    twice changes nothing.
    """
    if patches.shape[1] <= clip_length:
        return patches
    side, cells = math.isqrt(patches.shape[1]), math.isqrt(clip_length)
    patches = patches.transpose(1, 2)
    if side**2 == patches.shape[2] and cells**2 == clip_length:
        pooled = F.adaptive_avg_pool2d(patches.unflatten(2, (side, side)), cells).flatten(2)
    else:
        pooled = F.adaptive_avg_pool1d(patches, clip_length)
    return pooled.transpose(1, 2)


class ClipCapTransformerMappingNetwork(nn.Module):
    """Section 3.3 of the paper: a transformer reads the embedding as tokens, and learned constants become the prefix.

    The embedding becomes `clip_length` tokens, followed by `prefix_length` learned constants. The outputs at the
    constants are the prefix (batch, prefix_length, hidden). With `vision_feature="patches"` the tokens are patches, at
    most `clip_length`, each projected on its own.
    """

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        self.tokens_per_embed = 1 if config.vision_feature == "patches" else config.clip_length
        self.prefix_length = config.prefix_length
        hidden_size = config.language_config.hidden_size
        self.clip_projection = nn.Linear(config.clip_embed_dim, self.tokens_per_embed * hidden_size)
        self.prefix_const = nn.Parameter(torch.empty(config.prefix_length, hidden_size))
        self.layers = nn.ModuleList(ClipCapMappingLayer(config) for _ in range(config.mapping_num_layers))

    def forward(self, clip_embeds: torch.Tensor) -> torch.Tensor:
        # (batch, dim) or (batch, patches, dim) to (batch, tokens, hidden)
        clip_tokens = self.clip_projection(clip_embeds).unflatten(-1, (self.tokens_per_embed, -1)).flatten(1, -2)
        # `shape[0]`, since `len()` would fix the batch size in an exported graph
        prefix_const = self.prefix_const.expand(clip_tokens.shape[0], -1, -1)
        hidden_states = torch.cat([clip_tokens, prefix_const], dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states[:, -self.prefix_length :]


MAPPING_NETWORKS = {
    "mlp": ClipCapMLPMappingNetwork,
    "transformer": ClipCapTransformerMappingNetwork,
    "linear": ClipCapLinearMappingNetwork,
}
