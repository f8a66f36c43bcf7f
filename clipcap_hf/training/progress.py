"""Show the progress of a run: the first loss, and one table line per evaluation."""

import logging
import sys
import time

from transformers import ProgressCallback


logger = logging.getLogger(__name__)

COLUMNS = {"loss": "loss", "eval_loss": "held-out loss", "eval_cider": "CIDEr", "eval_bleu_4": "BLEU-4"}


class TableCallback(ProgressCallback):
    """
    Print the first loss, then one line per evaluation, or per epoch without evaluation.

    Args:
        bar (`bool`): Also draw a progress bar, if standard error is a terminal.
    """

    def __init__(self, bar: bool = True):
        super().__init__()
        self.bar = bar and sys.stderr.isatty()
        self.loss_sum = 0.0  # over the steps since the last line, up to `logged_step`
        self.logged_step = self.line_step = 0
        self.header_said = False
        self.evaluates = False
        self.owes_line = False  # for an epoch whose loss is logged after its end

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        self.logged_step = self.line_step = state.global_step
        self.evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            if not any("loss" in entry for entry in state.log_history[:-1]):
                self._say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}")
            self.loss_sum += logs["loss"] * (state.global_step - self.logged_step)
            self.logged_step = state.global_step
            if self.owes_line:
                self._line(state, {})
        if "eval_loss" in logs:
            self._line(state, logs)

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self.evaluates:
            self.owes_line = self.logged_step == self.line_step
            if not self.owes_line:
                self._line(state, {})

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _line(self, state, logs: dict):
        self.owes_line = False
        values = {name: logs[name] for name in COLUMNS if name in logs}
        if self.logged_step > self.line_step:
            values["loss"] = self.loss_sum / (self.logged_step - self.line_step)
            self.loss_sum, self.line_step = 0.0, self.logged_step
        if not self.header_said:
            names = [title for name, title in COLUMNS.items() if name in values or name == "loss"]
            self._say("  ".join([f"{'epoch':>7}", f"{'step':>7}", *(f"{title:>13}" for title in names), "minutes"]))
            self.header_said = True
        loss = f"{values.pop('loss'):.3f}" if "loss" in values else "-"  # none since the line before
        cells = [f"{state.epoch or 0:>7.1f}", f"{state.global_step:>7}", f"{loss:>13}"]
        cells += [f"{value:>13.{3 if 'loss' in name else 1}f}" for name, value in values.items()]
        self._say("  ".join([*cells, f"{(time.monotonic() - self.started) / 60:>7.1f}"]))

    def _say(self, line: str):
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stderr)
        else:
            logger.info(line)
