"""Training captioners: the collator and the trainer."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Seq2SeqTrainer

from .processing_clipcap import ClipCapProcessor


IGNORED = -100


class CaptioningCollator:
    r"""
    Makes a training batch of images (or their CLIP embeddings) and captions.

    Captions are tokenised, ended with the end token, padded on the right and turned into labels; prefix and padding have
    no label, by their position and not by their id, since the padding token is often a real one. Give `Trainer`
    `remove_unused_columns=False`, or it drops the columns that are read here.

    Args:
        processor ([`ClipCapProcessor`]): Of the model to train.
        image_column (`str`): Column with the image (anything that the processor takes).
        caption_column (`str`): Column with the caption, or with a list of captions of which one is drawn each time.
        embeds_column (`str`): Column with the image's CLIP embedding, of shape `(clip_embed_dim,)` or, of patches,
            `(patches, clip_embed_dim)`; it is preferred to the image where a row has it.
        append_eos (`bool`): End captions with the end token. The official code does not, and its captions run on unless
            they hit a full stop.
        sample_captions (`bool`): Draw one of several captions at random (by torch's generator, so runs with a seed
            repeat); otherwise take the first, as for evaluation.
        max_caption_length (`int`, *optional*): Cut captions to this many tokens, the end token included.
        embeds_noise (`float`): Standard deviation of the Gaussian noise that is added to each dimension of an embedding
            divided by its L2 norm (CapDec, Nukrai et al. 2022, section 3), so that the captioner also accepts embeddings
            that lie near those of training. For models with `normalize_clip_embeds`.
        video_column (`str`): Column with a video (anything that the processor takes), for rows without an image.

    Example:

    ```python
    >>> from clipcap_hf import EMOJI_MINI, CaptioningCollator, ClipCapProcessor

    >>> processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    >>> collator = CaptioningCollator(processor)
    >>> batch = collator([{"clip_embeds": [0.0] * 256, "captions": ["red heart"]}])
    >>> sorted(batch)
    ['attention_mask', 'clip_embeds', 'input_ids', 'labels']

    ```"""

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

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [self._caption(feature) for feature in features]
        eos = self.processor.tokenizer.eos_token if self.append_eos else ""
        text_kwargs = {"padding": True, "padding_side": "right"}
        if self.max_caption_length is not None:
            max_length = len(self.processor.tokenize_prompts(None, 1)["input_ids"][0]) + self.max_caption_length
            text_kwargs.update(truncation=True, truncation_side="right", max_length=max_length)
        batch = self.processor(
            **self._images(features), text=[caption + eos for caption in captions], return_tensors="pt", **text_kwargs
        )
        placeholders = batch["input_ids"] == self.processor.image_token_id
        prompt = placeholders.flip(1).cumsum(1).flip(1) > 0  # up to the last placeholder
        # What the template says after the image belongs to the prompt, too. A text is padded on the right here.
        template_end = self.processor.prompt_template.partition(self.processor.image_token)[2]
        if after := len(self.processor.tokenizer(template_end, add_special_tokens=False)["input_ids"]):
            prompt[:, after:] |= prompt[:, :-after].clone()
        batch["labels"] = batch["input_ids"].masked_fill(prompt | (batch["attention_mask"] == 0), IGNORED)
        return dict(batch)

    def _caption(self, feature: dict[str, Any]) -> str:
        if self.caption_column not in feature:
            raise ValueError(
                f"The data has no column {self.caption_column!r}; it has {', '.join(feature) or 'none'}. Pass "
                "`caption_column=`, and `remove_unused_columns=False` to the training arguments."
            )
        captions = feature[self.caption_column]
        if isinstance(captions, str):
            captions = [captions]
        if not captions:
            raise ValueError("An image has no caption.")
        index = int(torch.randint(len(captions), ())) if self.sample_captions else 0
        caption = captions[index]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"A caption must be a non-empty string, got {caption!r}.")
        if self.processor.image_token in caption:
            raise ValueError(f"The caption {caption!r} holds {self.processor.image_token}, which is reserved.")
        return caption

    def _images(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if self.embeds_column in features[0]:
            if any(feature.get(self.embeds_column) is None for feature in features):
                raise ValueError(f"The column {self.embeds_column!r} is empty in some rows: embed those images too.")
            embeds = torch.stack([torch.as_tensor(feature[self.embeds_column]) for feature in features]).float()
            if not embeds.isfinite().all():
                raise ValueError(f"The column {self.embeds_column!r} holds NaN or infinity: embed those images again.")
            if self.embeds_noise:
                embeds = F.normalize(embeds, dim=-1)
                embeds = embeds + self.embeds_noise * torch.randn_like(embeds)
            return {"clip_embeds": embeds}
        if self.image_column in features[0]:
            return {"images": [feature[self.image_column] for feature in features]}
        if self.video_column in features[0]:
            return {"videos": [feature[self.video_column] for feature in features]}
        raise ValueError(
            f"The data has neither a column {self.image_column!r} nor {self.video_column!r} nor {self.embeds_column!r}; it "
            f"has {', '.join(features[0])}. Pass `image_column=`, `video_column=` or `embeds_column=`, and `remove_unused_columns=False` to the "
            "training arguments."
        )


class ClipCapTrainer(Seq2SeqTrainer):
    """
    [`~transformers.Trainer`] for captioners. Plain `Trainer` trains them too; this one computes no logits over the prefix,
    applies label smoothing to the right tokens (`Trainer` smooths the labels of the tokens before), and with
    `predict_with_generate=True` ([`~transformers.Seq2SeqTrainingArguments`]) captions the images in evaluation without
    showing the model the captions.
    """

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.get("labels")
        if labels is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inputs = dict(inputs)  # Trainer takes the labels out
        if self.label_smoother is not None:
            # Trainer shifts labels for the classes that it knows as causal language models only.
            labels = inputs["labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if not return_outputs and "logits_to_keep" not in inputs:
            labelled = (labels != IGNORED).any(0).nonzero()
            if len(labelled):
                # Counted from the right. The loss of the model shifts the labels itself, and so needs one place more.
                keep = labels.shape[1] - int(labelled[0]) + (self.label_smoother is None)
                inputs["logits_to_keep"] = keep
                if self.label_smoother is not None:
                    inputs["labels"] = labels[:, -keep:]
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).mean().detach() if "labels" in inputs else None
        # Seq2SeqTrainer of transformers would give the whole `input_ids`, caption included, as the prompt.
        captioner = self.accelerator.unwrap_model(model)
        placeholders = inputs["input_ids"] == captioner.config.image_token_id
        prompt_length = int(placeholders.any(0).nonzero()[-1]) + 1
        if "labels" in inputs:  # a template may say something after the image
            prompt_length = int((inputs["labels"] != IGNORED).any(0).nonzero()[0])
        prompt = {name: inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")}
        images = {name: inputs[name] for name in ("pixel_values", "clip_embeds") if name in inputs}
        generate_kwargs = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        generated = captioner.generate(**prompt, **images, **generate_kwargs)[:, prompt_length:]
        labels = inputs.get("labels")
        return loss, generated, None if labels is None else labels[:, prompt_length:]
