"""Captions of a benchmark's images: spread over processes, and taken up again where an interrupted run stopped."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..captioning import caption_images
from ..files import listed
from ..processes import process_state
from .coco_files import digest
from .protocol import EvaluationSet, Subset
from .record import decoding_record, model_record


CAPTIONING_OPTIONS = ("batch_size", "num_workers", "progress", "allow_subset")


def caption_benchmark(
    model,
    processor,
    name: str,
    data: EvaluationSet,
    folder: str | Path,
    prompt: str | None = None,
    **kwargs,
) -> tuple[dict[int | str, str], dict[str, Any]]:
    """Captions the images of a benchmark, and records what made the captions.

    Args:
        model ([`ClipCapForConditionalGeneration`]), processor ([`ClipCapProcessor`]): the captioner.
        name: the captioner's, for the record.
        data: with images.
        folder: where captions are kept as they come; see [`remove_progress`].
        prompt: a beginning that every caption continues.
        kwargs: as [`caption_evaluation_set`] takes them; all others are for `generate()`.

    Returns:
        `(captions, record)`: a caption by image id, and `model` and `decoding` for the report.
    """
    options = {option: kwargs.pop(option) for option in CAPTIONING_OPTIONS if option in kwargs}
    if data.images is None:
        raise ValueError(f"{data.source} has references but no images to caption.")
    decoding = decoding_record(model, kwargs)
    if prompt is not None:
        decoding["prompt"] = prompt
    record = {"model": model_record(model, name), "decoding": decoding}
    made_by = {name: record["model"][name] for name in ("weights_sha256", "dtype")}
    settings = {**made_by, "decoding": decoding, "source": data.source}
    captions = caption_evaluation_set(model, processor, data, folder, settings, prompt=prompt, **options, **kwargs)
    return captions, {**record, "settings_sha256": digest(settings)}


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
    done = _read_progress(folder, digest(settings))
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
    path = _progress_path(folder, digest(settings), state.process_index)
    with path.open("ab") if pending else nullcontext() as file:
        if pending and path.stat().st_size:
            file.write(b"\n")  # ends a line that a killed run left half-written
        for result, place in zip(images, pending):
            image = data.ids[place]
            if result.error:
                errors.append(f"{image}: {result.error}")
                continue
            done[str(image)] = result.captions[0]
            line = json.dumps({"image_id": image, "caption": result.captions[0]}, ensure_ascii=False)
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


def remove_progress(folder: str | Path, settings_sha256: str) -> None:
    """Removes the files of captions, once the results file holds them."""
    for path in _progress_paths(Path(folder), settings_sha256):
        path.unlink(missing_ok=True)


def _progress_path(folder: Path, settings_sha256: str, process: int) -> Path:
    return folder / f".captions-{settings_sha256[:16]}-{process}.jsonl"


def _progress_paths(folder: Path, settings_sha256: str) -> list[Path]:
    return sorted(folder.glob(f".captions-{settings_sha256[:16]}-*.jsonl"))


def _read_progress(folder: Path, settings_sha256: str) -> dict[str, str]:
    done = {}
    for path in _progress_paths(folder, settings_sha256):
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                done[str(entry["image_id"])] = entry["caption"]
            except (ValueError, KeyError, TypeError):  # empty, or cut off by the end of that run
                continue
    return done
