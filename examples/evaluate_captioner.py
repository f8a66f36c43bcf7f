"""Caption images that have references and score the captions: `python examples/evaluate_captioner.py [CAPTIONER]`.

For published benchmarks (COCO, nocaps, Flickr8k) use `clipcap evaluate`, which also keeps to their protocol.
"""

import sys

import clipcap_hf
from clipcap_hf.data import load_emoji
from clipcap_hf.metrics import score_captions
from transformers import pipeline


captioner = pipeline("image-captioning", model=sys.argv[1] if sys.argv[1:] else clipcap_hf.EMOJI_MINI)
data = load_emoji("new_caption").select(range(64))  # or your own: clipcap_hf.data.load_captions(...)
outputs = captioner(list(data["image"]), batch_size=32, num_beams=5)
captions = [output[0]["generated_text"] for output in outputs]

# tokenizer="ptb" gives the scores that papers report; it needs Java.
scores = score_captions(captions, list(data["captions"]), metrics=("bleu", "rouge_l", "cider"), tokenizer="python")
for name in ("bleu_4", "rouge_l", "cider"):
    print(f"{name}\t{scores[name]:.3f}")
