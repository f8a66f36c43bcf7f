"""Caption the images of a benchmark with any number of processes; an interrupted run continues where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..captioning import caption_images
from ..files import listed, writing
from ..processes import process_state
from .digests import digest
from .evaluation_set import EvaluationSet, Subset
from .record import decoding_record, model_record, processor_record, versions


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
    """Caption the images of a benchmark, and record how the captions were made.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        processor ([`ClipCapProcessor`]): Its processor.
        name (`str`): Its name, for the record.
        data ([`EvaluationSet`]): The data, with images.
        folder (`str` or `Path`): Where finished captions are stored until [`remove_progress`] removes them.
        prompt (`str`, *optional*): A text that every caption continues.
        kwargs: Arguments of [`caption_evaluation_set`]; all others are passed to `generate()`.

    Returns:
        `(captions, record)`: captions by image id, and the entries `model`, `processor` and `decoding` of the report.
    """
    options = {option: kwargs.pop(option) for option in CAPTIONING_OPTIONS if option in kwargs}
    if data.images is None:
        raise ValueError(f"{data.source} has references but no images to caption.")
    decoding = decoding_record(model, kwargs)
    if prompt is not None:
        decoding["prompt"] = prompt
    record = {
        "model": model_record(model, name),
        "processor": processor_record(processor),
        "decoding": decoding,
    }
    settings = _everything_that_makes_captions(record, data)
    captions = caption_evaluation_set(model, processor, data, folder, settings, prompt=prompt, **options, **kwargs)
    return captions, {
        **record,
        "images_sha256": digest(sorted(zip(map(str, data.ids), data.image_digests))),
        "settings_sha256": digest(settings),
    }


def _everything_that_makes_captions(record: dict[str, Any], data: EvaluationSet) -> dict[str, Any]:
    """Leave out what changes no caption, such as names, so that a run continues after its model was moved."""
    model = {name: record["model"][name] for name in ("weights_sha256", "config_sha256", "dtype", "device")}
    return {**record, "model": model, "source": data.source, "versions": versions()}


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
    """Return the best caption of each image, by image id.

    Each caption is appended to a file in `folder` at once. A later run with the same settings reads it from there,
    unless the image has changed. Under `torchrun` each process captions its share, and all of them return all
    captions.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        processor ([`ClipCapProcessor`]): Its processor.
        data ([`EvaluationSet`]): The data, with images.
        folder (`str` or `Path`): Where finished captions are stored until [`remove_progress`] removes them.
        settings (`dict`): Everything that the captions depend on, except the images. Stored captions are used only
            if their settings were the same.
        batch_size, num_workers, progress, generate_kwargs: See [`~clipcap_hf.captioning.caption_images`].
        allow_subset (`bool`): Leave out images that cannot be read; otherwise they end the run.

    Raises:
        ValueError: If images cannot be read. The captions of the others are stored for the next run.
    """
    from accelerate.utils import gather_object

    state = process_state()
    kept = _KeptCaptions(folder, digest(settings), state.process_index)
    share = range(state.process_index, len(data), state.num_processes)
    known = kept.read()
    captions = {place: known[key] for place in share if (key := _key(data, place)) in known}
    pending = [place for place in share if place not in captions]
    results = caption_images(
        model,
        processor,
        Subset(data.stored_images, pending),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress and state.is_main_process,
        **generate_kwargs,
    )
    errors = []
    with kept.appending(pending) as append:
        for result, place in zip(results, pending):
            if result.error:
                errors.append(f"{data.ids[place]}: {result.error}")
                continue
            captions[place] = result.captions[0]
            append(data.ids[place], data.image_digests[place], result.captions[0])
    own = [captions]
    if state.num_processes > 1:
        own, errors = gather_object(own), gather_object(errors)
    if errors and not allow_subset:
        raise ValueError(
            f"{len(errors)} images of {data.source or 'the data'} cannot be read: {listed(errors, 3)}. Fix them and "
            "try again (finished captions are kept), or leave them out with --allow-subset (allow_subset=True)."
        )
    by_place = {place: caption for part in own for place, caption in part.items()}
    return {data.ids[place]: by_place[place] for place in sorted(by_place)}


def _key(data: EvaluationSet, place: int) -> tuple[str, str]:
    return str(data.ids[place]), data.image_digests[place]


class _KeptCaptions:
    """Stored captions of runs with the same settings: one file per process, one line per caption."""

    def __init__(self, folder: str | Path, settings_sha256: str, process: int):
        self.folder = Path(folder)
        self.pattern = f".captions-{settings_sha256[:16]}-*.jsonl"
        self.path = self.folder / self.pattern.replace("*", str(process))

    def read(self) -> dict[tuple[str, str], str]:
        """Read the captions by image id and digest, ignoring a line that a killed run left incomplete."""
        captions = {}
        for path in sorted(self.folder.glob(self.pattern)):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    captions[str(entry["image_id"]), str(entry["image_sha256"])] = str(entry["caption"])
                except (ValueError, KeyError, TypeError):
                    continue
        return captions

    @contextmanager
    def appending(self, pending: list[int]) -> Iterator[Callable[[int | str, str, str], None]]:
        """Yield a function that stores a caption at once; if nothing is pending, no file is created."""
        if not pending:
            yield lambda *caption: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("ab") as file:
            if self.path.stat().st_size:
                file.write(b"\n")  # ends a line that a killed run left incomplete

            def append(image: int | str, image_sha256: str, caption: str) -> None:
                entry = {"image_id": image, "image_sha256": image_sha256, "caption": caption}
                file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                file.flush()

            yield append


def remove_progress(folder: str | Path, settings_sha256: str) -> None:
    """Remove the stored captions, once the results file holds them."""
    for path in Path(folder).glob(f".captions-{settings_sha256[:16]}-*.jsonl"):
        path.unlink(missing_ok=True)
