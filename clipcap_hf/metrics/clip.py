"""CLIPScore and RefCLIPScore (Hessel et al., 2021): how well captions fit images, by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
PROMPT = "A photo depicts "
WEIGHT = 2.5  # stretches the cosines of ViT-B/32, which lie in about 0 to 0.4, over 0 to 1
BATCH_SIZE = 64


def check_images(images: Sequence | None, captions: int) -> list:
    """The images as a list, or a ValueError saying what is missing."""
    if images is None or isinstance(images, str):
        raise ValueError("clip_score needs images=[...]: a path, PIL image or bytes for each prediction.")
    if len(images) != captions:
        raise ValueError(f"There are {captions} predictions and {len(images)} images; give one image a prediction.")
    return list(images)


def _open(image):
    """An upright RGB image of a path, PIL image, bytes, or a dict of path and bytes as `datasets` stores them."""
    from PIL import Image

    from ..model.processing_clipcap import load_image

    if isinstance(image, dict):
        image = image["bytes"] or image["path"]
    return load_image(Image.open(BytesIO(image)) if isinstance(image, bytes) else image)


def clip_scores(
    captions: Sequence[str],
    images: Sequence,
    references: Sequence[Sequence[str]] | None = None,
    clip_model: str = DEFAULT_CLIP,
) -> dict:
    """CLIPScore of captions and images, and with references RefCLIPScore; each the mean over images and by image.

    CLIPScore is 2.5 max(cos(caption, image), 0). RefCLIPScore is its harmonic mean with the largest cosine of caption
    and references, max(., 0). All texts get the prompt "A photo depicts " and are cut at the model's length. An empty
    caption scores 0. Runs on a GPU where there is one, in the model's own dtype.

    Args:
        captions: n captions, not tokenized.
        images: n paths, PIL images, bytes, or `{"path": ..., "bytes": ...}`.
        references: n lists of captions, or None.
        clip_model: a CLIP of transformers on the Hub or in a folder, with its tokenizer and image processor, or one of
            open_clip (`"ViT-B-32/openai"`, `"hf-hub:ORG/REPO"`, a folder). The papers' numbers are of the default; those
            of another model cannot be compared with them.

    Returns:
        `clip_score` and perhaps `ref_clip_score`: (mean, array of shape (n,)); `clip_model`, `clip_dtype`: str.

    Raises:
        ValueError: images missing or unreadable, or a model without a text tower.
    """
    import torch

    images = check_images(images, len(captions))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embed_texts, embed_images, dtype = _load_clip(clip_model, device)

    def embed(batch: Sequence, of_text: bool) -> np.ndarray:
        """Unit vectors, shape (batch, width)."""
        features = embed_texts([PROMPT + text for text in batch]) if of_text else embed_images(map(_open, batch))
        features = features.double().cpu().numpy()
        return features / np.linalg.norm(features, axis=-1, keepdims=True)

    def embed_all(items: Sequence, of_text: bool) -> np.ndarray:
        return np.concatenate([embed(batch, of_text) for batch in _batches(items)])

    with torch.inference_mode():
        texts = embed_all(captions, True)
        worded = np.array([bool(caption.strip()) for caption in captions])
        clip = WEIGHT * np.maximum((texts * embed_all(images, False)).sum(1), 0) * worded
        result = {"clip_score": (float(clip.mean()), clip)}
        if references is not None:
            image = np.repeat(np.arange(len(captions)), [len(group) for group in references])
            flat = embed_all([text for group in references for text in group], True)
            closest = np.zeros(len(captions))  # from 0, so that it is max(., 0)
            np.maximum.at(closest, image, (flat * texts[image]).sum(1))
            total = clip + closest
            both = np.divide(2 * clip * closest, total, out=np.zeros_like(total), where=total > 0)
            result["ref_clip_score"] = (float(both.mean()), both)
    return {**result, "clip_model": str(clip_model), "clip_dtype": str(dtype).removeprefix("torch.")}


def _load_clip(name: str, device: str) -> tuple[Callable, Callable, torch.dtype]:
    """Functions that embed texts and PIL images, and the dtype in which they compute."""
    from ..clip import load_text_tower
    from ..model.modeling_open_clip import is_open_clip_name
    from ..model.modeling_vision import embed_pixels, load_vision_tower
    from ..model.processing_clipcap import load_image_processor

    if is_open_clip_name(name):
        tower = load_vision_tower(name).eval().to(device)
        image_processor, _ = load_image_processor(name)

        def embed_images(images) -> torch.Tensor:
            pixels = image_processor(list(images), return_tensors="pt")["pixel_values"]
            return embed_pixels(tower, pixels.to(device))[0]

        return load_text_tower(name, device), embed_images, tower.dtype

    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(name).eval().to(device)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{name} is no CLIP model: CLIPScore needs an image and a text tower.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")  # equals OpenAI's transform
    length = model.config.text_config.max_position_embeddings

    def embed_texts(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = model.get_text_features(**inputs.to(device))
        return getattr(features, "pooler_output", features)

    def embed_images(images) -> torch.Tensor:
        pixels = image_processor(list(images), return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels.to(device, model.dtype))
        return getattr(features, "pooler_output", features)

    return embed_texts, embed_images, model.dtype


def _batches(items: Sequence) -> Iterator[Sequence]:
    return (items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE))
