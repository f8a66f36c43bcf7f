r"""Go on training the image tower of `train_emoji_tower.py`, against captions that have a vector of their own.

Each drawing must find its caption among all training captions, as before. Here the embedding of a caption is the sum
of the vectors of its tokens and, half of the time, of a vector for the caption as a whole. So the sum alone must be
good enough for captions that training never saw, but need not stretch to what no token says ("hot dog"). The vectors
are first fitted to the embeddings of the tower. They serve this training only: `train_emoji_text_tower.py` trains
those of the text tower that is saved with the captioner.

    python examples/embedded/train_emoji_tower.py --output build/tower-1 --minutes 37
    python examples/embedded/continue_emoji_tower.py --tower build/tower-1 --output build/tower-2 --minutes 52

took 52 minutes on one CPU core (1,241 steps) and prints which of all captions each drawing of the validation split is
nearest to. The published tower went on once more, with the drawings of `fetch_icons.py`:

    python examples/embedded/fetch_icons.py --output build/icons.parquet
    python examples/embedded/continue_emoji_tower.py --tower build/tower-2 --output build/tower-3 --steps 2000 \
        --further build/icons.parquet

took 67 minutes on one busy core. With --hold-out-design a training design plays the unseen one; all commands need it.
"""

import argparse
import logging
import math
import random
from pathlib import Path

import clipcap_hf  # noqa: F401  first, see train_emoji_tower
import torch
from clipcap_hf.demo import train_tokenizer
from clipcap_hf.processes import keep_freed_memory
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_emoji_tower import (
    add_training_options,
    build_tower,
    embed,
    read_drawings,
    retrieval,
    train,
    write_checkpoint,
)


logger = logging.getLogger("continue_emoji_tower")


class CaptionVectors(nn.Module):
    """Embeddings of captions: the sum of their tokens' vectors and, for training captions, a vector of their own."""

    def __init__(self, captions: list[str], known: int, tokenizer, embed_dim: int, args):
        super().__init__()
        bags = [sorted(set(ids)) for ids in tokenizer(captions)["input_ids"]]
        starts = torch.tensor([0] + [len(bag) for bag in bags[:-1]]).cumsum(0)
        self.register_buffer("tokens", torch.tensor([token for bag in bags for token in bag]), persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.vectors = nn.Parameter(0.5 * embed_dim**-0.5 * torch.randn(len(tokenizer), embed_dim))
        self.own = nn.Parameter(torch.zeros(known, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.image_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.token_dropout, self.own_dropout = args.token_dropout, args.own_dropout

    def forward(self, index: slice) -> Tensor:
        vectors, own = self.vectors, self.own
        if self.training:
            vectors = vectors * (torch.rand(len(vectors), 1) > self.token_dropout)
            own = own * (torch.rand(len(own), 1) > self.own_dropout)
        texts = F.embedding_bag(self.tokens, vectors, self.starts, mode="sum")
        return F.normalize(torch.cat([texts[: len(own)] + own, texts[len(own) :]]), dim=1)[index]


def fit(texts: CaptionVectors, embeds: Tensor, concept: Tensor, steps: int, noise: float, lr: float = 1e-2):
    """Fit the vectors to fixed embeddings of drawings."""
    optimizer = torch.optim.AdamW(texts.parameters(), lr=lr, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    texts.train()
    for step in range(1, steps + 1):
        images = torch.randint(len(embeds), (256,))
        seen = F.normalize(embeds[images] + noise * torch.randn(256, embeds.shape[1]), dim=1)
        loss = F.cross_entropy(texts.logit_scale.exp() * seen @ texts(slice(len(texts.own))).T, concept[images])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps:
            logger.info("fit, step %d: loss %.3f", step, loss.item())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder that train_emoji_tower.py wrote")
    add_training_options(parser)
    parser.add_argument("--fit-steps", type=int, default=200, help="steps of the captions' vectors alone")
    parser.add_argument("--noise", type=float, default=0.04, help="standard deviation, on the embeddings of the fit")
    parser.add_argument("--token-dropout", type=float, default=0.1, help="share of the tokens that a step leaves out")
    parser.add_argument("--own-dropout", type=float, default=0.5, help="the same for the captions' own vectors")
    parser.set_defaults(small_share=0.25, freeze_at=0.0, lr=3e-4, head_lr=1.5e-3, drop_path=0.1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    keep_freed_memory()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    drawings, splits, known, other = read_drawings(args.hold_out_design, further=args.further)
    state = load_file(args.tower / "open_clip_model.safetensors")
    embed_dim = state["visual.head.proj.weight"].shape[0]
    model_cfg, visual = build_tower(embed_dim, args.drop_path)
    visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    texts = CaptionVectors(known + other, len(known), train_tokenizer(drawings.captions), embed_dim, args)
    fit(texts, embed(visual.eval(), drawings), drawings.concept, args.fit_steps, args.noise)
    visual, texts = train(visual, texts, drawings, len(known), args)
    write_checkpoint(args.output, model_cfg, visual)
    with torch.no_grad():
        texts = texts.eval()(slice(None))
    for name, split in splits.items():
        logger.info("%s: %s", name, retrieval(embed(visual, split), texts, split.concept))


if __name__ == "__main__":
    main()
