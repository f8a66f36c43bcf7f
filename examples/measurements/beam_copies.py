"""Show how much of beam search goes into moving keys and values, and into attention.

python examples/measurements/beam_copies.py --prefix 10 40

GPT-2 small with random weights, 32 images, 5 beams, 10 tokens, CPU time. When beams change places, keys and values of
their tokens are copied, but not those of the prefix, which are the same for all beams of an image. In attention each
beam reads a copy of the prefix of its own. Beams that shared one would save, at best, four of five readings.
"""

import argparse
import time
from collections.abc import Callable

import torch
from clipcap_hf.benchmark.captioners import make_captioner
from clipcap_hf.model.growing_cache_clipcap import GrowingLayer
from clipcap_hf.processes import keep_freed_memory


class Clock:
    """CPU seconds within some functions."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds += time.process_time() - start
            return result

        return timed


def measure(prefix: int, images: int, beams: int, tokens: int, repeats: int) -> dict[str, float]:
    model, _ = make_captioner("gpt2", prefix_length=prefix)
    settings = {
        "clip_embeds": torch.randn(images, model.config.clip_embed_dim),
        "num_beams": beams,
        "max_new_tokens": tokens,
    }
    model.generate(**settings)
    total, copies, attention = Clock(), Clock(), Clock()
    place, functional = GrowingLayer.reorder_cache, torch.nn.functional
    attend = functional.scaled_dot_product_attention
    GrowingLayer.reorder_cache = copies.around(place)
    functional.scaled_dot_product_attention = attention.around(attend)
    for _ in range(repeats):
        total.around(model.generate)(**settings)
    GrowingLayer.reorder_cache, functional.scaled_dot_product_attention = place, attend
    again = attention.seconds * prefix / (prefix + tokens / 2) * (beams - 1) / beams
    text = model.config.text_config
    return {
        "seconds": total.seconds / repeats,
        "copies": copies.seconds / total.seconds,
        "attention": attention.seconds / total.seconds,
        "again": again / total.seconds,
        "megabytes": 2 * 4 * text.n_layer * text.n_embd * images * beams * prefix / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    print("| prefix | CPU seconds | copies | attention | the prefix read again, at most | memory of prefixes |")
    print("|---|---|---|---|---|---|")
    for prefix in args.prefix:
        found = measure(prefix, args.images, args.beams, args.tokens, args.repeats)
        shares = " | ".join(f"{found[part]:.1%}" for part in ("copies", "attention", "again"))
        print(f"| {prefix} | {found['seconds']:.2f} | {shares} | {found['megabytes']:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
