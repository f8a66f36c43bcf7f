"""Choose defaults for the captioner and the data: learning rate, batch size and number of epochs."""

import logging
import math
from typing import Any

from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from .arguments import CaptioningArguments


logger = logging.getLogger(__name__)

# By held-out loss, from the tables of examples/guides/training.md: existing captioners on 50 and 300 images, new ones
# on 300. Not measured: the mapping network or LoRA of new captioners.
LEARNING_RATES = {
    "existing": {"everything": 2e-4, "LoRA": 3e-3, "mapping network": 3e-3},
    "new": {"everything": 1e-3, "LoRA": 3e-3, "mapping network": 3e-3},
}
MEASURED_WIDTH = 192
BATCH_SIZES = {100: 8, 2000: 16}  # by the largest number of captions
FEWEST_STEPS = 150


def trained_part(model: ClipCapForConditionalGeneration) -> str:
    """Name the trained part: `"everything"` (with the language model), `"LoRA"` or only the `"mapping network"`."""
    trained = [name for name, parameter in model.language_model.named_parameters() if parameter.requires_grad]
    if any("lora_" not in name for name in trained):
        return "everything"
    return "LoRA" if trained else "mapping network"


def fit_recipe(
    args: CaptioningArguments, model: ClipCapForConditionalGeneration, captions: int | None, new: bool = False
):
    """Fill in what the user left to the recipe `fit`.

    Small data needs small batches, to get enough steps. A new captioner needs a higher learning rate than an existing
    one, which high rates make forget, and a wider language model a lower one.

    Args:
        args ([`CaptioningArguments`]): The arguments, changed in place.
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        captions (`int`, *optional*): Captions per epoch; None for a stream.
        new (`bool`): Whether the captioner is new: its mapping network is not trained yet.
    """
    if args.recipe != "fit":
        return
    part = trained_part(model)
    width = model.config.language_config.hidden_size
    rate = LEARNING_RATES["new" if new else "existing"][part]
    fitted: dict[str, Any] = {"learning_rate": float(f"{rate * min(1, MEASURED_WIDTH / width):.1g}")}
    if captions is not None:
        fitted["per_device_train_batch_size"] = next(
            (size for most, size in BATCH_SIZES.items() if captions <= most), 40
        )
        batch_size = args.per_device_train_batch_size
        if "per_device_train_batch_size" in args.left_to_recipe:
            batch_size = fitted["per_device_train_batch_size"]
        steps = math.ceil(captions / (batch_size * args.gradient_accumulation_steps * args.world_size))
        fitted["num_train_epochs"] = min(30, max(10, math.ceil(FEWEST_STEPS / steps)))
    for name in args.left_to_recipe & fitted.keys():
        setattr(args, name, fitted[name])
    logger.info(
        f"Recipe: {part} trained at a learning rate of {args.learning_rate:g}, "
        + (f"{args.max_steps} steps" if args.max_steps > 0 else _epochs(args.num_train_epochs))
        + f" in batches of {args.train_batch_size} captions."
    )


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:g} epochs"


def warn_of_warmup(args: CaptioningArguments, captions: int):
    """Warn of a warm-up that takes more than half of a run's steps (`captions` per epoch, unless `max_steps` says)."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else int(captions / per_step * args.num_train_epochs)
    if args.warmup_steps >= 1 and args.warmup_steps > steps / 2:
        logger.warning(
            f"The warm-up of {args.warmup_steps:.0f} steps is more than half of the {steps} steps of this run, so "
            f"that the learning rate hardly gets to {args.learning_rate:g}: pass a smaller `warmup_steps`, or 0.1 for "
            "a tenth of the steps."
        )
