"""Compare cross entropy, self-critical and text-only training on the embedded emoji, on the held-out splits.

python examples/measurements/training_objectives.py --out build/objectives

`clipcap train` trains everything, on embeddings that are computed once; the commands are printed. The comparisons are:

- *Self-critical*: `emoji-mini` as shipped, after more cross entropy, and after as many self-critical steps.
- *Text only*: a new mapping network and language model, trained on images or on captions alone. emoji-mini's tower has
  no text tower, so a small one is trained first, contrastively against the frozen image embeddings of the training
  split. It sees pairs, as every CLIP does; the captioner sees captions only. At `--noise` 0 the two kinds of
  embeddings lie apart.

Scores are of greedy captions: CIDEr on words split in Python, times 100, and percent of captions that equal a
reference.
"""

import argparse
import json
import shlex
from pathlib import Path

import clipcap_hf  # noqa: F401  (before transformers)
import torch
from clipcap_hf import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.cli import main as clipcap
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import new_captioner
from clipcap_hf.files import write_text
from clipcap_hf.metrics import score_captions
from clipcap_hf.training.rows import evenly_spread
from datasets import DatasetDict
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, set_seed


TEST_SPLITS = ("new_design", "new_caption")


def embedded_emoji(model, processor, train_images: int, test_images: int) -> DatasetDict:
    splits = {}
    for split, rows in load_emoji().items():
        rows = evenly_spread(rows, train_images if split == "train" else test_images)
        embeds = F.normalize(embed_images(model, processor, rows["image"], desc=f"Encoding {split}"), dim=-1)
        splits[split] = rows.select_columns(["captions"]).add_column("clip_embeds", list(embeds.numpy()))
    return DatasetDict(splits)


def train_text_tower(folder: Path, rows, steps: int, batch_size: int = 256):
    """Train a small text tower for the frozen image embeddings, with CLIP's loss over distinct captions."""
    tokenizer = AutoTokenizer.from_pretrained(EMOJI_MINI)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
    )
    width = len(rows[0]["clip_embeds"])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        projection_dim=width,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    tower = CLIPTextModelWithProjection(config)
    images = torch.tensor(rows["clip_embeds"])
    by_name = {}
    for index, captions in enumerate(rows["captions"]):
        by_name.setdefault(captions[0], []).append(index)
    names = list(by_name)
    scale = torch.nn.Parameter(torch.tensor(20.0).log())
    optimizer = torch.optim.AdamW([*tower.parameters(), scale], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        picked = [names[i] for i in torch.randperm(len(names))[:batch_size]]
        shown = images[[by_name[name][int(torch.randint(len(by_name[name]), ()))] for name in picked]]
        inputs = tokenizer(picked, padding=True, truncation=True, max_length=48, return_tensors="pt")
        texts = F.normalize(
            tower(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds, dim=-1
        )
        logits = scale.exp() * texts @ shown.T
        target = torch.arange(len(picked))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    print(f"text tower: contrastive loss {loss.item():.3f} over {len(picked)} captions after {steps} steps")
    tower.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def score(folder: str, data: DatasetDict) -> dict:
    model = ClipCapForConditionalGeneration.from_pretrained(folder).eval()
    processor = ClipCapProcessor.from_pretrained(folder)
    scores = {}
    for split in TEST_SPLITS:
        captions = caption_embeds(model, processor, torch.tensor(data[split]["clip_embeds"]), progress=False)
        found = score_captions(captions, list(data[split]["captions"]), ("cider", "exact_match"), "python")
        scores[split] = {name: round(100 * float(found[name]), 1) for name in ("cider", "exact_match")}
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all results")
    parser.add_argument("--train-images", type=int, help="how many of the 11,080 (default: all)")
    parser.add_argument("--test-images", type=int, help="how many of each held-out split (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="steps of self-critical training")
    parser.add_argument(
        "--text-only-steps", type=int, default=1500, help="steps of the new captioners and of the text tower"
    )
    parser.add_argument("--noise", type=float, nargs="*", default=[0.02, 0.05], help="levels to try for text only")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    set_seed(arguments.seed)

    model, processor = (
        part.from_pretrained(EMOJI_MINI) for part in (ClipCapForConditionalGeneration, ClipCapProcessor)
    )
    data = embedded_emoji(model, processor, arguments.train_images, arguments.test_images)
    data.save_to_disk(arguments.out / "data")
    train_text_tower(arguments.out / "text-tower", data["train"], arguments.text_only_steps)
    fresh = new_captioner(model.vision_tower, processor)
    fresh.save_pretrained(arguments.out / "new")
    processor.save_pretrained(arguments.out / "new")

    common = (
        f"--data {shlex.quote(str(arguments.out / 'data'))} --seed {arguments.seed} "
        "--eval_strategy no --save_strategy no "
        "--per_device_train_batch_size 32 --warmup_steps 0.1 --disable_tqdm True --num_samples 0 --references first"
    )
    more = f"--model emoji-mini --max_steps {arguments.steps}"
    new = f"--model {shlex.quote(str(arguments.out / 'new'))}"
    new += f" --max_steps {arguments.text_only_steps} --learning_rate 2e-3"
    text_only = f"{new} --text_only --text_tower {shlex.quote(str(arguments.out / 'text-tower'))}"
    recipes = {
        "emoji-mini, more cross entropy": f"{more} --learning_rate 1e-4 --embeds_noise 0.02",
        "emoji-mini, self-critical": f"{more} --learning_rate 1e-4 --objective scst",
        "new, trained on images": f"{new} --embeds_noise 0.02",
    }
    recipes |= {f"new, text only, noise {noise}": f"{text_only} --embeds_noise {noise}" for noise in arguments.noise}
    scores = {"emoji-mini": score(EMOJI_MINI, data)}
    for name, recipe in recipes.items():
        out = str(arguments.out / name.replace(", ", "-").replace(" ", "_"))
        command = ["train", *shlex.split(f"{recipe} {common}"), "--output_dir", out]
        print("clipcap", shlex.join(command), flush=True)
        if status := clipcap(command):
            return status
        scores[name] = score(out, data)
        write_text(arguments.out / "scores.json", json.dumps(scores, indent=1))
    print(f"{'':<34}" + "".join(f"{split + ': CIDEr, exact':>28}" for split in TEST_SPLITS))
    for name, found in scores.items():
        cells = (f"{found[split]['cider']:.1f}, {found[split]['exact_match']:.1f} %" for split in TEST_SPLITS)
        print(f"{name:<34}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
