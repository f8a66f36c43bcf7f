"""Compare ways to run image towers on a CPU: `python examples/measurements/encoder_speed.py --threads 1`.

Each tower is run in float32 as it is (eager), with prepacked weights as `clipcap caption` does, compiled by
`torch.compile` with frozen weights (needs a C++ compiler), by ONNX Runtime and by OpenVINO (`pip install onnxruntime
onnxscript openvino`); ways that are not installed are left out. All take turns in one process, and CPU time is
counted, so other work on the machine matters little. ViT-B/32 has random weights; the convolutional tower is that of
`emoji-mini`. Pixels are random; the embeddings are compared with the eager ones.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import clipcap_hf
import torch
from clipcap_hf import ClipCapForConditionalGeneration, prepack_weights
from clipcap_hf.model.modeling_vision import embed_pixels, place_pixels
from clipcap_hf.processes import keep_freed_memory
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


class Encoder(nn.Module):
    """An image tower that returns the embeddings only, (batch, dim)."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return embed_pixels(self.tower, place_pixels(pixel_values, "cpu"), "pooled")[0]


def towers() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Return for each tower how to make it, and the size of its images."""

    def emoji() -> nn.Module:
        return ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI).vision_tower

    def vit() -> nn.Module:
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32))

    return {"ViT-B/32": (vit, 224), "emoji-mini": (emoji, 128)}


def compiled(encoder: nn.Module, pixels: torch.Tensor) -> Callable:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(encoder)


def exported(encoder: nn.Module, pixels: torch.Tensor, folder: str) -> str:
    path = str(Path(folder) / "encoder.onnx")
    torch.onnx.export(encoder, (pixels,), path, input_names=["pixels"], dynamo=True, verbose=False)
    return path


def onnx_runtime(encoder: nn.Module, pixels: torch.Tensor, folder: str, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        exported(encoder, pixels, folder), options, providers=["CPUExecutionProvider"]
    )
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def openvino(encoder: nn.Module, pixels: torch.Tensor, folder: str, threads: int) -> Callable:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(exported(encoder, pixels, folder), "CPU", settings)
    return lambda pixels: torch.from_numpy(model([pixels.numpy()])[0])


def ways(make: Callable[[], nn.Module], pixels: torch.Tensor, folder: str, threads: int) -> dict[str, Callable]:
    """Make the encoder in each way; they share no state, since some change the model."""

    def fresh() -> nn.Module:
        return Encoder(make()).eval()

    packed = fresh()
    found: dict[str, Callable] = {"eager": fresh(), "prepacked": packed}
    prepack_weights(packed)
    found["compiled, frozen"] = compiled(fresh(), pixels)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        found["ONNX Runtime"] = onnx_runtime(fresh(), pixels, folder, threads)
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
        found["OpenVINO"] = openvino(fresh(), pixels, folder, threads)
    return found


def measure(encoders: dict[str, Callable], pixels: torch.Tensor, rounds: int):
    expected = encoders["eager"](pixels)
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    difference = {name: (encoder(pixels) - expected).abs().max() for name, encoder in encoders.items()}
    for _ in range(rounds):
        for name, encoder in encoders.items():
            began = time.process_time()
            encoder(pixels)
            taken[name].append((time.process_time() - began) / len(pixels))
    for name, seconds in taken.items():
        ratio = statistics.median(eager / own for eager, own in zip(taken["eager"], seconds))
        print(
            f"    {name:<18}{1000 * statistics.median(seconds):8.2f} ms of CPU per image, {ratio:5.2f} times as fast, "
            f"largest difference {difference[name]:.1e} (embeddings of {expected.abs().mean():.2f} on average)",
            flush=True,
        )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each way")
    parser.add_argument("--tower", choices=list(towers()), help="measure one tower only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    for name, (make, size) in towers().items():
        if arguments.tower in (None, name):
            torch.manual_seed(0)
            pixels = torch.randn(arguments.batch_size, 3, size, size)
            print(f"{name}, batches of {arguments.batch_size}, {arguments.threads} threads", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                measure(ways(make, pixels, folder, arguments.threads), pixels, arguments.rounds)


if __name__ == "__main__":
    main()
