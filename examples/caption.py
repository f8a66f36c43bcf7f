"""Caption images with one line of `pipeline`: `python examples/caption.py drawing.png another.png`."""

import sys

import clipcap_hf
from transformers import pipeline


captioner = pipeline("image-captioning", model=clipcap_hf.EMOJI_MINI)  # or your own: a folder or a Hub id
paths = sys.argv[1:]
for path, captions in zip(paths, captioner(paths, batch_size=8, num_beams=5)):
    print(f"{path}\t{captions[0]['generated_text']}")
