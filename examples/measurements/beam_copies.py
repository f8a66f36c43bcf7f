"""Show how much of beam search goes into the copies of the prefix that each beam has of its own.

python examples/measurements/beam_copies.py --prefix 10 40

GPT-2 small with random weights, 32 images, 5 beams, 10 tokens. When beams change places, the keys and values of all
their tokens are copied, those of the prefix among them; and each beam reads its own copy of the prefix in attention.
torch's profiler times both. Beams that shared the prefix would save the prefix's share of the copies and, at best, of
attention's time: four of five readings.
"""

import argparse

import torch
from clipcap_hf.benchmark.captioners import make_captioner
from clipcap_hf.model.growing_cache_clipcap import ROOM
from torch.profiler import ProfilerActivity, profile


def self_seconds(events, *words: str) -> float:
    return sum(event.self_cpu_time_total for event in events if any(word in event.key for word in words)) / 1e6


def measure(prefix: int, images: int, beams: int, tokens: int, repeats: int) -> dict[str, float]:
    model, _ = make_captioner("gpt2", prefix_length=prefix)
    embeds = torch.randn(images, model.config.clip_embed_dim)
    settings = {"clip_embeds": embeds, "num_beams": beams, "max_new_tokens": tokens}
    model.generate(**settings)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            model.generate(**settings)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events) / 1e6
    copies, attention = self_seconds(events, "index_select"), self_seconds(events, "attention")
    copied = prefix + ROOM + (tokens - 1 > ROOM) * ROOM  # tokens in the buffers
    read = prefix + tokens / 2  # tokens that attention reads, on average
    saved = copies * prefix / copied + attention * prefix / read * (beams - 1) / beams
    text = model.config.text_config
    size = 2 * text.n_layer * images * beams * prefix * text.n_embd * 4
    return {"copies": copies / total, "attention": attention / total, "saved": saved / total, "megabytes": size / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    print("| prefix | copies when beams change places | attention | sharing saves at most | size of the copies |")
    print("|---|---|---|---|---|")
    for prefix in args.prefix:
        found = measure(prefix, args.images, args.beams, args.tokens, args.repeats)
        shares = " | ".join(f"{found[part]:.1%}" for part in ("copies", "attention", "saved"))
        print(f"| {prefix} | {shares} | {found['megabytes']:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
