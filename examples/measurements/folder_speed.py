"""Show how near captioning a folder comes to the work of its stages: `folder_speed.py FOLDER --model photo-mini`.

Each round measures the stages by themselves, batch by batch: reading (decoding, resizing, telling drawings), encoding,
and writing captions. Then it captions the same files as `clipcap caption` does, in another process.
CPU time is counted, that of the readers included and loading left out, so other work on the machine matters little:
what a folder takes beyond the sum of its stages is overhead. On an idle machine seconds by the clock say more. They
are compared with the least that this machine can do: the work of all stages divided by the cores, or the model's part
if that takes longer, since only reading is done beside it. Freed memory is kept unless `--return-memory` is given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from clipcap_hf.captioning import caption_files, caption_pixels
from clipcap_hf.cli.arguments import load_captioner
from clipcap_hf.drawings import looks_drawn
from clipcap_hf.files import find_images
from clipcap_hf.model.images_clipcap import load_image
from clipcap_hf.model.modeling_vision import place_pixels
from clipcap_hf.processes import cores, default_workers, keep_freed_memory


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_stages(model, processor, paths: list[str], batch_size: int) -> dict[str, float]:
    seconds = {"read": 0.0, "encode": 0.0, "encode and write": 0.0}

    def timed(stage: str, work):
        start = time.process_time()
        result = work()
        seconds[stage] += time.process_time() - start
        return result

    def read(path: str) -> torch.Tensor:
        image = load_image(path)
        looks_drawn(image)
        return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode(pixels: list[torch.Tensor]) -> torch.Tensor:
        return model.get_clip_embeds(place_pixels(torch.stack(pixels), model.device))

    for start in range(0, len(paths), batch_size):
        pixels = [timed("read", lambda path=path: read(path)) for path in paths[start : start + batch_size]]
        timed("encode", lambda pixels=pixels: encode(pixels))
        timed("encode and write", lambda pixels=pixels: caption_pixels(model, processor, pixels))
    both = seconds.pop("encode and write")
    return {**seconds, "write": both - seconds["encode"]}


def measure_folder(model, processor, paths: list[str], batch_size: int, workers: int) -> dict[str, float]:
    cpu, clock = cpu_seconds(), time.perf_counter()
    results = caption_files(model, processor, paths, batch_size, workers, progress=False, tell_drawings=True)
    failed = [result.path for result in results if result.error]
    assert not failed, failed
    return {"folder": cpu_seconds() - cpu, "clock": time.perf_counter() - clock}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--model", default="photo-mini")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--return-memory", action="store_true")
    parser.add_argument("--only", choices=("stages", "folder"), help="measure one thing once, and print it as JSON")
    return parser.parse_args()


def measure(args: argparse.Namespace, paths: list[str], workers: int) -> dict[str, float]:
    if not args.return_memory:
        keep_freed_memory()
    model, processor = load_captioner(args.model, "cpu")
    if args.only == "folder":
        return measure_folder(model, processor, paths, args.batch_size, workers)
    measure_stages(model, processor, paths[: args.batch_size], args.batch_size)  # lays the weights out
    return measure_stages(model, processor, paths, args.batch_size)


def in_new_process(what: str) -> dict[str, float]:
    """Measure in a process of its own: one that has captioned already takes longer to start others."""
    command = [sys.executable, *sys.argv, "--only", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main():
    args = parse_arguments()
    paths = find_images(args.paths)[0][: args.images]
    workers = default_workers(len(paths), device=torch.device("cpu")) if args.workers is None else args.workers
    if args.only:
        print(json.dumps(measure(args, paths, workers)))
        return
    rounds = []
    for _ in range(args.rounds):
        stages, folder = in_new_process("stages"), in_new_process("folder")
        work = sum(stages.values())
        least = max(work / cores(), (stages["encode"] + stages["write"]) / torch.get_num_threads())
        shares = {"share of CPU time": work / folder["folder"], "share of the clock": least / folder["clock"]}
        rounds.append({**stages, "all stages": work, **folder, **shares})
    print(f"{args.model}, {len(paths)} files, {workers} workers, {cores()} cores: seconds, medians of {args.rounds}")
    for name in rounds[0]:
        values = [row[name] for row in rounds]
        print(f"  {name}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
