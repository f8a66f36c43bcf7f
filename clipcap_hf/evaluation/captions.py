"""Caption a benchmark's images, spread over processes; an interrupted run goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..captioning import caption_images
from ..files import listed
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
    """Caption the images of a benchmark, and record what made the captions.

    Args:
        model ([`ClipCapForConditionalGeneration`]), processor ([`ClipCapProcessor`]): The captioner.
        name: The captioner's, for the record.
        data: With images.
        folder: Where captions are kept as they come; see [`remove_progress`].
        prompt: A beginning that every caption continues.
        kwargs: As [`caption_evaluation_set`] takes them; all others are for `generate()`.

    Returns:
        `(captions, record)`: a caption by image id; `model`, `processor` and `decoding` for the report.
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
    """Leave out of the record what changes no caption, such as names, so that a moved model goes on."""
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
    """Find the best caption of each image, by image id.

    Every caption is appended to a file in `folder` as soon as it is there; a later run with the same settings takes it
    from there, if the image is still the same. Under `torchrun`, each process captions its share, and all of them
    return all captions.

    Args:
        model ([`ClipCapForConditionalGeneration`]), processor ([`ClipCapProcessor`]): The captioner.
        data: With images.
        folder: For the files of captions; see [`remove_progress`].
        settings: Everything but the images that the captions depend on; only captions of the same settings are used.
        batch_size, num_workers, progress, generate_kwargs: See `clipcap_hf.captioning.caption_images`.
        allow_subset: Leave out images that cannot be read, which otherwise end the run.

    Raises:
        ValueError: Images that cannot be read. The captions of the others are kept for the next run.
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
            f"{len(errors)} images cannot be read: {listed(errors, 3)}. Fix them and try again (finished captions are "
            "kept), or leave them out with --allow-subset (allow_subset=True)."
        )
    by_place = {place: caption for part in own for place, caption in part.items()}
    return {data.ids[place]: by_place[place] for place in sorted(by_place)}


def _key(data: EvaluationSet, place: int) -> tuple[str, str]:
    return str(data.ids[place]), data.image_digests[place]


class _KeptCaptions:
    """The captions of runs with the same settings, in a file per process: a line for each, with the image's digest."""

    def __init__(self, folder: str | Path, settings_sha256: str, process: int):
        self.folder = Path(folder)
        self.pattern = f".captions-{settings_sha256[:16]}-*.jsonl"
        self.path = self.folder / self.pattern.replace("*", str(process))

    def read(self) -> dict[tuple[str, str], str]:
        """Read the captions by image id and digest; a line that a killed run left half-written is none."""
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
        """Yield a function that writes a caption to the file at once; no file is made where nothing is pending."""
        if not pending:
            yield lambda *caption: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self.path.stat().st_size:
                file.write(b"\n")  # ends a line that a killed run left half-written

            def append(image: int | str, image_sha256: str, caption: str) -> None:
                entry = {"image_id": image, "image_sha256": image_sha256, "caption": caption}
                file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                file.flush()

            yield append


def remove_progress(folder: str | Path, settings_sha256: str) -> None:
    """Remove the files of captions, once the results file holds them."""
    for path in Path(folder).glob(f".captions-{settings_sha256[:16]}-*.jsonl"):
        path.unlink(missing_ok=True)
