"""CLIPScore and RefCLIPScore (Hessel et al., 2021): how well captions fit their images, judged by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import torch
    from PIL import Image

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
PROMPT = "A photo depicts "
WEIGHT = 2.5  # stretches the cosines of ViT-B/32, which lie in about 0 to 0.4, over 0 to 1
BATCH_SIZE = 64


def check_images(images: Sequence | None, captions: int) -> Sequence:
    """Return the images without reading them, or raise a ValueError that says what is missing."""
    if images is None or isinstance(images, str):
        raise ValueError("clip_score needs images=[...]: a path, PIL image or bytes for each prediction.")
    if len(images) != captions:
        raise ValueError(f"There are {captions} predictions and {len(images)} images; give one image per prediction.")
    from ..model.images_clipcap import stored_images

    return stored_images(images)


def clip_scores(
    captions: Sequence[str],
    images: Sequence | None,
    references: Sequence[Sequence[str]] | None = None,
    clip_model: str = DEFAULT_CLIP,
) -> dict[str, Any]:
    """Compute CLIPScore, and RefCLIPScore if there are references.

    CLIPScore is 2.5 max(cos(caption, image), 0). RefCLIPScore is its harmonic mean with max(c, 0), where c is the
    largest cosine between the caption and a reference. Texts get the prompt "A photo depicts " and are cut to the
    model's length. An empty caption scores 0. Runs on a GPU if there is one, in the model's own dtype. Images are read
    one at a time.

    Args:
        captions (`Sequence[str]`): n captions, not tokenized.
        images (`Sequence`): n paths, PIL images, bytes or `{"path": ..., "bytes": ...}`, read when indexed.
        references (`Sequence[Sequence[str]]`, *optional*): n lists of captions.
        clip_model (`str`): A CLIP of transformers (Hub id or folder, with tokenizer and image processor), or of
            open_clip (`"ViT-B-32/openai"`, `"hf-hub:ORG/REPO"` or a folder). Papers use the default; scores by another
            model cannot be compared with theirs.

    Returns:
        `dict`: `clip_score`, and with references `ref_clip_score`, as (mean, array of shape (n,)); `clip_model` and
        `clip_dtype` as strings.

    Raises:
        ValueError: If images are missing or unreadable, or the model has no text tower.
    """
    import torch

    images = check_images(images, len(captions))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embed_texts, embed_images, dtype = _load_clip(clip_model, device)
    with torch.inference_mode():
        texts = _embed_texts(embed_texts, captions)
        seen = _unit_vectors(embed_images(map(_open, batch)) for batch in _batches(images))
        clip = _clip_score(captions, texts, seen)
        result: dict[str, Any] = {"clip_score": (float(clip.mean()), clip)}
        if references is not None:
            flat = _embed_texts(embed_texts, [text for group in references for text in group])
            both = _harmonic_mean(clip, _closest_reference(texts, flat, [len(group) for group in references]))
            result["ref_clip_score"] = (float(both.mean()), both)
    return {**result, "clip_model": str(clip_model), "clip_dtype": str(dtype).removeprefix("torch.")}


def _clip_score(captions: Sequence[str], texts: np.ndarray, seen: np.ndarray) -> np.ndarray:
    worded = np.array([bool(caption.strip()) for caption in captions])
    return WEIGHT * np.maximum((texts * seen).sum(1), 0) * worded


def _closest_reference(texts: np.ndarray, flat: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return the largest cosine of each caption with one of its references; 0 if all are negative."""
    image = np.repeat(np.arange(len(texts)), sizes)
    closest = np.zeros(len(texts))
    np.maximum.at(closest, image, (flat * texts[image]).sum(1))
    return closest


def _harmonic_mean(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    total = left + right
    return np.divide(2 * left * right, total, out=np.zeros_like(total), where=total > 0)


def _embed_texts(embed: Callable, texts: Sequence[str]) -> np.ndarray:
    return _unit_vectors(embed([PROMPT + text for text in batch]) for batch in _batches(texts))


def _unit_vectors(batches: Iterable[torch.Tensor]) -> np.ndarray:
    """Normalise embeddings to unit vectors (items, width) in double precision."""
    rows = [features.double().cpu().numpy() for features in batches]
    return np.concatenate([row / np.linalg.norm(row, axis=-1, keepdims=True) for row in rows])


def _batches(items: Sequence) -> Iterator[Iterator]:
    """Yield batches whose items are read one by one, since all images of a benchmark would fill the memory."""
    for start in range(0, len(items), BATCH_SIZE):
        yield (items[place] for place in range(start, min(start + BATCH_SIZE, len(items))))


def _open(image: Any) -> Image.Image:
    """Read a path, PIL image, bytes, or a dict of path and bytes as `datasets` stores them, as upright RGB."""
    from ..model.images_clipcap import load_image

    return load_image(image)


def check_clip(name: str) -> None:
    """Raise an OSError if there is no CLIP of this name, without reading its weights."""
    from transformers import AutoConfig

    from ..model.modeling_open_clip import is_open_clip_name, load_open_clip_checkpoint

    try:
        if is_open_clip_name(name):
            load_open_clip_checkpoint(name, with_weights=False)
        else:
            AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(f"Could not load the CLIP {name} that clip_score needs: {error}") from error


def _load_clip(name: str, device: str) -> tuple[Callable, Callable, torch.dtype]:
    """Return functions that embed texts and PIL images, and the dtype in which they compute."""
    from ..model.modeling_open_clip import is_open_clip_name

    return _load_open_clip(name, device) if is_open_clip_name(name) else _load_transformers_clip(name, device)


def _load_open_clip(name: str, device: str) -> tuple[Callable, Callable, torch.dtype]:
    from ..clip import load_text_tower
    from ..model.image_processors_clipcap import load_image_processor
    from ..model.modeling_vision import embed_pixels, load_vision_tower

    tower = load_vision_tower(name).eval().to(device)
    image_processor, _ = load_image_processor(name)

    def embed_images(images: Iterable[Image.Image]) -> torch.Tensor:
        return embed_pixels(tower, _pixels(image_processor, images).to(device))[0]

    return load_text_tower(name, device), embed_images, tower.dtype


def _load_transformers_clip(name: str, device: str) -> tuple[Callable, Callable, torch.dtype]:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    from ..model.damage_clipcap import check_transform, naming

    # The name may be of any repository: code from it is never run.
    with naming(f"The weights in {name}"):
        model = AutoModel.from_pretrained(name, trust_remote_code=False).eval().to(device)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{name} is no CLIP model: CLIPScore needs an image and a text tower.")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # The transform on PIL images equals OpenAI's.
    image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    check_transform(image_processor)
    length = model.config.text_config.max_position_embeddings

    def embed_texts(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = model.get_text_features(**inputs.to(device))
        return getattr(features, "pooler_output", features)

    def embed_images(images: Iterable[Image.Image]) -> torch.Tensor:
        pixels = _pixels(image_processor, images).to(device, model.dtype)
        features = model.get_image_features(pixel_values=pixels)
        return getattr(features, "pooler_output", features)

    return embed_texts, embed_images, model.dtype


def _pixels(image_processor, images: Iterable[Image.Image]) -> torch.Tensor:
    """Preprocess images one by one, so that only one is in memory at full size."""
    import torch

    return torch.cat([image_processor([image], return_tensors="pt")["pixel_values"] for image in images])
