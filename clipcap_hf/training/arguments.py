"""What a training run takes: the captioner, the data and the recipe, for `HfArgumentParser`."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import Seq2SeqTrainingArguments


# A switch without a default of its own can be given without a value, as other switches can.
_SWITCH = {"nargs": "?", "const": True}


@dataclass
class ModelArguments:
    """The captioner: one to go on from (`model`), or a new one on a vision tower and a language model."""

    model: str | None = field(
        default=None, metadata={"help": "A captioner to train further: a folder, a Hub id or emoji-mini."}
    )
    vision: str | None = field(
        default=None,
        metadata={
            "help": "Vision tower of a new captioner: a Hub id or folder of transformers, an open_clip checkpoint "
            "(ViT-B-32/openai, hf-hub:ORG/REPO) or a captioner, whose tower is taken. None: embeddings alone."
        },
    )
    text: str | None = field(
        default=None, metadata={"help": "Language model of a new captioner: a Hub id or a folder of a causal LM."}
    )
    vision_feature: Literal["pooled", "patches"] = field(
        default="pooled", metadata={"help": "What is read of the tower; patches needs mapping_type transformer."}
    )
    mapping_type: Literal["mlp", "transformer", "linear"] = field(
        default="mlp", metadata={"help": "Mapping network: the paper's MLP or transformer, or one linear layer."}
    )
    prefix_length: int | None = field(
        default=None, metadata={"help": "Prefix vectors. As in the paper by default: 10 for mlp, 40 for transformer."}
    )
    clip_length: int | None = field(
        default=None, metadata={"help": "Tokens that the transformer mapping makes of an embedding (prefix_length)."}
    )
    clip_embed_dim: int | None = field(
        default=None, metadata={"help": "Width of the embeddings, where there is no vision tower."}
    )
    normalize_clip_embeds: bool | None = field(
        default=None, metadata={"help": "Divide embeddings by their norm (default: only for text_only).", **_SWITCH}
    )
    freeze_language_model: bool | None = field(
        default=None,
        metadata={
            "help": "Train the mapping network alone. As in the paper by default: only with transformer.",
            **_SWITCH,
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank on the language model, which itself stays as it is."},
    )
    warm_start: int = field(
        default=0,
        metadata={
            "help": "Steps that first regress the prefix of a new captioner onto token embeddings (500 do), for a frozen "
            "language model; needs embeddings, in the data or by embed_once."
        },
    )
    save_frozen: bool = field(
        default=True, metadata={"help": "False: save only what is trained, and where the rest comes from."}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Keep the vision tower as it is."})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'More fields of ClipCapConfig as JSON, such as {"mapping_num_layers": 4}.'}
    )


@dataclass
class DataArguments:
    """The captioned images, or their embeddings."""

    data: str | None = field(
        default=None,
        metadata={"help": "Annotation file, folder or Hub data set; emoji is the embedded data set."},
    )
    data_format: str = field(
        default="auto",
        metadata={
            "help": "A reader of clipcap_hf.data (karpathy, coco, stair, official, conceptual, imagefolder, webdataset, "
            "hub), or saved for a folder of Dataset.save_to_disk. auto: emoji, saved or imagefolder, by the folder."
        },
    )
    images: str | None = field(default=None, metadata={"help": "Folder of the images, where data is a file."})
    missing: Literal["error", "skip"] | None = field(
        default=None,
        metadata={
            "help": "What to do with images that are listed but not there (default: skip for conceptual, else error)."
        },
    )
    eval_data: str | None = field(default=None, metadata={"help": "Data to evaluate on, if not a split of data."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(
        default="validation", metadata={"help": "Split to evaluate on, if there is one; none switches it off."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the training set as it is used, never all of it; needs max_steps."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(
        default="captions",
        metadata={"help": "Column of the captions, one or a list; of several columns, NAME,NAME (not of saved data)."},
    )
    id_column: str | None = field(
        default=None,
        metadata={"help": "Column of the image ids, for imagefolder and hub: rows of the same id are one image."},
    )
    embeds_column: str = field(default="clip_embeds", metadata={"help": "Column of the embeddings, if any."})
    references: Literal["random", "all", "first"] = field(
        default="all",
        metadata={
            "help": "Each epoch shows of each image a random reference, all of them (each a row, as in the paper), or "
            "the first."
        },
    )
    append_eos: bool = field(default=True, metadata={"help": "End captions with the end token."})
    max_caption_length: int | None = field(default=None, metadata={"help": "Cut captions to so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})
    embed_once: bool | None = field(
        default=None,
        metadata={
            "help": "Encode each image once before training, into OUTPUT_DIR/_embeddings (default: where the tower is "
            "frozen and training would otherwise encode more images than there are).",
            **_SWITCH,
        },
    )
    embeds_noise: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of Gaussian noise on each dimension of the normalised embedding. CapDec's "
            "0.016 ** 0.5 for text_only, 0 otherwise."
        },
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "Train on the captions alone (CapDec, Nukrai et al. 2022), embedded by text_tower."},
    )
    text_tower: str | None = field(
        default=None,
        metadata={
            "help": "For text_only: the CLIP that the vision tower belongs to, a Hub id, folder or open_clip name."
        },
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                instead = " or `eval_split none` for no evaluation" if name == "max_eval_samples" else ""
                raise ValueError(f"`{name}` must be at least 1, but is {limit}: leave it out for all images{instead}.")


@dataclass
class CaptioningArguments(Seq2SeqTrainingArguments):
    """
    [`~transformers.Seq2SeqTrainingArguments`] with the paper's recipe as the default: 10 epochs in batches of 40, AdamW with
    a learning rate of 2e-5 after 5,000 steps of warm-up, linear decay, no weight decay and no clipping. Evaluation
    captions the images and keeps the checkpoint of the best CIDEr.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the captioner and its checkpoints."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=40, metadata={"help": "Captions a step and device."})
    per_device_eval_batch_size: int = field(default=40, metadata={"help": "Images a step and device in evaluation."})
    learning_rate: float = field(default=2e-5, metadata={"help": "The highest learning rate."})
    warmup_steps: float = field(default=5000, metadata={"help": "Steps of linear warm-up, or below 1 their share."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator reads columns."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Training stops at NaN by itself."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best not counted."})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={"help": "End with the best checkpoint (default: where there is an evaluation).", **_SWITCH},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": "What makes a checkpoint the best (default: cider; loss without predict_with_generate)."},
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Caption the images in evaluation; False: only their loss, and no samples."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "On resuming, remember for how long there was no progress."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    eval_tokenizer: str = field(
        default="python",
        metadata={"help": "Tokenizer of the scores: python, ptb (that of published scores; Java), ja or characters."},
    )
    objective: Literal["cross_entropy", "scst"] = field(
        default="cross_entropy",
        metadata={"help": "scst: self-critical training on CIDEr-D; start from a captioner that cross_entropy made."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir; start anew if there is none."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Default: where there is an accelerator."}
    )
    num_samples: int = field(default=18, metadata={"help": "Sample captions to write at the end."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("Pass `output_dir`, the folder for the captioner and its checkpoints.")
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
            self.metric_for_best_model = "cider" if self.predict_with_generate else "loss"
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if not self.predict_with_generate and not self.metric_for_best_model.endswith("loss"):
            raise ValueError(
                f"`metric_for_best_model` {self.metric_for_best_model!r} needs `predict_with_generate`: leave one of the two out."
            )
        if self.num_samples < 0:
            raise ValueError(f"`num_samples` must be 0 (no samples) or more, but is {self.num_samples}.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator reads the images and captions.")
        super().__post_init__()
