"""Captions of a benchmark's images: spread over processes, and taken up again where an interrupted run stopped."""

import json
from contextlib import nullcontext
from pathlib import Path

from ..captioning import caption_images
from .files import digest
from .protocol import EvaluationSet, Subset, listed


def caption_evaluation_set(
    model,
    processor,
    data: EvaluationSet,
    folder: str | Path,
    settings: dict,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
    allow_subset: bool = False,
    **generate_kwargs,
) -> dict[int | str, str]:
    """The best caption of each image, by image id.

    Every caption is appended to a file in `folder` as soon as it is there; a later run with the same settings takes
    them from it. Under `torchrun`, each process captions its share, and all of them return all captions.

    Args:
        model ([`ClipCapForConditionalGeneration`]), processor ([`ClipCapProcessor`]): the captioner.
        data: with images.
        folder: for the files of captions; see [`remove_progress`].
        settings: everything that the captions depend on; only captions of the same settings are taken up.
        batch_size, num_workers, progress, generate_kwargs: see `clipcap_hf.captioning.caption_images`.
        allow_subset: leave out images that cannot be read, which otherwise end the run.

    Raises:
        ValueError: images that cannot be read. The captions of the others are kept for the next run.
    """
    from accelerate.utils import gather_object

    state = process_state()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = _read_progress(folder, settings)
    share = range(state.process_index, len(data), state.num_processes)
    pending = [place for place in share if str(data.ids[place]) not in done]
    errors = []
    images = caption_images(
        model,
        processor,
        Subset(data.images, pending),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress and state.is_main_process,
        **generate_kwargs,
    )
    path = _progress_path(folder, settings, state.process_index)
    with path.open("ab") if pending else nullcontext() as file:
        if pending and path.stat().st_size:
            file.write(b"\n")  # ends a line that a killed run left half-written
        for place, (captions, error) in zip(pending, images):
            image = data.ids[place]
            if error:
                errors.append(f"{image}: {error}")
                continue
            done[str(image)] = captions[0]
            line = json.dumps({"image_id": image, "caption": captions[0]}, ensure_ascii=False)
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
    own = [{str(data.ids[place]): done[str(data.ids[place])] for place in share if str(data.ids[place]) in done}]
    if state.num_processes > 1:
        own, errors = gather_object(own), gather_object(errors)
    captions = {image: caption for part in own for image, caption in part.items()}
    if errors and not allow_subset:
        raise ValueError(
            f"{len(errors)} images cannot be read: {listed(errors, 3)}. Mend them and run this again (captions that are "
            "there are kept), or leave them out with --allow-subset (allow_subset=True)."
        )
    return {image: captions[str(image)] for image in data.ids if str(image) in captions}


def process_state():
    """accelerate's `PartialState`: one process, or those that `torchrun` started."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # The fastest process waits for the slowest at the end, perhaps for hours.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def remove_progress(folder: str | Path, settings: dict) -> None:
    """Removes the files of captions, once the results file holds them."""
    for path in _progress_paths(Path(folder), settings):
        path.unlink(missing_ok=True)


def _progress_path(folder: Path, settings: dict, process: int) -> Path:
    return folder / f".captions-{digest(settings)[:16]}-{process}.jsonl"


def _progress_paths(folder: Path, settings: dict) -> list[Path]:
    return sorted(folder.glob(f".captions-{digest(settings)[:16]}-*.jsonl"))


def _read_progress(folder: Path, settings: dict) -> dict[str, str]:
    done = {}
    for path in _progress_paths(folder, settings):
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                done[str(entry["image_id"])] = entry["caption"]
            except (ValueError, KeyError, TypeError):  # empty, or cut off by the end of that run
                continue
    return done
