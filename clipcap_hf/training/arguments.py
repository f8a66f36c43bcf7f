"""Define and check the options of a training run: the captioner, the data and the recipe."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import Seq2SeqTrainingArguments

from ..extras import install_hint
from ..ranges import check_ranges


# Lets a switch whose default is None be given without a value.
_SWITCH = {"nargs": "?", "const": True}


def of_recipe(help: str) -> Any:
    """Make a field that is None until `__post_init__` fills in the recipe's value."""
    return field(default=None, metadata={"help": f"{help} (default: recipe)."})


# Defaults for options that the user leaves out. `fit` is adjusted to the captioner and the data, see recipe.py.
RECIPES: dict[str, dict[str, float]] = {
    "fit": {
        "num_train_epochs": 10,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-4,
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 0.02,
    },
    "paper": {
        "num_train_epochs": 10,
        "per_device_train_batch_size": 40,
        "learning_rate": 2e-5,
        "warmup_steps": 5000,
        "max_grad_norm": 0.0,
        "logging_steps": 0.02,
    },
}

METRICS = ("loss", "cider", "bleu_4", "rouge_l", "words")


@dataclass
class ModelArguments:
    """The captioner: an existing one (`model`), or a new one from a vision tower and a language model."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Captioner to train further: a folder, a Hub id, emoji-mini or photo-mini (default: emoji-mini, "
            "unless vision or text is given)."
        },
    )
    vision: str | None = field(
        default=None,
        metadata={
            "help": "Vision tower of a new captioner: a Hub id or folder of transformers, an open_clip checkpoint "
            "(ViT-B-32/openai, hf-hub:ORG/REPO), or a captioner, whose tower is used. Leave out to train on "
            "embeddings."
        },
    )
    text: str | None = field(
        default=None, metadata={"help": "Language model of a new captioner: a Hub id or a folder of a causal LM."}
    )
    vision_feature: Literal["pooled", "patches"] = field(
        default="pooled", metadata={"help": "Output of the tower: one embedding, or patches (for transformer)."}
    )
    mapping_type: Literal["mlp", "transformer", "linear"] = field(
        default="mlp", metadata={"help": "Mapping network: the paper's MLP or transformer, or one linear layer."}
    )
    prefix_length: int | None = field(
        default=None, metadata={"help": "Number of prefix vectors (default: 10 for mlp, 40 for transformer)."}
    )
    clip_length: int | None = field(
        default=None,
        metadata={"help": "Number of tokens that the transformer makes from an embedding (default: prefix_length)."},
    )
    clip_embed_dim: int | None = field(
        default=None, metadata={"help": "Width of the embeddings, if there is no vision tower."}
    )
    normalize_clip_embeds: bool | None = field(
        default=None, metadata={"help": "Divide embeddings by their norm (default: only with text_only).", **_SWITCH}
    )
    freeze_language_model: bool | None = field(
        default=None,
        metadata={
            "help": "Train the mapping network alone (default: only with mapping_type transformer, as in the paper).",
            **_SWITCH,
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Freeze the language model and train LoRA adapters of this rank on it."}
    )
    warm_start: int = field(
        default=0,
        metadata={
            "help": "Steps that first bring the prefix close to token embeddings (try 500). For a new captioner with "
            "a frozen language model; needs embeddings, from the data or from embed_once."
        },
    )
    save_frozen: bool = field(
        default=True, metadata={"help": "Also save the frozen parts; False saves only where they come from."}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Do not train the vision tower."})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'More fields of ClipCapConfig as JSON, such as {"mapping_num_layers": 4}.'}
    )

    def __post_init__(self):
        if self.model is not None and (self.text or self.vision):
            raise ValueError("Pass either `model`, to train it further, or `vision` and `text`, for a new captioner.")
        if self.vision is not None and self.text is None:
            raise ValueError("Pass `text`, the language model of the new captioner, together with `vision`.")
        check_ranges(self)
        self.config_overrides = self.overrides()

    def overrides(self) -> dict[str, Any]:
        """Return `config_overrides` as a dictionary."""
        overrides = self.config_overrides or {}
        if isinstance(overrides, str):
            try:
                overrides = json.loads(overrides)
            except ValueError as error:
                raise ValueError(f"`config_overrides` is not JSON: {error}.") from error
        if not isinstance(overrides, dict):
            raise ValueError(f"`config_overrides` must be a JSON object, such as {{}}, but is {str(overrides)[:80]}.")
        return overrides


@dataclass
class DataArguments:
    """The captioned images, or their embeddings."""

    data: str | None = field(
        default=None, metadata={"help": "Annotation file, folder or Hub data set; emoji is the embedded data set."}
    )
    data_format: str = field(
        default="auto",
        metadata={
            "help": "A reader of clipcap_hf.data (karpathy, coco, stair, official, conceptual, imagefolder, "
            "webdataset, hub), or saved for a folder of Dataset.save_to_disk. auto: emoji, saved or imagefolder, by "
            "the folder."
        },
    )
    images: str | None = field(default=None, metadata={"help": "Folder of the images, if data is a file."})
    missing: Literal["error", "skip"] | None = field(
        default=None,
        metadata={"help": "What to do with missing image files (default: skip for conceptual, else error)."},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Data to evaluate on, if not a split of data."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(
        default="validation",
        metadata={"help": "Split to evaluate on; if the data has none, see validation_share. none: do not evaluate."},
    )
    validation_share: float = field(
        default=0.1,
        metadata={"help": "Share of the images to hold out if the data has no split to evaluate on; 0: none."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training set as it is used; needs max_steps."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(
        default="captions",
        metadata={"help": "Column of the captions, strings or lists of them; NAME,NAME joins columns (not of saved)."},
    )
    id_column: str | None = field(
        default=None,
        metadata={"help": "Column of the image ids, for imagefolder and hub: rows of the same id are one image."},
    )
    embeds_column: str = field(default="clip_embeds", metadata={"help": "Column of the embeddings, if any."})
    references: Literal["random", "all", "first", "together"] = field(
        default="all",
        metadata={
            "help": "Captions shown per image and epoch: all, a random one, the first, or all together in one row, "
            "which takes less time (for several captions per image and language models with 4-dimensional masks)."
        },
    )
    append_eos: bool = field(default=True, metadata={"help": "End captions with the end token."})
    caption_start: str | None = field(
        default=None,
        metadata={
            "help": "Words that all captions start with. The captioner does not learn them: they are put in front of "
            "its captions (default: chosen for an existing captioner if all training captions start with the same "
            "words; '' for none)."
        },
    )
    max_caption_length: int | None = field(default=None, metadata={"help": "Cut captions to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    embed_once: bool | None = field(
        default=None,
        metadata={
            "help": "Encode each image once before training, into OUTPUT_DIR/_embeddings (default: if the tower is "
            "frozen and training shows each image at least once on average).",
            **_SWITCH,
        },
    )
    embeds_noise: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of Gaussian noise on each dimension of the normalised embedding (default: "
            "CapDec's 0.016 ** 0.5 with text_only, else 0)."
        },
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "Train on captions alone (CapDec, Nukrai et al. 2022), embedded by text_tower."},
    )
    text_tower: str | None = field(
        default=None,
        metadata={"help": "For text_only: the CLIP of the vision tower, as a Hub id, folder or open_clip name."},
    )

    def __post_init__(self):
        check_ranges(self)
        if self.text_only and self.text_tower is None:
            raise ValueError("`text_only` needs `text_tower`, the CLIP that the vision tower belongs to.")


@dataclass
class CaptioningArguments(Seq2SeqTrainingArguments):
    """
    [`~transformers.Seq2SeqTrainingArguments`] for captioners.

    `recipe` sets the options that are left out. `"fit"`, the default, goes by the trained part and the amount of data
    (see recipe.py); `"paper"` uses the numbers of the ClipCap paper.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the captioner and its checkpoints."})
    recipe: Literal["fit", "paper"] = field(
        default="fit",
        metadata={
            "help": "Defaults for options left out. fit: by the captioner and the data. paper: 10 epochs, batches of "
            "40, learning rate 2e-5 after 5,000 steps of warm-up, no clipping (for 500,000 captions)."
        },
    )
    num_train_epochs: float = of_recipe("Passes over the data")
    per_device_train_batch_size: int = of_recipe("Captions per step and device")
    per_device_eval_batch_size: int = field(default=40, metadata={"help": "Images per step and device in evaluation."})
    learning_rate: float = of_recipe("Highest learning rate")
    warmup_steps: float = of_recipe("Steps of linear warm-up; below 1, a share of all steps")
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float = of_recipe("Clip gradients to this norm; 0 disables clipping")
    logging_steps: float = of_recipe("Steps between log entries; below 1, a share of all steps")
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator reads columns."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Training stops at NaN by itself."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, not counting the best."})
    load_best_model_at_end: bool | None = field(  # type: ignore[assignment]  # None until `_choose_best_model`
        default=None,
        metadata={"help": "End with the best checkpoint (default: if there is an evaluation).", **_SWITCH},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Score that picks the best checkpoint: loss, cider, bleu_4 or rouge_l (default: loss, since CIDEr "
            "gives little weight to words that all captions share; cider for scst)."
        },
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Caption the images in evaluation; False: compute only their loss."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "On resume, restore the early-stopping counter."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."}
    )
    eval_tokenizer: Literal["python", "ptb", "ja", "characters"] = field(
        default="python",
        metadata={
            "help": "Tokenizer of the scores: python, ptb (as in published scores; needs Java), ja or characters."
        },
    )
    objective: Literal["cross_entropy", "scst"] = field(
        default="cross_entropy",
        metadata={"help": "scst: self-critical training on CIDEr-D. Start from a captioner trained by cross_entropy."},
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Continue from the last checkpoint in output_dir, or start anew if there is none."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Default: if there is an accelerator."}
    )
    num_samples: int = field(default=18, metadata={"help": "Sample captions to write at the end; 0: none."})
    verbose: bool = field(default=False, metadata={"help": "Show all messages of transformers and datasets."})

    @classmethod
    def paper(cls, output_dir: str, **kwargs) -> "CaptioningArguments":
        """Return arguments with the paper's recipe.

        10 epochs in batches of 40, AdamW with a learning rate of 2e-5 after 5,000 steps of warm-up, linear decay, no
        weight decay and no clipping.
        """
        return cls(output_dir=output_dir, recipe="paper", **kwargs)

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("Pass `output_dir` (--out), the folder for the captioner and its checkpoints.")
        check_ranges(self)
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, but is {self.recipe!r}.")
        recipe = RECIPES[self.recipe]
        #: Names of the options that the user left to the recipe.
        self.left_to_recipe = {name for name in recipe if getattr(self, name) is None}
        for name in self.left_to_recipe:
            setattr(self, name, recipe[name])
        self._choose_best_model()
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator reads the images and captions.")
        super().__post_init__()
        self._check_reporters()

    def _choose_best_model(self):
        evaluates = str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        saves = str(getattr(self.save_strategy, "value", self.save_strategy)) != "no"
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluates and saves
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "`early_stopping_patience` needs evaluations and checkpoints: leave `load_best_model_at_end` on, and "
                "`eval_strategy` and `save_strategy` at steps or epoch."
            )
        if not self.predict_with_generate:
            self.prediction_loss_only = True  # logits of all tokens would fill the memory
        if self.metric_for_best_model is None:
            # Self-critical training raises the loss, since it optimises a reward.
            self.metric_for_best_model = "cider" if self.objective == "scst" and self.predict_with_generate else "loss"
        metric = self.metric_for_best_model.removeprefix("eval_")
        if metric not in METRICS:
            raise ValueError(
                f"`metric_for_best_model` must be one of {', '.join(METRICS)}, but is {self.metric_for_best_model!r}."
            )
        if self.greater_is_better is None:
            self.greater_is_better = metric != "loss"
        if not self.predict_with_generate and metric != "loss":
            raise ValueError(
                f"`metric_for_best_model` {self.metric_for_best_model!r} needs `predict_with_generate`: leave one of "
                "the two out."
            )

    def _check_reporters(self):
        from transformers.integrations import get_available_reporting_integrations

        known = {"tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "codecarbon", "swanlab"}
        if missing := sorted(known.intersection(self.report_to) - set(get_available_reporting_integrations())):
            how = install_hint("train") if missing == ["tensorboard"] else f"pip install {' '.join(missing)}"
            raise ValueError(f"`report_to` {', '.join(missing)} is not installed: {how}, or leave `report_to` out.")
