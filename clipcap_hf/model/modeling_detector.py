"""A vision tower made of an object detector: which things a photograph shows, how many and how large."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .colors_detector import describe_colors
from .configuration_detector import DetectorVisionConfig


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvLayer(nn.Sequential):
    """A convolution of odd kernel size that keeps the resolution at stride 1, and a leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.LeakyReLU(0.1))


class CspBlock(nn.Sequential):
    """Halve the channels and convolve them; pass on both halves, (batch, channels, height, width) as before."""

    def __init__(self, channels: int):
        super().__init__(ConvLayer(channels, channels // 2), ConvLayer(channels // 2, channels // 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        reduce, convolve = self
        reduced = reduce(features)
        return torch.cat([convolve(reduced), reduced], dim=1)


class CspStage(nn.Module):
    """
    A stage of a cross-stage partial network (Wang et al. 2019, arXiv 1911.11929).

    Its blocks pass on what they read together with what they computed, (batch, in, height, width) to
    (batch, 2 * in, height / stride, width / stride).
    """

    def __init__(self, channels: int, depth: int, stride: int):
        super().__init__()
        self.first = ConvLayer(channels, channels, stride)
        self.blocks = nn.ModuleList(CspBlock(channels) for _ in range(depth))
        self.last = ConvLayer(channels, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        first = features = self.first(features)
        for block in self.blocks:
            features = block(features)
        return torch.cat([self.last(features), first], dim=1)


class PathAggregation(nn.Module):
    """The neck: three resolutions of features exchange what they know, from coarse to fine and back."""

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + _resize_like(levels[level], levels[level - 1])
        for level in range(1, len(levels)):
            levels[level] = levels[level] + _resize_like(levels[level - 1], levels[level])
        return levels


def _resize_like(features: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.interpolate(features, size=other.shape[-2:], mode="bilinear", align_corners=False)


def decode_boxes(distances: torch.Tensor, grid: tuple[int, int], num_bins: int) -> torch.Tensor:
    """
    Compute the boxes (batch, locations, 4): left, top, right and bottom edge, as fractions of the image.

    Args:
        distances (`torch.Tensor` of shape `(batch, 4 * num_bins, height, width)`): Logits of the bins of the distances
            from the middle of each cell to the four edges. The expected bin is the distance in cells.
        grid (`tuple[int, int]`): Height and width of the grid of cells.
        num_bins (`int`): Number of bins of each distance.
    """
    height, width = grid
    bins = torch.arange(num_bins, dtype=distances.dtype, device=distances.device)
    left, top, right, bottom = (
        (distances.flatten(2).unflatten(1, (4, num_bins)).softmax(2) * bins[:, None]).sum(2).unbind(1)
    )
    rows = torch.arange(height, dtype=distances.dtype, device=distances.device).repeat_interleave(width) + 0.5
    columns = torch.arange(width, dtype=distances.dtype, device=distances.device).repeat(height) + 0.5
    edges = [(columns - left) / width, (rows - top) / height, (columns + right) / width, (rows + bottom) / height]
    return torch.stack(edges, dim=-1).clamp(0, 1)


def suppress_doubles(boxes: torch.Tensor, classes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """
    Tell which boxes (batch, boxes) to keep: of two boxes that show the same thing, the one with the higher score.

    Args:
        boxes (`torch.Tensor` of shape `(batch, boxes, 4)`): Edges, in order of falling score.
        classes (`torch.Tensor` of shape `(batch, boxes)`): Index of each box's class.
        iou_threshold (`float`): Intersection over union from which two boxes show the same thing.
    """
    upper = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    lower = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (lower - upper).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    union = area[:, :, None] + area[:, None, :] - shared
    doubles = (shared > iou_threshold * union) & (classes[:, :, None] == classes[:, None, :])
    keep = torch.ones_like(classes, dtype=torch.bool)
    for index in range(1, classes.shape[1]):
        keep[:, index] = ~(doubles[:, index, :index] & keep[:, :index]).any(-1)
    return keep


def summarize_detections(
    scores: torch.Tensor, boxes: torch.Tensor, evidence: torch.Tensor, config: DetectorVisionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Put what was found into embeddings (batch, 3 * num_classes + num_scenes).

    They hold each class's score, count (in fours, 8 at most) and size (the square root of the share of the image under
    its best box), then each scene's probability. A box gains by the classifier's belief in its class, and of boxes of
    whatever class on one place only the best is left. A class that the classifier is sure of needs no box. The box of
    the main thing (batch, 4), the likeliest and largest but for the first class, persons, and whether there is one
    (batch,), are returned as well.

    Args:
        scores (`torch.Tensor` of shape `(batch, locations, num_classes)`): Between 0 and 1.
        boxes (`torch.Tensor` of shape `(batch, locations, 4)`): The box at each location.
        evidence (`torch.Tensor` of shape `(batch, num_classes + num_scenes)`): The classifier's probabilities.
        config ([`DetectorVisionConfig`]): Its thresholds.
    """
    belief, scenes = evidence.split([config.num_classes, config.num_scenes], dim=1)
    belief = config.classifier_weight * belief
    top = min(config.max_detections, scores.shape[1] * scores.shape[2])
    found, places = scores.flatten(1).topk(top)
    found = found * (found > config.candidate_threshold)
    locations, classes = places // config.num_classes, places % config.num_classes
    # Boxes that the detector hardly believes in gain less.
    found = found + (1 - found) * belief.gather(1, classes) * (found / config.score_threshold).clamp(max=1)
    found, order = found.sort(dim=1, descending=True)
    locations, classes = locations.gather(1, order), classes.gather(1, order)
    boxes = boxes.gather(1, locations.unsqueeze(-1).expand(-1, -1, 4))
    keep = suppress_doubles(boxes, torch.zeros_like(classes), config.iou_threshold) & (found > config.score_threshold)

    score = torch.zeros_like(belief).scatter_reduce(1, classes, found * keep, "amax")
    best = score.gather(1, classes)
    count = torch.zeros_like(score).scatter_add(1, classes, (keep & (found >= 0.65 * best)).to(score.dtype))
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    size = torch.zeros_like(score).scatter_reduce(1, classes, side * (keep & (found == best)), "amax")
    # Without a box, take the thing for a single one of middling size.
    no_box = (score == 0) & (belief > config.score_threshold)
    score = torch.where(no_box, belief, score)
    count = torch.where(no_box, 1.0, count).clamp(max=8) / 4
    size = torch.where(no_box, 0.4, size)
    main, place = (found * side * keep * (classes != 0)).max(1)
    box = boxes[torch.arange(len(boxes), device=boxes.device), place]
    return torch.cat([score, count, size, scenes * (scenes > 0.03)], dim=-1), box, main > 0


def _new_classifier(config: DetectorVisionConfig) -> nn.Module:
    try:
        from timm import create_model
    except ImportError as error:
        raise ImportError("This model needs timm for its image classifier: `pip install timm`.") from error
    return create_model(config.classifier, pretrained=False, num_classes=config.num_classifier_classes)


class DetectorVisionModel(PreTrainedModel):
    r"""
    The object detector NanoDet-g (RangiLyu 2021, Apache-2.0), whose findings are the image embedding.

    What the embedding holds can be read off a caption as well ("two dogs on a beach" is a count and a scene), so a
    captioner can learn from text alone. An image classifier of timm helps, if the configuration names one: its classes
    support the detector's, and tell scenes for which there are no boxes.

    It takes `pixel_values` (batch, 3, height, width): RGB, normalised by ImageNet's mean and deviation. It gives
    a `pooler_output` (batch, hidden_size), see [`summarize_detections`] and [`describe_colors`], and a
    `last_hidden_state` (batch, neck_width, height / 32, width / 32), the coarsest level of the neck. Parameters
    of the classifier: `classifier`, and `class_map` (num_classifier_classes, num_classes + num_scenes), 1 where a
    class shows an object or a scene.
    """

    config: DetectorVisionConfig
    config_class = DetectorVisionConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: DetectorVisionConfig):
        super().__init__(config)
        self.stem = ConvLayer(3, config.width, stride=2)
        widths = [config.width * 2**stage for stage in range(len(config.depths))]
        self.stages = nn.ModuleList(
            CspStage(width, depth, stride=1 if stage == 0 else 2)
            for stage, (width, depth) in enumerate(zip(widths, config.depths))
        )
        self.neck = PathAggregation([2 * width for width in widths[-3:]], config.neck_width)
        outputs = config.num_classes + 4 * config.num_bins
        self.heads = nn.ModuleList(
            nn.Sequential(ConvLayer(config.neck_width, config.neck_width), nn.Conv2d(config.neck_width, outputs, 1))
            for _ in range(3)
        )
        if config.classifier:
            self.classifier = _new_classifier(config)
            self.class_map = nn.Parameter(
                torch.zeros(config.num_classifier_classes, config.num_classes + config.num_scenes)
            )
        self.post_init()

    def detect(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look for objects.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Preprocessed images.

        Returns:
            Scores (batch, locations, num_classes), boxes (batch, locations, 4) as fractions of the image, and the
            coarsest features.
        """
        features = F.max_pool2d(self.stem(pixel_values.to(self.dtype)), 3, stride=2, padding=1)
        pyramid = []
        for stage in self.stages:
            features = stage(features)
            pyramid.append(features)
        levels = self.neck(pyramid[-3:])
        scores, boxes = [], []
        for head, level in zip(self.heads, levels):
            logits, distances = head(level).float().split([self.config.num_classes, 4 * self.config.num_bins], dim=1)
            scores.append(logits.sigmoid().flatten(2).transpose(1, 2))
            boxes.append(decode_boxes(distances, level.shape[-2:], self.config.num_bins))
        return torch.cat(scores, dim=1), torch.cat(boxes, dim=1), levels[-1]

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute how probable each object and scene is (batch, num_classes + num_scenes), by the classifier.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB from 0 to 1.
        """
        config = self.config
        if not config.classifier:
            return pixels.new_zeros(len(pixels), config.num_classes + config.num_scenes)
        size = (config.classifier_size, config.classifier_size)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        # The classifier was trained with mean and deviation 0.5.
        probabilities = self.classifier((2 * pixels - 1).to(self.dtype)).float().softmax(-1)
        return (probabilities @ self.class_map.float()).clamp(max=1)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        scores, boxes, features = self.detect(pixel_values)
        mean, std = (features.new_tensor(values)[:, None, None].float() for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = pixel_values.float() * std + mean
        embeds, box, known = summarize_detections(scores, boxes, self.classify(pixels), self.config)
        if self.config.use_colors:
            embeds = torch.cat([embeds, describe_colors(pixels, box, known)], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=embeds.to(self.dtype))


__all__ = ["DetectorVisionModel"]
