"""Train the text tower of `emoji-mini`, by which re-ranking chooses among the captions of its beams.

The image tower stays as it is. The text tower is a bag of tokens: each token of the captioner has a vector, and the
embedding of a caption is their sum. Each training drawing must find its caption among all training captions.
With a vector of its own for "woman", "surfing" and "dark", combinations outside of training get embeddings, too. In
training, each caption also has a vector of its own, half of the time (see `continue_emoji_tower.py`). The image's
embedding gets noise, since those of training drawings lie closer to their captions than those of other drawings.
Besides, the embeddings of all training drawings are kept, in 128 bytes each (`CaptionMemory`).

    python examples/embedded/train_emoji_text_tower.py --captioner build/emoji-mini

writes `build/emoji-mini/text_tower`, in half precision, and prints how many captions of the validation split (none of
which is in training) are exact after re-ranking with several weights, and with several penalties on the captions of
training; with --hold-out-design also how many of that design's, which image tower and captioner should not have seen
either.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from clipcap_hf import CaptionMemory, CaptionReranker, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.files import write_text
from clipcap_hf.model.bag_of_tokens_clipcap import BagOfTokensTextConfig, BagOfTokensTextModel
from continue_emoji_tower import CaptionVectors, fit
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from train_emoji_tower import hold_out


logger = logging.getLogger("train_emoji_text_tower")
WEIGHTS = (0, 5, 10, 15, 20, 30, 50, 100, 200)
PENALTIES = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08)
BEAMS = 10


def train(embeds: Tensor, names: list[str], tokenizer, args) -> Tensor:
    """Train token vectors, by which each image finds its caption among all training captions."""
    captions = sorted(set(names))
    index = {caption: number for number, caption in enumerate(captions)}
    texts = CaptionVectors(captions, len(captions), tokenizer, embeds.shape[1], args)
    fit(texts, embeds, torch.tensor([index[name] for name in names]), args.steps, args.noise)
    vectors = texts.vectors.detach()
    vectors[tokenizer.all_special_ids] = 0
    return vectors


def save(vectors: Tensor, memory: CaptionMemory, args, folder: Path) -> None:
    """Save in half precision, with the captions of training and how re-ranking works unless told otherwise."""
    config = BagOfTokensTextConfig(
        vocab_size=len(vectors),
        projection_dim=vectors.shape[1],
        rerank_weight=args.rerank_weight,
        rerank_seen_penalty=args.rerank_seen_penalty,
        rerank_memory_weight=memory.weight,
        rerank_min_cosine=memory.min_cosine,
        dtype="float32",
    )
    tower = BagOfTokensTextModel(config)
    tower.vectors.weight.data = vectors.half()
    tower.save_pretrained(folder)
    memory.save(folder)
    settings = json.loads((folder / "config.json").read_text())
    write_text(folder / "config.json", json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def search(model, processor, embeds: Tensor) -> tuple[list[list[str]], Tensor]:
    """Return the captions of each image's beams, and the beam search's scores (images, beams)."""
    captions, scores = [], []
    for batch in tqdm(embeds.split(32), desc="search", leave=False):
        found = model.generate(
            clip_embeds=batch,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            return_dict_in_generate=True,
            output_scores=True,
        )
        texts = [text.strip() for text in processor.batch_decode(found.sequences, skip_special_tokens=True)]
        captions += [texts[start : start + BEAMS] for start in range(0, len(texts), BEAMS)]
        scores.append(found.sequences_scores.view(len(batch), BEAMS))
    return captions, torch.cat(scores)


def exact(reranker: CaptionReranker, embeds: Tensor, captions: list[list[str]], scores: Tensor, names) -> float:
    best = (scores + reranker.weight * reranker.rate(embeds, captions)).argmax(1).tolist()
    return 100 * sum(texts[row] == name for texts, row, name in zip(captions, best, names)) / len(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", type=Path, required=True, help="folder that train_emoji_mini.py wrote")
    parser.add_argument("--hold-out-design", help="train without this design and re-rank on it, with several weights")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.04, help="standard deviation of noise on the embeddings")
    parser.add_argument("--token-dropout", type=float, default=0.1, help="share of the tokens that a step leaves out")
    parser.add_argument("--own-dropout", type=float, default=0.5, help="the same for the captions' own vectors")
    parser.add_argument("--rerank-weight", type=float, default=10.0, help="saved as the tower's default")
    parser.add_argument("--rerank-seen-penalty", type=float, default=0.04, help="the same, for captions of training")
    parser.add_argument("--rerank-memory-weight", type=float, default=50.0, help="the same, of a caption's drawings")
    parser.add_argument(
        "--rerank-min-cosine", type=float, default=0.62, help="the same, of a new caption with its image"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = ClipCapForConditionalGeneration.from_pretrained(args.captioner).eval()
    processor = ClipCapProcessor.from_pretrained(args.captioner)
    data = load_emoji()
    train_rows, held_out = data["train"], {"new captions": data["validation"]}
    if args.hold_out_design:
        train_rows, held_out["held-out design"] = hold_out(train_rows, args.hold_out_design)

    def embed(rows) -> Tensor:
        return F.normalize(embed_images(model, processor, rows["image"]), dim=-1)

    torch.manual_seed(args.seed)
    names = [captions[0] for captions in train_rows["captions"]]
    train_embeds = embed(train_rows)
    settings = {"weight": args.rerank_memory_weight, "min_cosine": args.rerank_min_cosine}
    memory = CaptionMemory.from_embeds(train_embeds, names, **settings)
    save(train(train_embeds, names, processor.tokenizer, args), memory, args, args.captioner / "text_tower")

    reranker = CaptionReranker.from_pretrained(model, processor)
    tower = reranker.text_tower
    for title, rows in held_out.items():
        embeds, own = embed(rows), [captions[0] for captions in rows["captions"]]
        captions, scores = search(model, processor, embeds)
        pairs = [(weight, 0.0) for weight in WEIGHTS] + [(args.rerank_weight, penalty) for penalty in PENALTIES]
        for weight, penalty in pairs:
            found = exact(CaptionReranker(tower, processor, weight, penalty), embeds, captions, scores, own)
            logger.info("%s: weight %g, penalty %g, exact %.1f %%", title, weight, penalty, found)
        best = caption_embeds(model, processor, embeds, num_beams=BEAMS, rerank=reranker, progress=False)
        right = 100 * sum(caption == name for caption, name in zip(best, own)) / len(own)
        logger.info("%s: as saved, with the memory, exact %.1f %%", title, right)


if __name__ == "__main__":
    main()
