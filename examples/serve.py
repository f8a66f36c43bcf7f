"""Serve a captioner as a page in the browser, on this machine or as a Space; set CAPTIONER to a Hub id.

On the Hub: make a Gradio Space with this file as app.py, and a requirements.txt with the line clipcap-hf[serve].
On this machine: python examples/serve.py
"""

import os

import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.serve import build_app, launch


CAPTIONER = os.environ.get("CAPTIONER", clipcap_hf.EMOJI_MINI)

model = ClipCapForConditionalGeneration.from_pretrained(CAPTIONER).eval()
processor = ClipCapProcessor.from_pretrained(CAPTIONER)
app = build_app(model, processor, title="Image captioning with ClipCap")

if __name__ == "__main__":
    # A Space sets GRADIO_SERVER_NAME to tell gradio where to listen.
    launch(app, host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    app.block_thread()
