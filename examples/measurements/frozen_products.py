"""Show what prepacked weights of a frozen language model would save in training.

python examples/measurements/frozen_products.py --threads 1

The products of GPT-2 small's 12 layers, as `ClipCapTrainer` has oneDNN compute them: forward, and backward to the
inputs (a frozen weight has no gradient). Each is timed with the weights as they are and laid out beforehand, in turns,
in CPU time. 780 and 2060 positions are those of a step of 40 captions on prefixes of 40 vectors, with all captions of
an image together and with a caption a row. A step has other work, too, so it would gain less.
"""

import argparse
import statistics
import time

import torch
from clipcap_hf.prepacking import has_onednn, multiply, prepack


LAYERS = 12
SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # in, out


def in_turns(repeats: int, *ways) -> list[float]:
    """Return the median CPU seconds of each way."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for taken, work in zip(times, ways):
            start = time.process_time()
            work()
            if turn:
                taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


def measure(positions: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each direction, with weights as they are and laid out."""
    totals = {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}
    for size_in, size_out in SHAPES:
        weight = torch.randn(size_in, size_out)
        for direction, rows in (("forward", weight.t()), ("backward", weight)):
            inputs, packed = torch.randn(positions, rows.shape[1]), prepack(rows)
            seconds = in_turns(repeats, lambda: multiply(inputs, rows), lambda: multiply(inputs, packed))
            totals[direction] = [total + LAYERS * taken for total, taken in zip(totals[direction], seconds)]
    return totals


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[780, 2060])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not has_onednn():
        raise SystemExit("This needs an x86 processor and a torch with oneDNN.")
    print("| positions | direction | as they are | laid out | saved |\n|---|---|---|---|---|")
    for positions in args.positions:
        totals = measure(positions, args.repeats)
        totals["both"] = [sum(pair) for pair in zip(*totals.values())]
        for direction, (plain, packed) in totals.items():
            times = f"{1000 * plain:.0f} ms | {1000 * packed:.0f} ms"
            print(f"| {positions} | {direction} | {times} | {1 - packed / plain:.1%} |")


if __name__ == "__main__":
    main()
