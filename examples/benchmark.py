"""Measure how fast this machine captions, at real sizes with random weights: the same as `clipcap benchmark`.

python examples/benchmark.py --language-model gpt2 --repeats 3 --out clipcap-benchmark
"""

import sys

from clipcap_hf.cli import main


sys.exit(main(["benchmark", *sys.argv[1:]]))
