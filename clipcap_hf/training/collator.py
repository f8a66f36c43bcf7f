"""Make training batches: images or their embeddings, tokenised captions, and labels for the captions only."""

import copy
from typing import Any

import torch
from torch.nn import functional as F

from ..model.processing_clipcap import ClipCapProcessor
from .packing import IGNORED, ImageWithCaptions, pack
from .rows import as_list, generator_of


class CaptioningCollator:
    r"""
    Make a training batch of images (or their CLIP embeddings) and captions.

    Captions are tokenised, ended with the end token, padded on the right and turned into labels. Prefix and padding
    get no label; this goes by position, not by token id, since the padding token is often a real token. The words of
    the processor's `caption_start` are left out, since the captioner does not write them. Pass
    `remove_unused_columns=False` to `Trainer`, or it drops the columns that are read here.

    Args:
        processor ([`ClipCapProcessor`]): The processor of the model to train.
        image_column (`str`): Column with the image, in any form that the processor accepts.
        caption_column (`str`): Column with the caption, or with a list of captions from which one is drawn each time.
        embeds_column (`str`): Column with the image's CLIP embedding of shape `(clip_embed_dim,)`, or its patches of
            shape `(patches, clip_embed_dim)`. Preferred over the image if a row has both.
        append_eos (`bool`): End captions with the end token. The official code does not, so its captions run on
            until a full stop.
        sample_captions (`bool`): Draw one of several captions at random: by seed, epoch and row for rows of
            [`EpochRows`], else by torch's generator. `False` takes the first, as evaluation does.
        max_caption_length (`int`, *optional*): Cut captions to this many tokens, the end token included.
        embeds_noise (`float`): Standard deviation of the Gaussian noise that is added to each dimension of the
            L2-normalised embedding (CapDec, Nukrai et al. 2022, section 3), so that the captioner also
            accepts embeddings near those of training. For models with `normalize_clip_embeds`.
        video_column (`str`): Column with a video, in any form that the processor accepts, for rows without an image.
        return_references (`bool`): Also return all captions of each row as `references`, and the length of the prompt
            as `prompt_length`, which self-critical training needs.
        captions_together (`bool`): Put all captions of an image into one row, where they share the prefix (see
            [`clipcap_hf.training.packing`]). Losses and gradients are those of a row per caption, in less time. Needs
            a language model that accepts 4-dimensional attention masks.
        packed (`bool`): Put several images into a row, each seeing only itself, instead of padding every caption to
            the longest. Losses and gradients stay the same. Needs such a language model too.

    Example:

    ```python
    >>> from clipcap_hf import EMOJI_MINI, CaptioningCollator, ClipCapProcessor

    >>> processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    >>> collator = CaptioningCollator(processor)
    >>> batch = collator([{"clip_embeds": [0.0] * 256, "captions": ["red heart"]}])
    >>> sorted(batch)
    ['attention_mask', 'clip_embeds', 'input_ids', 'labels']

    ```
    """

    def __init__(
        self,
        processor: ClipCapProcessor,
        image_column: str = "image",
        caption_column: str = "captions",
        embeds_column: str = "clip_embeds",
        append_eos: bool = True,
        sample_captions: bool = True,
        max_caption_length: int | None = None,
        embeds_noise: float = 0.0,
        video_column: str = "video",
        return_references: bool = False,
        captions_together: bool = False,
        packed: bool = False,
    ):
        if append_eos and processor.tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no end token: set one, or pass `append_eos=False`.")
        self.processor = processor
        self.image_column = image_column
        self.caption_column = caption_column
        self.embeds_column = embeds_column
        self.append_eos = append_eos
        self.sample_captions = sample_captions
        self.max_caption_length = max_caption_length
        self.embeds_noise = embeds_noise
        self.video_column = video_column
        self.return_references = return_references
        self.return_prompt_length = return_references
        self.captions_together = captions_together
        self.packed = packed

    def for_evaluation(self) -> "CaptioningCollator":
        """Return a collator without randomness: first caption, no noise. Its batches have `prompt_length`."""
        collator = copy.copy(self)
        collator.sample_captions, collator.embeds_noise, collator.return_references = False, 0.0, False
        collator.return_prompt_length = True
        collator.captions_together = collator.packed = False
        return collator

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the caption: the placeholders and the text of the processor's `prompt_template`."""
        return len(self.processor.tokenize_prompts(None, 1)["input_ids"][0])

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        generators = [generator_of(feature) for feature in features]
        if self.captions_together:
            groups = [[self._checked(text) for text in self._captions(feature)] for feature in features]
            return self._packed(features, generators, groups)
        captions = [self._caption(feature, generator) for feature, generator in zip(features, generators)]
        if self.packed:
            return self._packed(features, generators, [[caption] for caption in captions])
        prompt_length = self.prompt_length
        batch = self.processor(
            **self._images(features, generators),
            text=self._with_end(captions),
            return_tensors="pt",
            **self._padding(prompt_length),
        )
        unlabelled = batch["attention_mask"] == 0
        unlabelled[:, :prompt_length] = True  # texts are padded on the right here
        batch["labels"] = batch["input_ids"].masked_fill(unlabelled, IGNORED)
        if self.return_references:
            batch["references"] = [
                list(map(self.processor.without_start, as_list(feature[self.caption_column]))) for feature in features
            ]
        if self.return_prompt_length:
            batch["prompt_length"] = prompt_length
        return dict(batch)

    def _with_end(self, captions: list[str]) -> list[str]:
        end = self.processor.tokenizer.eos_token if self.append_eos else ""
        return [caption + end for caption in captions]

    def _padding(self, prompt_length: int) -> dict[str, Any]:
        padding = {"padding": True, "padding_side": "right"}
        if self.max_caption_length is None:
            return padding
        max_length = prompt_length + self.max_caption_length
        return {**padding, "truncation": True, "truncation_side": "right", "max_length": max_length}

    def _packed(self, features: list[dict[str, Any]], generators: list, captions: list[list[str]]) -> dict[str, Any]:
        """Make a batch in which the given captions of an image share its prefix, and images share rows."""
        inputs = self._images(features, generators)
        if "clip_embeds" not in inputs:
            inputs = {"pixel_values": self.processor(**inputs, return_tensors="pt")["pixel_values"]}
        texts = self._with_end([text for group in captions for text in group])
        prompt_length = self.prompt_length
        length = self._padding(prompt_length)
        tokenized = self.processor.tokenize_prompts(texts, len(texts), **{**length, "padding": False})["input_ids"]
        tokens = iter(tokenized)
        prompt = tokenized[0][:prompt_length]
        images = [ImageWithCaptions(prompt, [next(tokens)[prompt_length:] for _ in group]) for group in captions]
        pad_token_id = self.processor.tokenizer.pad_token_id or 0  # the mask hides padding
        return {**inputs, **pack(images, self.processor.image_token_id, pad_token_id)}

    def _caption(self, feature: dict[str, Any], generator) -> str:
        captions = self._captions(feature)
        index = 0
        if self.sample_captions:
            index = int(torch.randint(len(captions), ()) if generator is None else generator.integers(len(captions)))
        return self._checked(captions[index])

    def _captions(self, feature: dict[str, Any]) -> list[str]:
        if self.caption_column not in feature:
            raise ValueError(
                f"The data has no column {self.caption_column!r}; it has {', '.join(feature) or 'none'}. Pass "
                "`caption_column=`, and `remove_unused_columns=False` to the training arguments."
            )
        captions = as_list(feature[self.caption_column])
        if not captions:
            raise ValueError("An image has no caption.")
        return captions

    def _checked(self, caption: str) -> str:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"A caption must be a non-empty string, got {repr(caption)[:80]}.")
        if self.processor.image_token in caption:
            raise ValueError(f"The caption {caption[:80]!r} holds {self.processor.image_token}, which is reserved.")
        return self.processor.without_start(caption)

    def _images(self, features: list[dict[str, Any]], generators: list) -> dict[str, Any]:
        if self.embeds_column in features[0]:
            return {"clip_embeds": self._embeds(features, generators)}
        if self.image_column in features[0]:
            return {"images": [feature[self.image_column] for feature in features]}
        if self.video_column in features[0]:
            return {"videos": [feature[self.video_column] for feature in features]}
        raise ValueError(
            f"The data has neither a column {self.image_column!r} nor {self.video_column!r} nor "
            f"{self.embeds_column!r}; it has {', '.join(features[0])}. Pass `image_column=`, `video_column=` or "
            "`embeds_column=`, and `remove_unused_columns=False` to the training arguments."
        )

    def _embeds(self, features: list[dict[str, Any]], generators: list) -> torch.Tensor:
        """Return embeddings (batch, clip_embed_dim) or (batch, patches, clip_embed_dim), with noise if asked for."""
        if any(feature.get(self.embeds_column) is None for feature in features):
            raise ValueError(f"The column {self.embeds_column!r} is empty in some rows: embed those images too.")
        embeds = torch.stack([torch.as_tensor(feature[self.embeds_column]) for feature in features]).float()
        if not embeds.isfinite().all():
            raise ValueError(f"The column {self.embeds_column!r} holds NaN or infinity: embed those images again.")
        if not self.embeds_noise:
            return embeds
        embeds = F.normalize(embeds, dim=-1)
        return embeds + self.embeds_noise * _noise(embeds, generators)


def _noise(embeds: torch.Tensor, generators: list) -> torch.Tensor:
    if None in generators:
        return torch.randn_like(embeds)
    shape = embeds.shape[1:]
    return torch.stack([torch.from_numpy(generator.standard_normal(shape, "float32")) for generator in generators])


__all__ = ["IGNORED", "CaptioningCollator"]
