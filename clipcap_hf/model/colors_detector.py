"""Colours on photographs: of the ground and of the main thing, by their everyday names."""

import torch
from torch.nn import functional as F


# Shares of the lower half of an image: grass, snow and water have these colours.
GROUNDS = ("green", "white", "blue")
COLORS = ("black", "white", "gray", "brown", "red", "orange", "yellow", "green", "blue", "purple")
_SIDE = 32


def hue_saturation_value(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert RGB (..., 3) from 0 to 1 to hue in degrees, saturation and value, each (...)."""
    red, green, blue = pixels.unbind(-1)
    value, lowest = pixels.amax(-1), pixels.amin(-1)
    spread = value - lowest + 1e-9
    hue = torch.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4)
    hue = torch.where(value == red, ((green - blue) / spread) % 6, hue)
    return 60 * hue, spread / (value + 1e-9), value


def name_colors(pixels: torch.Tensor) -> torch.Tensor:
    """Return the index in `COLORS` (...) of RGB colours (..., 3)."""
    hue, saturation, value = hue_saturation_value(pixels)
    reddish = (hue < 45) | (hue > 340)
    hues = torch.tensor([65.0, 165.0, 260.0], device=pixels.device)
    index = COLORS.index("yellow") + torch.bucketize(hue.contiguous(), hues)
    is_red = (hue < 12) | (hue > 340)
    bright = torch.where(is_red, COLORS.index("red"), COLORS.index("orange"))
    warm = torch.where((value < 0.75) | (saturation < 0.5), COLORS.index("brown"), bright)
    index = torch.where(reddish, warm, index)
    pale = torch.where(value > 0.6, COLORS.index("white"), COLORS.index("gray"))
    index = torch.where(saturation < 0.15, pale, index)
    return torch.where(value < 0.25, COLORS.index("black"), index)


def describe_colors(pixels: torch.Tensor, boxes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """
    Describe the colours of images as (batch, 3 + 10): shares of `GROUNDS`, then 1 for the thing's one of `COLORS`.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB from 0 to 1.
        boxes (`torch.Tensor` of shape `(batch, 4)`): Edges of the box of the main thing, as fractions of the image.
        known (`torch.Tensor` of shape `(batch,)`): Whether there is such a thing.
    """
    small = F.adaptive_avg_pool2d(pixels, _SIDE).permute(0, 2, 3, 1)
    hue, saturation, value = hue_saturation_value(small[:, _SIDE // 2 :])
    grounds = (
        (hue > 50) & (hue < 160) & (saturation > 0.18) & (value > 0.15),
        (saturation < 0.15) & (value > 0.7),
        (hue > 170) & (hue < 250) & (saturation > 0.15),
    )
    shares = torch.stack([ground.float().mean((1, 2)) for ground in grounds], dim=1)
    # The middle of the box shows less of the background.
    centers, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 4
    first = ((centers - halves) * _SIDE).long().clamp(0, _SIDE - 1)
    last = torch.maximum(((centers + halves) * _SIDE).long(), first + 1)
    middles = [
        image[top:bottom, left:right].mean((0, 1))
        for image, (left, top), (right, bottom) in zip(small, first.tolist(), last.tolist())
    ]
    colors = F.one_hot(name_colors(torch.stack(middles)), len(COLORS)) * known[:, None]
    return torch.cat([shares, colors.to(shares.dtype)], dim=1)
