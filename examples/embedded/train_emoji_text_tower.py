"""Train the text tower of `emoji-mini`, by which re-ranking chooses among the captions of its beams.

The image tower stays as it is. The text tower is a bag of tokens: each token of the captioner has a vector, and the
embedding of a caption is their sum. Each training drawing must find its caption among all training captions.
With a vector of its own for "woman", "surfing" and "dark", combinations outside of training get embeddings, too. The
image's embedding is moved as if another designer had drawn the image, as in the training of the captioner
(`clipcap_hf.demo.DesignShift`), some tokens are left out at random, and the vectors saved are a moving average.

    python examples/embedded/train_emoji_text_tower.py --captioner build/emoji-mini

writes `build/emoji-mini/text_tower`, in half precision, and prints how many captions of the validation split (none of
which is in training) are exact after re-ranking with several weights; with --hold-out-design also how many of that
design's, which image tower and captioner should not have seen either.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import torch
from clipcap_hf import CaptionReranker, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import DesignShift
from clipcap_hf.files import write_text
from clipcap_hf.model.bag_of_tokens_clipcap import BagOfTokensTextConfig, BagOfTokensTextModel
from torch import Tensor
from torch.nn import functional as F


logger = logging.getLogger("train_emoji_text_tower")
WEIGHTS = (0, 2, 5, 10, 15, 20, 30, 50)
BEAMS = 10


def count_tokens(captions: list[str], tokenizer) -> Tensor:
    """Tell which tokens each caption holds: zeros and ones (captions, vocabulary)."""
    counts = torch.zeros(len(captions), len(tokenizer))
    for row, ids in zip(counts, tokenizer(captions)["input_ids"]):
        row[ids] = 1
    return counts


def train(embeds: Tensor, names: list[str], tokenizer, args) -> Tensor:
    """Train token vectors, by which each image finds its caption among all training captions; return their average."""
    captions = sorted(set(names))
    index = {caption: number for number, caption in enumerate(captions)}
    target = torch.tensor([index[name] for name in names])
    counts = count_tokens(captions, tokenizer).to_sparse_csr()
    shift = DesignShift(embeds, names)
    vectors = torch.nn.Parameter(0.5 * embeds.shape[1] ** -0.5 * torch.randn(len(tokenizer), embeds.shape[1]))
    log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.AdamW([vectors, log_scale], lr=args.lr, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    average, start = torch.zeros_like(vectors), time.process_time()
    for step in range(1, args.steps + 1):
        images = torch.randint(len(embeds), (args.batch_size,))
        seen = torch.stack(shift({"index": images.tolist(), "captions": []})["clip_embeds"])
        seen = F.normalize(seen + args.noise * torch.randn_like(seen), dim=-1)
        kept = torch.rand(len(vectors), 1) > args.dropout  # tokens must not rely on each other
        texts = F.normalize(counts @ (vectors * kept), dim=-1)
        loss = F.cross_entropy(log_scale.exp() * seen @ texts.T, target[images])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            log_scale.clamp_(0, math.log(100))
            average.lerp_(vectors, 1 - min(0.98, step / (step + 9)))
        if step % 50 == 0 or step == args.steps:
            logger.info("step %d: loss %.3f, %.0f CPU s", step, loss, time.process_time() - start)
    average[tokenizer.all_special_ids] = 0
    return average


def save(vectors: Tensor, weight: float, folder: Path) -> None:
    """Save in half precision, with the weight that re-ranking uses unless told otherwise."""
    config = BagOfTokensTextConfig(
        vocab_size=len(vectors), projection_dim=vectors.shape[1], rerank_weight=weight, dtype="float32"
    )
    tower = BagOfTokensTextModel(config)
    tower.vectors.weight.data = vectors.half()
    tower.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    write_text(folder / "config.json", json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def exact(model, processor, embeds: Tensor, names: list[str], weight: float) -> float:
    reranker = CaptionReranker.from_pretrained(model, processor, weight=weight)
    found = caption_embeds(model, processor, embeds, progress=False, num_beams=BEAMS, rerank=reranker)
    return 100 * sum(caption == name for caption, name in zip(found, names)) / len(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", type=Path, required=True, help="folder that train_emoji_mini.py wrote")
    parser.add_argument("--hold-out-design", help="train without this design and re-rank on it, with several weights")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of noise on the embeddings")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of the tokens that a step leaves out")
    parser.add_argument("--rerank-weight", type=float, default=15.0, help="saved as the tower's default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = ClipCapForConditionalGeneration.from_pretrained(args.captioner).eval()
    processor = ClipCapProcessor.from_pretrained(args.captioner)
    data = load_emoji()
    train_rows, held_out = data["train"], {"new captions": data["validation"]}
    if args.hold_out_design:
        is_held_out = [design == args.hold_out_design for design in train_rows["design"]]
        held_out["held-out design"] = train_rows.select([i for i, out in enumerate(is_held_out) if out])
        train_rows = train_rows.select([i for i, out in enumerate(is_held_out) if not out])

    def embed(rows) -> Tensor:
        return F.normalize(embed_images(model, processor, rows["image"]), dim=-1)

    torch.manual_seed(args.seed)
    names = [captions[0] for captions in train_rows["captions"]]
    vectors = train(embed(train_rows), names, processor.tokenizer, args)
    save(vectors, args.rerank_weight, args.captioner / "text_tower")

    for title, rows in held_out.items():
        embeds, own = embed(rows), [captions[0] for captions in rows["captions"]]
        for weight in WEIGHTS:
            found = exact(model, processor, embeds, own, weight)
            logger.info("%s: weight %g, exact %.1f %%", title, weight, found)


if __name__ == "__main__":
    main()
