"""Compare the speed and the scores of BLEU, ROUGE-L and CIDEr with pycocoevalcap's, on made-up captions.

pip install 'clipcap-hf[metrics]'
python examples/measurements/metrics_speed.py --images 40000
"""

import argparse
import random
import time

import numpy as np
from clipcap_hf.metrics import score_captions
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge


def make_captions(images: int, references: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Make captions of 8 to 14 words, half of them shared with the references; word frequencies follow a power law."""
    rng = random.Random(seed)
    words = [f"w{min(int(rng.paretovariate(0.6)), 9999)}" for _ in range(200_000)]
    captions, groups = [], []
    for _ in range(images):
        base = rng.choices(words, k=rng.randint(8, 14))
        vary = lambda: " ".join(word if rng.random() < 0.5 else rng.choice(words) for word in base)  # noqa: E731
        captions.append(vary())
        groups.append([vary() for _ in range(references)])
    return captions, groups


def timed(work):
    """Return the result, and the CPU seconds that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--references", type=int, default=5)
    arguments = parser.parse_args()
    captions, groups = make_captions(arguments.images, arguments.references)
    gts, res = dict(enumerate(groups)), {image: [caption] for image, caption in enumerate(captions)}

    ours, seconds = timed(lambda: score_captions(captions, groups, ("bleu", "rouge_l", "cider"), "none"))
    (_, bleu), bleu_seconds = timed(lambda: Bleu(4).compute_score(gts, res, verbose=0))
    (_, rouge), rouge_seconds = timed(lambda: Rouge().compute_score(gts, res))
    (_, cider), cider_seconds = timed(lambda: Cider().compute_score(gts, res))

    theirs = {**{f"bleu_{order + 1}": bleu[order] for order in range(4)}, "rouge_l": rouge, "cider": cider}
    for name, values in theirs.items():
        difference = np.abs(ours[f"{name}_per_image"] - np.array(values)).max()
        print(f"{name}: largest difference for an image {difference:.1e}")
        if difference > 1e-9:
            raise SystemExit(f"{name} differs")
    their_seconds = bleu_seconds + rouge_seconds + cider_seconds
    print(f"{arguments.images:,} captions with {arguments.references} references each, CPU seconds:")
    print(
        f"pycocoevalcap {their_seconds:.1f} "
        f"(BLEU {bleu_seconds:.1f}, ROUGE-L {rouge_seconds:.1f}, CIDEr {cider_seconds:.1f})"
    )
    print(f"clipcap_hf    {seconds:.1f}, {their_seconds / seconds:.1f} times as fast")


if __name__ == "__main__":
    main()
