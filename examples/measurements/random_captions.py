"""Training data and captioners of real size and random content, for measurements of speed."""

import clipcap_hf  # noqa: F401  (before transformers)
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.training.arguments import CaptioningArguments
from clipcap_hf.training.rows import EpochRows
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


RECIPES = {
    "MLP, GPT-2 tuned": {"mapping_type": "mlp", "prefix_length": 10},
    "transformer 40/40, GPT-2 frozen": {
        "mapping_type": "transformer",
        "prefix_length": 40,
        "freeze_language_model": True,
    },
}
CLIP_DIM, CAPTIONS_PER_IMAGE, CAPTIONS_PER_STEP = 512, 5, 40
VOCABULARY, MEAN_TOKENS, LONGEST = 50257, 11.5, 20


def random_captions(images: int) -> Dataset:
    """Make embeddings, and five captions for each, whose words are one token each; the end token is not written."""
    lengths = MEAN_TOKENS - 1 + 2.6 * torch.randn(images * CAPTIONS_PER_IMAGE)
    lengths = lengths.round().clamp(5, LONGEST - 1).long().tolist()
    # Token 0 is left out: the official loss ignores it.
    captions = [" ".join(f"w{word}" for word in torch.randint(1, VOCABULARY - 1, (length,))) for length in lengths]
    groups = [captions[i : i + CAPTIONS_PER_IMAGE] for i in range(0, len(captions), CAPTIONS_PER_IMAGE)]
    data = Dataset.from_dict({"clip_embeds": torch.randn(images, CLIP_DIM).numpy(), "captions": groups})
    return data.with_format("numpy", columns=["clip_embeds"], output_all_columns=True)


def a_caption_a_row(data: Dataset) -> Dataset:
    rows = [{**row, "captions": caption} for row in data for caption in row["captions"]]
    return Dataset.from_list(rows).with_format("numpy", columns=["clip_embeds"], output_all_columns=True)


def word_processor(prefix_length: int) -> ClipCapProcessor:
    """Make a processor whose tokenizer has a token a word: "w17" is token 17."""
    words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<end>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return ClipCapProcessor(None, tokenizer, prefix_length=prefix_length)


def random_captioner(recipe: dict) -> ClipCapForConditionalGeneration:
    return ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, GPT2LMHeadModel(GPT2Config()), clip_embed_dim=CLIP_DIM, **recipe
    )


def training_setup(recipe: dict, data: Dataset, folder: str, way: str, **settings) -> dict:
    """
    Make what a `ClipCapTrainer` needs for steps of 40 captions.

    `way` is "padded" (a caption a row, batches of similar length), "packed" (a caption at a time, as `clipcap train`
    does by default) or "together" (all captions of an image share its prefix).
    """
    together = way == "together"
    processor = word_processor(recipe["prefix_length"])
    args = CaptioningArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=CAPTIONS_PER_STEP // CAPTIONS_PER_IMAGE if together else CAPTIONS_PER_STEP,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=10_000,
        train_sampling_strategy="group_by_length" if way == "padded" else "random",
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    return {
        "args": args,
        "train_dataset": EpochRows(data if together else a_caption_a_row(data)),
        "data_collator": CaptioningCollator(processor, captions_together=together, packed=way == "packed"),
        "processing_class": processor,
    }
