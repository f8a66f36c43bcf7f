"""Training captioners: the collator and the trainer."""

import copy
import errno
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import has_length

from ..model.model_card_clipcap import write_model_card
from ..model.processing_clipcap import ClipCapProcessor
from .checkpoints import last_checkpoint
from .rows import EpochRows, EpochShuffledLengths, caption_lengths, generator_of
from .self_critical import self_critical_loss


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
            repeat, or for rows of [`EpochRows`] by seed, epoch and row); otherwise take the first, as for evaluation.
        max_caption_length (`int`, *optional*): Cut captions to this many tokens, the end token included.
        embeds_noise (`float`): Standard deviation of the Gaussian noise that is added to each dimension of an embedding
            divided by its L2 norm (CapDec, Nukrai et al. 2022, section 3), so that the captioner also accepts embeddings
            that lie near those of training. For models with `normalize_clip_embeds`.
        video_column (`str`): Column with a video (anything that the processor takes), for rows without an image.
        return_references (`bool`): Also return all captions of each row as `references`, which self-critical training
            needs.

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
        return_references: bool = False,
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

    def for_evaluation(self) -> "CaptioningCollator":
        """The same without what is random: the first caption, no noise, and no references."""
        collator = copy.copy(self)
        collator.sample_captions, collator.embeds_noise, collator.return_references = False, 0.0, False
        return collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        generators = [generator_of(feature) for feature in features]
        captions = [self._caption(feature, generator) for feature, generator in zip(features, generators)]
        eos = self.processor.tokenizer.eos_token if self.append_eos else ""
        text_kwargs = {"padding": True, "padding_side": "right"}
        if self.max_caption_length is not None:
            max_length = len(self.processor.tokenize_prompts(None, 1)["input_ids"][0]) + self.max_caption_length
            text_kwargs.update(truncation=True, truncation_side="right", max_length=max_length)
        batch = self.processor(
            **self._images(features, generators),
            text=[caption + eos for caption in captions],
            return_tensors="pt",
            **text_kwargs,
        )
        placeholders = batch["input_ids"] == self.processor.image_token_id
        prompt = placeholders.flip(1).cumsum(1).flip(1) > 0  # up to the last placeholder
        # What the template says after the image belongs to the prompt, too. A text is padded on the right here.
        template_end = self.processor.prompt_template.partition(self.processor.image_token)[2]
        if after := len(self.processor.tokenizer(template_end, add_special_tokens=False)["input_ids"]):
            prompt[:, after:] |= prompt[:, :-after].clone()
        batch["labels"] = batch["input_ids"].masked_fill(prompt | (batch["attention_mask"] == 0), IGNORED)
        if self.return_references:
            references = [feature[self.caption_column] for feature in features]
            batch["references"] = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        return dict(batch)

    def _caption(self, feature: dict[str, Any], generator) -> str:
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
        index = 0
        if self.sample_captions:
            index = int(torch.randint(len(captions), ()) if generator is None else generator.integers(len(captions)))
        caption = captions[index]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"A caption must be a non-empty string, got {caption!r}.")
        if self.processor.image_token in caption:
            raise ValueError(f"The caption {caption!r} holds {self.processor.image_token}, which is reserved.")
        return caption

    def _images(self, features: list[dict[str, Any]], generators: list) -> dict[str, Any]:
        if self.embeds_column in features[0]:
            if any(feature.get(self.embeds_column) is None for feature in features):
                raise ValueError(f"The column {self.embeds_column!r} is empty in some rows: embed those images too.")
            embeds = torch.stack([torch.as_tensor(feature[self.embeds_column]) for feature in features]).float()
            if not embeds.isfinite().all():
                raise ValueError(f"The column {self.embeds_column!r} holds NaN or infinity: embed those images again.")
            if self.embeds_noise:
                embeds = F.normalize(embeds, dim=-1)
                embeds = embeds + self.embeds_noise * _noise(embeds, generators)
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


