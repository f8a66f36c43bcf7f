"""Train a captioner: `clipcap train` as a script to copy and change.

python examples/train.py --data emoji --model emoji-mini --out emoji-captioner \
    --epochs 1

trains the embedded captioner further on the embedded data. For your own captioner and data: `--vision
openai/clip-vit-base-patch32 --text openai-community/gpt2 --data my-images`. For all options see `--help` and
examples/guides/training.md.
"""

import sys

import clipcap_hf  # noqa: F401  (before transformers: it registers the captioner there)
from clipcap_hf.cli.train import parse
from clipcap_hf.training.run import run_training


def main():
    model_args, data_args, training_args = parse(sys.argv[1:])
    scores = run_training(model_args, data_args, training_args)
    if training_args.process_index == 0:
        print(scores)


if __name__ == "__main__":
    main()
