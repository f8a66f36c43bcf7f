"""Remember the captions of training and their images, for re-ranking to fall back on.

A captioner that composes new captions also composes some for things whose caption it knows. So a new caption has to
fit its image well; otherwise the caption is one that training had, by how near the image is to the ones it had there:
to the nearest of them and to their mean (its prototype: Snell et al. 2017). The caption that is nearest by that is
retrieved even if the beam search did not find it, as retrieval-augmented captioners do (SmallCap: Ramos et al. 2023).
"""

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from .damage_clipcap import naming
from .generation_clipcap import GeneratesCaptions, setting
from .hashing_clipcap import weights_hash


#: In the folder of a text tower: the captions of training, and the images that had them.
SEEN_CAPTIONS = "seen_captions.json"
SEEN_IMAGES = "seen_images.safetensors"
DEFAULT_WEIGHT = 50.0
DEFAULT_MIN_COSINE = 0.62


class CaptionMemory:
    r"""
    Captions of training, and the embeddings of the images that had them.

    Args:
        captions (`list[str]`): The captions, each once.
        owners (`torch.Tensor` of shape `(images,)`): Which of the captions each image had.
        embeds (`torch.Tensor` of shape `(images, dimensions)`): The images' embeddings, projected.
        projection (`torch.Tensor` of shape `(embed_dim, dimensions)`): From image embeddings of L2 norm 1.
        weight (`float`): Of the similarity of an image to a caption's images, beside the caption's mean
            log-probability per token (in nats).
        min_cosine (`float`): How close the text of a new caption must be to the image, as a cosine. Choose both on
            held-out images of captions that training had and of captions that it had not.

    Raises:
        ValueError: If shapes do not fit, captions repeat or have no image, or numbers are not finite.

    Example:

    ```python
    >>> memory = CaptionMemory.from_embeds(image_embeds, captions)  # doctest: +SKIP
    >>> reranker = CaptionReranker(text_tower, processor, memory=memory)  # doctest: +SKIP

    ```
    """

    def __init__(
        self,
        captions: list[str],
        owners: torch.Tensor,
        embeds: torch.Tensor,
        projection: torch.Tensor,
        weight: float = DEFAULT_WEIGHT,
        min_cosine: float = DEFAULT_MIN_COSINE,
    ):
        for name, value in (("weight", weight), ("min_cosine", min_cosine)):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"The `{name}` of a memory must be a number, got {value!r}.")
        self.rows = {caption: row for row, caption in enumerate(captions)}
        if len(self.rows) != len(captions):
            raise ValueError("The captions of a memory must differ; `CaptionMemory.from_embeds` joins equal ones.")
        fits = embeds.ndim == projection.ndim == 2 and embeds.shape[1] == projection.shape[1]
        fits = fits and owners.shape == embeds.shape[:1] and owners.unique().tolist() == list(range(len(captions)))
        if not (fits and captions):
            raise ValueError(
                f"A memory needs images for each of its {len(captions)} captions, but has embeddings of shape "
                f"{tuple(embeds.shape)}, captions of shape {tuple(owners.shape)} for them, and a projection of shape "
                f"{tuple(projection.shape)}."
            )
        if not (embeds.isfinite().all() and projection.isfinite().all()):
            raise ValueError("The embeddings and the projection of a memory must be finite numbers.")
        self.captions = list(captions)
        self.owners, self.projection = owners.long(), projection.float()
        self.embeds = F.normalize(embeds.float(), dim=-1)
        self.prototypes = F.normalize(self._per_caption(self.embeds.T, "sum").T, dim=-1)
        self.weight, self.min_cosine = float(weight), float(min_cosine)

    @classmethod
    def from_embeds(
        cls, image_embeds: torch.Tensor, captions: list[str], dimensions: int = 128, **settings: float
    ) -> "CaptionMemory":
        """Remember images (images, embed_dim) and the caption of each, by their principal `dimensions`.

        Raises:
            ValueError: If there are no images, not as many captions, or embeddings that are not finite.
        """
        if len(image_embeds) != len(captions) or not captions or not torch.isfinite(image_embeds).all():
            raise ValueError(
                f"A memory needs finite embeddings and a caption for each, got embeddings of shape "
                f"{tuple(image_embeds.shape)} and {len(captions)} captions."
            )
        distinct = {caption: row for row, caption in enumerate(sorted(set(captions)))}
        owners = torch.tensor([distinct[caption] for caption in captions])
        embeds = F.normalize(image_embeds.float().cpu(), dim=-1)
        # Not centred, so that cosines stay as they are: the main axes, the largest last.
        _, axes = torch.linalg.eigh(embeds.T @ embeds)
        projection = axes[:, -dimensions:]
        return cls(list(distinct), owners, embeds @ projection, projection, **settings)

    @classmethod
    def load(cls, path: str | Path, captions: list[str], **settings: float) -> "CaptionMemory":
        """Read the images that [`CaptionMemory.save`] wrote.

        Raises:
            ValueError: If the file is damaged or does not fit the captions.
        """
        with naming(f"The images in {path}"):
            found = load_file(path)
        try:
            return cls(captions, found["owners"], found["embeds"].float(), found["projection"], **settings)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold the images of the captions beside it: {error}") from error

    def save(self, folder: str | Path):
        """Write captions and images into the folder of a text tower, with a byte for each number of an embedding.

        They are used with the text tower if its configuration has a `rerank_memory_weight`.
        """
        # Scaled to numbers near 1, which floating-point numbers of eight bits resolve best.
        scaled = self.embeds * self.embeds.shape[1] ** 0.5
        save_file(
            {
                "owners": self.owners.int(),
                "embeds": scaled.to(torch.float8_e4m3fn),
                "projection": self.projection.half().contiguous(),
            },
            Path(folder) / SEEN_IMAGES,
        )
        captions = json.dumps(self.captions, indent=0, ensure_ascii=False) + "\n"
        (Path(folder) / SEEN_CAPTIONS).write_text(captions, encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """Say what a choice depends on: captions and images, by hashes, and the settings."""
        return {
            "captions_sha256": sha256("\0".join(self.captions).encode()).hexdigest(),
            "images_sha256": weights_hash([self.owners, self.embeds, self.projection]),
            "weight": self.weight,
            "min_cosine": self.min_cosine,
        }

    def similarities(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Compare images (images, embed_dim) with all captions: (images, captions), on the CPU.

        It is the mean of two cosines: with the nearest image of a caption, and with the mean of its images.
        """
        images = F.normalize(F.normalize(image_embeds.float().cpu(), dim=-1) @ self.projection, dim=-1)
        nearest = self._per_caption(images @ self.embeds.T, "amax")
        return (nearest + images @ self.prototypes.T) / 2

    def recall(self, similarities: torch.Tensor, captions: list[list[str]]) -> list[str]:
        """Return the known caption that is most similar to each image and not yet among its captions."""
        count = min(1 + max(map(len, captions)), len(self.captions))
        nearest = [[self.captions[row] for row in rows] for rows in similarities.topk(count).indices.tolist()]
        # Where all known captions are there already, one of them twice does no harm.
        return [
            next((caption for caption in known if caption not in of_image), known[0])
            for known, of_image in zip(nearest, captions)
        ]

    def order(
        self,
        similarities: torch.Tensor,
        captions: list[list[str]],
        scores: torch.Tensor,
        ratings: torch.Tensor,
        cosines: torch.Tensor,
    ) -> torch.Tensor:
        """
        Order the captions of each image, best first.

        The new caption with the best rating comes first if no known one has a better rating and its cosine is high
        enough. Then come the known captions, by log-probability and similarity, and then the other new ones.

        Args:
            similarities (`torch.Tensor` of shape `(images, known captions)`): From [`CaptionMemory.similarities`].
            captions (`list[list[str]]`): As many for each image.
            scores (`torch.Tensor` of shape `(images, captions)`): Mean log-probabilities per token, in nats.
            ratings (`torch.Tensor` of shape `(images, captions)`): By which known and new captions compare.
            cosines (`torch.Tensor` of shape `(images, captions)`): Of image and text.

        Returns:
            `torch.Tensor` of shape `(images, captions)`, positions of captions.
        """
        rows = torch.tensor([[self.rows.get(caption, -1) for caption in of_image] for of_image in captions])
        known = (rows >= 0).to(scores.device)
        credible = known | (cosines >= self.min_cosine)
        best = ratings.masked_fill(~credible, -torch.inf).argmax(dim=1, keepdim=True)
        leads = torch.zeros_like(known).scatter(1, best, True) & credible & ~known
        groups = known.long() + 2 * leads.long()
        remembered = scores + self.weight * similarities.gather(1, rows.clamp(min=0)).to(scores)
        order = torch.where(known, remembered, ratings).argsort(dim=1, descending=True, stable=True)
        return order.gather(1, groups.gather(1, order).argsort(dim=1, descending=True, stable=True))

    def _per_caption(self, values: torch.Tensor, reduce: str) -> torch.Tensor:
        """Reduce values (rows, images) to (rows, captions)."""
        start = torch.zeros(len(values), len(self.captions))
        owners = self.owners.expand(len(values), -1)
        return start.scatter_reduce(1, owners, values, reduce, include_self=False)


def may_recall(model: GeneratesCaptions, processor, generation_config, kwargs: dict[str, Any]) -> bool:
    """Whether any caption may follow the image, and the scores of `generate()` are means per token."""
    images = kwargs["pixel_values"] if kwargs.get("clip_embeds") is None else kwargs["clip_embeds"]
    prompts = processor.tokenize_prompts(None, len(images), return_tensors="pt")["input_ids"]
    given = kwargs.get("input_ids")
    is_free = given is None or torch.equal(given.cpu(), prompts)
    return is_free and setting(model, "length_penalty", generation_config, kwargs) in (None, 1)


@torch.no_grad()
def with_recalled(model: GeneratesCaptions, processor, outputs, recalled: list[str], kwargs: dict[str, Any]):
    """Add a caption to those that a search found for each image, with its mean log-probability per token."""
    prompt_length = processor.tokenize_prompts(None, 1, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor.tokenize_prompts(
        [caption + processor.tokenizer.eos_token for caption in recalled],
        len(recalled),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).to(model.device)
    images = {name: kwargs[name] for name in ("clip_embeds", "pixel_values") if kwargs.get(name) is not None}
    logits = model(**inputs, **images).logits[:, prompt_length - 1 : -1].float()
    tokens, mask = (inputs[name][:, prompt_length:] for name in ("input_ids", "attention_mask"))
    log_probs = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2) * mask
    scores = log_probs.sum(1) / mask.sum(1)

    def add(found: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        by_image = found.unflatten(0, (len(recalled), -1))
        return torch.cat([by_image, more.to(found).unsqueeze(1)], dim=1).flatten(0, 1)

    length = max(outputs.sequences.shape[1], inputs["input_ids"].shape[1])
    found, more = (
        F.pad(rows, (0, length - rows.shape[1]), value=processor.pad_token_id)
        for rows in (outputs.sequences, inputs["input_ids"])
    )
    return type(outputs)(sequences=add(found, more), sequences_scores=add(outputs.sequences_scores, scores))


__all__ = ["CaptionMemory"]