def _noise(embeds: torch.Tensor, generators: list) -> torch.Tensor:
    if None in generators:
        return torch.randn_like(embeds)
    shape = embeds.shape[1:]
    return torch.stack([torch.from_numpy(generator.standard_normal(shape, "float32")) for generator in generators])


class NonFiniteError(ValueError):
    """Training has diverged: a loss or a weight is NaN or infinite."""


class ClipCapTrainer(Seq2SeqTrainer):
    """
    [`~transformers.Trainer`] for captioners. Plain `Trainer` trains them too; this one computes logits for the labelled
    tokens only, applies label smoothing to the right tokens (`Trainer` smooths the labels of the tokens before), evaluates without the
    collator's noise and random references, and with `predict_with_generate=True`
    ([`~transformers.Seq2SeqTrainingArguments`]) captions the images in evaluation without showing the model the captions.

    It stops where the loss is NaN or infinite, and saves no checkpoint with such weights. Over [`EpochRows`] a run that
    resumes from a checkpoint ends with the weights of one that was never interrupted.

    Args:
        args: As for [`~transformers.Seq2SeqTrainer`].
        reward (`Callable`, *optional*): Makes training self-critical (Rennie et al. 2017): called with the captions, a
            list that says which of them ended by themselves, and the references of each, it returns the reward of each;
            see [`~clipcap_hf.training.self_critical.CiderReward`]. Needs a collator with `return_references=True`, and a
            `processing_class`.
        kwargs: As for [`~transformers.Seq2SeqTrainer`].
    """

    def __init__(self, *args, reward: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.reward = reward
        if reward is not None:
            # The loss is a mean over the batch, so Trainer has to divide it by the batches of a step.
            self.model_accepts_loss_kwargs = False
            if self.processing_class is None:
                raise ValueError("Self-critical training decodes captions: pass the processor as `processing_class`.")
        if isinstance(self.train_dataset, EpochRows):
            self.add_callback(_EpochOfRows(self.train_dataset))

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, EpochRows) or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        collator = self.data_collator
        lengths = caption_lengths(rows.rows[collator.caption_column], collator.processor.tokenizer)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochShuffledLengths(rows, lengths, batch_size)

    def get_eval_dataloader(self, eval_dataset=None):
        with self._collator_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._collator_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    def _get_eval_sampler(self, eval_dataset):
        # In order, also where training groups by length: captions are scored against references in order.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    @contextmanager
    def _collator_for_evaluation(self):
        collator = self.data_collator
        if isinstance(collator, CaptioningCollator):
            self.data_collator = collator.for_evaluation()
        try:
            yield
        finally:
            self.data_collator = collator

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite().all():
            raise NonFiniteError(self._diverged(f"the loss is {float(loss.mean())}"))
        return loss

    def _save_checkpoint(self, model, trial):
        # The step before may have ruined the weights, which only the next loss would tell.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.detach().isfinite().all():
                raise NonFiniteError(self._diverged(f"{name} holds NaN or infinity"))
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors raise errors of their own kinds
            if not self._disk_is_full(error):
                raise
            last = last_checkpoint(self.args.output_dir)
            kept = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint yet"
            raise OSError(
                f"The disk of {self.args.output_dir} is full; {kept}. Make room and run again with `resume` (--resume)."
            ) from error

    def _disk_is_full(self, error: Exception) -> bool:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        return shutil.disk_usage(self.args.output_dir).free < 2**20

    def _diverged(self, what: str) -> str:
        last = last_checkpoint(self.args.output_dir)
        kept = f"the last checkpoint, {last}, is as it was" if last else "no checkpoint was saved before"
        return (
            f"Training stopped at step {self.state.global_step + 1}: {what}; {kept}. A lower learning rate, more warm-up "
            "steps, `max_grad_norm=1.0` or single precision may help."
        )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.reward is not None and model.training:
            captioner = self.accelerator.unwrap_model(model)
            tokenizer = self.processing_class.tokenizer
            loss, rewards = self_critical_loss(model, captioner, inputs, self.reward, tokenizer)
            self._rewards = getattr(self, "_rewards", []) + [rewards]
            return loss
        inputs = {name: value for name, value in inputs.items() if name != "references"}
        labels = inputs.get("labels")
        if labels is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not return_outputs and self.args.n_gpu <= 1 and not self.args.torch_compile:
            return self._loss_of_labelled_tokens(model, inputs, **kwargs)
        if self.label_smoother is not None:
            # Trainer shifts labels for the classes that it knows as causal language models only.
            labels = inputs["labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def _loss_of_labelled_tokens(self, model, inputs, **kwargs):
        # Prefix and padding are most positions, and the vocabulary's logits a third of the work: only what is labelled
        # goes into the head. (A compiled model wants shapes that do not change.)
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        places = targets != IGNORED

        def loss_of(outputs, labels, num_items_in_batch=None):
            smoothing = self.args.label_smoothing_factor
            logits = outputs["logits"][0].float()
            loss = F.cross_entropy(logits, targets[places], reduction="sum", label_smoothing=smoothing)
            return loss / (places.sum() if num_items_in_batch is None else num_items_in_batch)

        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][places].unsqueeze(0), *args[1:]))
        self.compute_loss_func = loss_of
        try:
            return super().compute_loss(model, inputs, **kwargs)
        finally:
            hook.remove()
            self.compute_loss_func = None

    def evaluation_loop(self, *args, **kwargs):
        # Seq2SeqTrainer keeps the rows that fill up the last batch of several processes, as if they were more images.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = dict(self._prepare_inputs(inputs))
        captioner = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            if "pixel_values" in inputs:  # encoded once, for the loss and the caption
                inputs["clip_embeds"] = captioner.get_clip_embeds(inputs.pop("pixel_values"))
            loss = self.compute_loss(model, inputs).mean().detach() if "labels" in inputs else None
        # Seq2SeqTrainer of transformers would give the whole `input_ids`, caption included, as the prompt.
        placeholders = inputs["input_ids"] == captioner.config.image_token_id
        prompt_length = int(placeholders.any(0).nonzero()[-1]) + 1
        if "labels" in inputs:  # a template may say something after the image
            prompt_length = int((inputs["labels"] != IGNORED).any(0).nonzero()[0])
        prompt = {name: inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")}
        generate_kwargs = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        # `generation_max_length` comes as max_length, over which the captioner's own max_new_tokens would win.
        max_length = generate_kwargs.pop("max_length", None)
        if max_length is not None and generate_kwargs.get("max_new_tokens") is None:
            generate_kwargs["max_new_tokens"] = max_length
        generated = captioner.generate(**prompt, clip_embeds=inputs["clip_embeds"], **generate_kwargs)
        generated = generated[:, prompt_length:]
        labels = inputs.get("labels")
        return loss, generated, None if labels is None else labels[:, prompt_length:]

    def log(self, logs, start_time=None):
        if getattr(self, "_rewards", None) and "loss" in logs:
            sampled, greedy = (sum(values) / len(values) for values in zip(*self._rewards))
            logs = {**logs, "reward_sampled": round(sampled, 4), "reward_greedy": round(greedy, 4)}
            self._rewards = []
        super().log(logs, start_time)

    def create_model_card(self, language=None, license=None, tags=None, model_name=None, dataset=None, **kwargs):
        """As in transformers, but the card tells how to use a captioner, and one that a person has edited is kept."""
        if not self.is_world_process_zero():
            return
        summary = TrainingSummary.from_trainer(self, dataset=dataset, model_name=model_name, **kwargs)
        write_model_card(
            self.args.output_dir,
            repo_id=self.hub_model_id or model_name,
            config=self.accelerator.unwrap_model(self.model).config.to_dict(),
            license=license,
            language=language,
            datasets=summary.dataset,
            tags=[tags] if isinstance(tags, str) else tags,
            training=summary.to_model_card().partition("## Training procedure")[2],
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        self.create_model_card()  # Trainer writes the card with the last push only
        super()._push_from_checkpoint(checkpoint_folder)


class _EpochOfRows(TrainerCallback):
    def __init__(self, rows: EpochRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.set_epoch(int(state.epoch or 0))
