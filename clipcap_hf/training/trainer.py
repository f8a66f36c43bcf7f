"""The trainer for captioners: `Trainer` with a cheaper loss and captions in evaluation."""

import errno
import shutil
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, has_length

from ..model.model_card_clipcap import write_model_card
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from .arguments import CaptioningArguments
from .checkpoints import last_checkpoint
from .collator import IGNORED, CaptioningCollator
from .cpu_layers import cpu_layers
from .rows import EpochRows, EpochShuffledLengths, caption_lengths
from .self_critical import self_critical_loss


class NonFiniteError(ValueError):
    """Training has diverged: a loss or a weight is NaN or infinite."""


class ClipCapTrainer(Seq2SeqTrainer):
    """
    [`~transformers.Trainer`] for captioners.

    Plain `Trainer` can train them too. This one

    - computes logits for the labelled tokens only, and applies label smoothing to the right tokens (`Trainer` would
      smooth the preceding labels);
    - evaluates without the collator's noise and random references, and with `predict_with_generate=True`
      ([`~transformers.Seq2SeqTrainingArguments`]) captions the images without showing the model the captions;
    - stops when the loss is NaN or infinite, and never saves such weights;
    - with [`EpochRows`], ends a resumed run with the same weights and `train_loss` as an uninterrupted run.

    Args:
        args: As for [`~transformers.Seq2SeqTrainer`].
        reward (`Callable`, *optional*): Makes training self-critical (Rennie et al. 2017). It receives the
            captions, a list of whether each ended with the end token, and the references of each, and returns one
            reward per caption, see [`~clipcap_hf.training.self_critical.CiderReward`]. Needs a collator with
            `return_references=True`, and a `processing_class`.
        kwargs: As for [`~transformers.Seq2SeqTrainer`].
    """

    args: CaptioningArguments
    model: ClipCapForConditionalGeneration
    data_collator: CaptioningCollator
    processing_class: ClipCapProcessor

    def __init__(self, *args, reward: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_sum = None
        self.reward = reward
        if reward is not None:
            # The loss is a batch mean, so Trainer must divide it by the number of batches per step.
            self.model_accepts_loss_kwargs = False
            if self.processing_class is None:
                raise ValueError("Self-critical training decodes captions: pass the processor as `processing_class`.")
        if isinstance(self.train_dataset, EpochRows):
            self.add_callback(_EpochOfRows(self.train_dataset))
        self.add_callback(LossOfRun())

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as `Trainer` does. `train_loss` is the mean over the whole run, also after a resume."""
        self._loss_sum = None
        with cpu_layers(self.model):
            output = super().train(*args, **kwargs)
        self._store_loss_sum()
        if not self.state.global_step:
            return output
        train_loss = self._loss_of_run().total / min(self.state.global_step, self.state.max_steps)
        if self.state.log_history and "train_loss" in self.state.log_history[-1]:
            self.state.log_history[-1]["train_loss"] = train_loss
        return TrainOutput(output.global_step, train_loss, {**output.metrics, "train_loss": train_loss})

    def _loss_of_run(self) -> "LossOfRun":
        # Resuming replaces callbacks with those in the checkpoint.
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, LossOfRun))

    def _store_loss_sum(self):
        if self._loss_sum is not None:
            self._loss_of_run().total = float(self.accelerator.gather(self._loss_sum).double().mean())

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
        # Keep the order even if training groups by length: captions are scored against references in order.
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
        if self._loss_sum is None:
            self._loss_sum = torch.tensor(self._loss_of_run().total, device=loss.device, dtype=torch.float32)
        if self.state.global_step < self.state.max_steps:  # Trainer does one extra step when a finished run is resumed
            self._loss_sum += loss.detach().float().mean()
        return loss

    def _save_checkpoint(self, model, trial):
        # The last step may have ruined the weights, and only the next loss would show it.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.detach().isfinite().all():
                raise NonFiniteError(self._diverged(f"{name} holds NaN or infinity"))
        self._store_loss_sum()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors each raise their own errors
            if not self._disk_is_full(error):
                raise
            last = last_checkpoint(self.args.output_dir)
            kept = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint yet"
            raise OSError(
                f"The disk of {self.args.output_dir} is full; {kept}. Make room and run again with `resume` "
                "(--resume)."
            ) from error

    def _disk_is_full(self, error: Exception) -> bool:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        return shutil.disk_usage(self.args.output_dir).free < 2**20

    def _diverged(self, what: str) -> str:
        last = last_checkpoint(self.args.output_dir)
        kept = f"the last checkpoint, {last}, is as it was" if last else "no checkpoint was saved before"
        return (
            f"Training stopped at step {self.state.global_step + 1}: {what}; {kept}. A lower learning rate, more "
            "warm-up steps, `max_grad_norm=1.0` or single precision may help."
        )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.reward is not None and model.training:
            captioner = self.accelerator.unwrap_model(model)
            tokenizer = self.processing_class.tokenizer
            loss, rewards = self_critical_loss(model, captioner, inputs, self.reward, tokenizer)
            self._rewards = getattr(self, "_rewards", []) + [rewards]
            return loss
        inputs = {name: value for name, value in inputs.items() if name not in ("references", "prompt_length")}
        labels = inputs.get("labels")
        if labels is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not return_outputs and self.args.n_gpu <= 1 and not self.args.torch_compile:
            return self._loss_of_labelled_tokens(model, inputs, **kwargs)
        if self.label_smoother is not None:
            # Trainer shifts labels only for known causal language model classes.
            labels = inputs["labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def _loss_of_labelled_tokens(self, model, inputs, **kwargs):
        # Most positions are prefix and padding, and computing logits is a third of the work, so the head sees only
        # labelled positions. (A compiled model needs constant shapes.)
        targets, places = inputs["labels"], inputs.pop("predictor_index", None)
        if places is None:
            targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED).flatten()
            places = torch.arange(len(targets), device=targets.device)
        labelled = targets != IGNORED
        targets, places = targets[labelled], places[labelled]

        def loss_of(outputs, labels, num_items_in_batch=None):
            smoothing = self.args.label_smoothing_factor
            logits = outputs["logits"].flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            return loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)

        def at_labels(head, args):
            return args[0].flatten(0, 1).index_select(0, places).unsqueeze(0), *args[1:]

        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(at_labels)
        self.compute_loss_func = loss_of
        try:
            return super().compute_loss(model, inputs, **kwargs)
        finally:
            hook.remove()
            self.compute_loss_func = None

    def evaluation_loop(self, *args, **kwargs):
        # With several processes, Seq2SeqTrainer would count the filler rows of the last batch as images.
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
        # Seq2SeqTrainer would use all of `input_ids`, including the caption, as the prompt.
        prompt_length = inputs.get("prompt_length") or placeholders_end(inputs["input_ids"], captioner)
        prompt = {name: inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")}
        generate_kwargs = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        # `generation_max_length` arrives as max_length, which the captioner's own max_new_tokens would override.
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
        """Write a model card that shows how to use the captioner; keep a card that a user has edited."""
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


def placeholders_end(input_ids: torch.Tensor, captioner) -> int:
    """Return the end of the prompt, after the last placeholder, in batches of other collators."""
    return int((input_ids == captioner.config.image_token_id).any(0).nonzero()[-1]) + 1


class LossOfRun(TrainerCallback, ExportableState):
    """The sum of the losses of all steps, kept in checkpoints to compute the mean over the whole run."""

    def __init__(self, total: float = 0.0):
        self.total = total

    def state(self) -> dict:
        return {"args": {"total": self.total}, "attributes": {}}


class _EpochOfRows(TrainerCallback):
    def __init__(self, rows: EpochRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.set_epoch(int(state.epoch or 0))
