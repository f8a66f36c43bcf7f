"""Compare emoji-mini in torch, onnxruntime and onnxruntime with int8 weights: scores and speed, greedy, on the CPU.

`pip install '.[onnx]' && python examples/measurements/onnx_speed.py` captions the 904 images of the split
`new_caption` with each.
"""

import statistics
import tempfile
import time
from pathlib import Path

import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.data import load_emoji
from clipcap_hf.export import OnnxCaptioner, export_onnx
from clipcap_hf.metrics import score_captions


BATCH_SIZE = 32
data = load_emoji("new_caption")
images, references = data["image"][:], data["captions"][:]
model = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI)
processor = ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)


def caption_in_torch(batch):
    inputs = processor(images=batch, return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    return [text.strip() for text in texts]


with tempfile.TemporaryDirectory() as folder:
    float32, int8 = Path(folder) / "float32", Path(folder) / "int8"
    export_onnx(model, processor, float32)
    export_onnx(model, processor, int8, int8=True)
    captioners = {
        "torch": caption_in_torch,
        "onnxruntime": OnnxCaptioner(float32),
        "onnxruntime, int8": OnnxCaptioner(int8),
    }
    sizes = {path.name: sum(file.stat().st_size for file in path.glob("*.onnx*")) / 1e6 for path in (float32, int8)}
    captions = {name: [] for name in captioners}
    seconds = {name: [] for name in captioners}
    # Take turns, so that other work on the machine slows all alike.
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        for name, captioner in captioners.items():
            began = time.perf_counter()
            captions[name] += captioner(batch)
            seconds[name].append((time.perf_counter() - began) / len(batch))

for name in captioners:
    scores = score_captions(captions[name], references, metrics=("exact_match", "cider"), tokenizer="python")
    same = sum(a == b for a, b in zip(captions[name], captions["torch"])) / len(images)
    print(
        f"{name:18} {1000 * statistics.median(seconds[name]):6.1f} ms per image, "
        f"exact match {scores['exact_match']:.4f}, CIDEr {scores['cider']:.3f}, {same:.1%} of torch's captions"
    )
print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))
