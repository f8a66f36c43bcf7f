"""`clipcap demo`: a captioner of emoji drawings, trained from scratch and scored in minutes, without a network."""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .assets import EMOJI_MINI
from .captioning import caption_embeds, embed_images
from .data import load_emoji
from .metrics import score_captions
from .model.modeling_clipcap import ClipCapForConditionalGeneration
from .model.processing_clipcap import ClipCapProcessor
from .pictures import draw_captions
from .training.baselines import MOST_COMMON, NEAREST, most_common_caption, nearest_images
from .training.collator import CaptioningCollator
from .training.progress import TableCallback
from .training.trainer import ClipCapTrainer


PREFIX_LENGTH = 4
TEST_SPLITS = ("new_design", "new_caption")
SPLIT_TITLES = {
    "new_design": "new design: Twemoji, drawn by designers that training never saw",
    "new_caption": "new caption: combinations of words that training never saw",
}
METRICS = ("exact_match", "cider")


def run_demo(
    out: str | Path, language: str = "en", seed: int = 0, epochs: float = 8, limit: int | None = None
) -> dict:
    """Train a captioner of emoji on the embedded image tower, score it next to baselines, and save it.

    Args:
        out (`str` or `Path`): Folder for `model/`, `scores.json` and `captions.png`; created if it does not exist.
        language (`str`): Language of the captions, `"en"` or `"ja"`.
        seed (`int`): Seed of the new weights and of the order of training. The same seed gives the same model on the
            same machine.
        epochs (`float`): Passes over the 11,000 training images.
        limit (`int`, *optional*): Use about this many images of each split, evenly spread, for a quick look.

    Returns:
        `dict`: The contents of `scores.json`: for each test split the scores of the captioner and of both baselines.
    """
    from transformers import set_seed

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made should fail before the training
    started = time.monotonic()

    tower = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI)
    tower_processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    data = load_emoji(language=language)
    if limit is not None:
        data = {split: rows.select(range(0, len(rows), max(1, len(rows) // limit))) for split, rows in data.items()}
    embeds = embed_splits(tower, tower_processor, data)

    set_seed(seed)
    train_captions = data["train"]["captions"]
    processor = ClipCapProcessor(
        tower_processor.image_processor,
        train_tokenizer(captions[0] for captions in train_captions),
        prefix_length=PREFIX_LENGTH,
    )
    model = new_captioner(tower.vision_tower, processor)
    train_data = training_data(embeds["train"], train_captions)
    history = train(model, processor, train_data, epochs=epochs, seed=seed)

    captions, scores = caption_and_score(model, processor, data, embeds, language)
    report = {
        "language": language,
        "seed": seed,
        "epochs": epochs,
        "train_loss": history,
        "scores": scores,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "captions": captions,
    }
    _save(out, model, processor, report)
    draw_captions(out / "captions.png", data, captions, SPLIT_TITLES)
    return report


def embed_splits(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, data) -> dict[str, torch.Tensor]:
    """Embed the training and test splits: normalised, (images, clip_embed_dim)."""
    return {
        split: F.normalize(
            embed_images(
                model, processor, data[split]["image"], progress=sys.stderr.isatty(), desc=f"Encoding {split}"
            ),
            dim=-1,
        )
        for split in ("train", *TEST_SPLITS)
    }


def caption_and_score(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    data,
    embeds: dict[str, torch.Tensor],
    language: str,
    num_beams: int = 3,
) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """Caption each test split, and score the captions next to the baselines."""
    captions, scores = {}, {}
    for split in TEST_SPLITS:
        captions[split] = caption_embeds(
            model, processor, embeds[split], num_beams=num_beams, progress=sys.stderr.isatty()
        )
        references, train_captions = list(data[split]["captions"]), data["train"]["captions"]
        scores[split] = score_beside_baselines(
            captions[split], embeds[split], references, embeds["train"], train_captions, language
        )
    return captions, scores


class DesignShift:
    """Shift embeddings as if another designer had drawn the image.

    Each embedding moves the way that the embedding of some other thing moves from one design to another, so that the
    captioner learns what designers change and what they keep. Use it as the transform of a data set with the columns
    `index` and `captions`. Each read of a row draws a new shift from torch's generator. In a trial with one training
    design held out, it neither helped nor harmed on that design.

    Args:
        embeds (`torch.Tensor` of shape `(images, clip_embed_dim)`): Normalised embeddings.
        names (`list[str]`): What each image shows. The shifts come from names that several designs share.
    """

    def __init__(self, embeds: torch.Tensor, names: list[str]):
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            by_name.setdefault(name, []).append(index)
        self.embeds = embeds
        # The pair of an image and itself is no shift; it stands in where no design shares a name.
        pairs = [pair for group in by_name.values() for pair in itertools.permutations(group, 2)]
        self.pairs = torch.tensor(pairs or [(0, 0)])

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        embeds = self.embeds[rows["index"]]
        to_design, from_design = self.pairs[torch.randint(len(self.pairs), (len(embeds),))].T
        length = torch.rand(len(embeds), 1)
        moved = embeds + length * (self.embeds[to_design] - self.embeds[from_design])
        return {"clip_embeds": list(F.normalize(moved, dim=-1)), "captions": rows["captions"]}


def training_data(embeds: torch.Tensor, captions: list[list[str]]):
    """Make a data set of `clip_embeds`, shifted by [`DesignShift`], and `captions`."""
    from datasets import Dataset

    data = Dataset.from_dict({"index": list(range(len(embeds))), "captions": list(captions)})
    return data.with_transform(DesignShift(embeds, [names[0] for names in captions]))


def train_tokenizer(captions, vocab_size: int = 3000, split_scripts: bool = False):
    """Train a byte-level BPE tokenizer on the captions. It needs no spaces between words, so it works for Japanese.

    Args:
        captions (iterable of `str`): The captions.
        vocab_size (`int`): Tokens, the end token included.
        split_scripts (`bool`): Also split where Kanji, Hiragana and Katakana meet, which is mostly where words and
            endings do. Without it, tokens of Japanese sentences span words ("a small girl is"): there are too many
            of them for a small language model to learn from few captions.
    """
    from tokenizers import ByteLevelBPETokenizer, Regex
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    if split_scripts:
        scripts = Split(Regex(r"\p{Han}+|\p{Hiragana}+|[\p{Katakana}ー]+"), "isolated")
        tokenizer.pre_tokenizer = Sequence([scripts, tokenizer.pre_tokenizer])
    tokenizer.train_from_iterator(
        captions, vocab_size=vocab_size, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def new_captioner(
    vision_tower, processor: ClipCapProcessor, hidden_size: int = 192, num_layers: int = 3
) -> ClipCapForConditionalGeneration:
    """Build a mapping network and a small GPT-2, both with random weights, on a trained image tower."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = processor.tokenizer
    language_model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=processor.image_token_id,  # the placeholder is the first id beyond the vocabulary
            n_positions=64,
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=hidden_size // 32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        vision_tower, language_model, prefix_length=processor.prefix_length, normalize_clip_embeds=True
    )
    model.generation_config.max_new_tokens = 40  # the longest name has 20; the rest of the context is for a prompt
    with torch.no_grad():
        # The entries of a normalised embedding are tiny. Scale as if their variance were 1, or the mapping network
        # needs a thousand steps to learn it.
        first_layer: Any = model.mapping_network.fc1
        first_layer.weight *= first_layer.in_features**0.5
    return model


def train(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    data,
    epochs: float,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    embeds_noise: float = 0.02,
) -> list[float]:
    """Train on a data set with `clip_embeds` and `captions`, and return the loss of each epoch.

    Batches are small because at this size the number of steps matters most.
    """
    from transformers import PrinterCallback, Seq2SeqTrainingArguments

    with tempfile.TemporaryDirectory() as nothing_is_saved_here:
        arguments = Seq2SeqTrainingArguments(
            output_dir=nothing_is_saved_here,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            logging_steps=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=seed,
        )
        trainer = ClipCapTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            # The first reference is the name; alternative names would only make the few minutes of training harder.
            data_collator=CaptioningCollator(processor, sample_captions=False, embeds_noise=embeds_noise),
            processing_class=processor,
        )
        trainer.remove_callback(PrinterCallback)  # it prints dictionaries
        trainer.add_callback(TableCallback())
        trainer.train()
    model.config.use_cache = True  # Trainer switches the cache off in the saved config
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def score_beside_baselines(captions, embeds, references, train_embeds, train_captions, language) -> dict:
    """Score the captions and two baselines without a captioner, by exact match (percent) and CIDEr (times 100).

    Args:
        captions (`list[str]`): The captioner's captions.
        embeds (`torch.Tensor` of shape `(images, clip_embed_dim)`): Normalised embeddings of the images.
        references (`list[list[str]]`): Names of each image, the main name first.
        train_embeds (`torch.Tensor` of shape `(training images, clip_embed_dim)`): Normalised.
        train_captions (`list[list[str]]`): Names of each training image, the main name first.
        language (`str`): `"en"` is scored in words, `"ja"` in characters.
    """
    nearest, _ = nearest_images(embeds, train_embeds)
    systems = {
        "captioner": captions,
        NEAREST: [train_captions[index][0] for index in nearest.tolist()],
        MOST_COMMON: [most_common_caption(train_captions)] * len(references),
    }
    tokenizer = "characters" if language == "ja" else "python"
    scores = {}
    for name, predictions in systems.items():
        result = score_captions(predictions, references, metrics=METRICS, tokenizer=tokenizer)
        scores[name] = {metric: round(100 * float(result[metric]), 1) for metric in METRICS}
    return scores


def _save(out: Path, model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, report: dict):
    # The files of an earlier run are replaced only once the new ones are complete.
    with tempfile.TemporaryDirectory(dir=out) as folder:
        temporary = Path(folder)
        model.save_pretrained(temporary / "model")
        processor.save_pretrained(temporary / "model")
        (temporary / "scores.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        if (out / "model").exists():
            (out / "model").rename(temporary / "old")
        (temporary / "model").rename(out / "model")
        (temporary / "scores.json").replace(out / "scores.json")


def summary(out: Path, report: dict) -> str:
    """Return the scores as a table, and how to use the captioner."""
    lines = []
    for split, systems in report["scores"].items():
        lines.append(f"{SPLIT_TITLES[split]}, {len(report['captions'][split])} images")
        lines.append(f"  {'':<24}{'exact match':>12}{'CIDEr':>9}")
        for system, scores in systems.items():
            lines.append(f"  {system:<24}{scores['exact_match']:>10.1f} %{scores['cider']:>9.1f}")
    lines += [
        f"Trained and scored in {report['minutes']:.1f} minutes. The picture: {out / 'captions.png'}",
        "Use the captioner (it knows emoji drawings only):",
        "",
        "    import clipcap_hf",
        "    from transformers import pipeline",
        f'    print(pipeline("image-captioning", model="{out / "model"}")("drawing.png"))',
    ]
    return "\n".join(lines)
