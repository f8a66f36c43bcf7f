"""Load the images and references of a benchmark, from its publisher's files, or your own."""

from pathlib import Path

from .coco_files import read_references
from .evaluation_set import EvaluationSet
from .protocol import Benchmark


# For each benchmark: the reader, patterns for the file's name, and folders that may hold the images.
LAYOUTS = {
    "coco-karpathy": ("karpathy", ("dataset_coco.json",), (".", "images")),
    "flickr8k": ("karpathy", ("dataset_flickr8k.json",), ("Flicker8k_Dataset", "images", "Images", ".")),
    "flickr30k": ("karpathy", ("dataset_flickr30k.json",), ("flickr30k-images", "flickr30k_images", "images", ".")),
    "nocaps": ("nocaps", ("nocaps_{split}_*captions.json", "nocaps_{split}*.json"), ("{split}", "images", ".")),
    "stair": ("stair", ("stair_captions_*_{split}.json",), (".", "images")),
    "conceptual-captions": ("conceptual", ("*{split}*.tsv", "*{Split}*.tsv"), ("{split}", "images", ".")),
}
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


def load_evaluation_set(
    benchmark: Benchmark,
    root: str | Path | None = None,
    split: str | None = None,
) -> EvaluationSet:
    """Load images and references of a benchmark's split.

    Args:
        benchmark ([`Benchmark`]): One of `BENCHMARKS`.
        root (`str` or `Path`, *optional*): The folder with the publisher's files; not needed for the emoji, which are
            part of the package.
        split (`str`, *optional*): The split; by default the first of `default_splits`.

    Raises:
        ValueError: If the split does not exist, or `root` is missing.
        FileNotFoundError: If a file is missing; the message says which.
    """
    split = split or benchmark.default_splits[0]
    if split not in benchmark.splits:
        raise ValueError(f"{benchmark.title} has no split {split!r:.80}; choose one of {', '.join(benchmark.splits)}.")
    if benchmark.name.startswith("emoji"):
        return _load_emoji(split, benchmark.language)
    if root is None:
        raise ValueError(f"{benchmark.title} needs the folder of its files: --data ROOT.")
    from ..data import load_captions

    kind, annotations, images = find_published_files(benchmark, root, split)
    source = {split: annotations} if kind in ("conceptual", "nocaps", "stair") else annotations
    rows = load_captions(kind, source, images=images, split=split)
    if kind in ("nocaps", "stair"):
        # Use the references as published, including empty ones, which the reader of training data leaves out.
        data = read_references(annotations)
        place = {str(image): number for number, image in enumerate(data.ids)}
        found = data.take([place[str(image)] for image in rows["image_id"]])
        return EvaluationSet(found.ids, found.references, found.domains, rows["image"], str(annotations))
    return _of_rows(rows, str(annotations))


def find_published_files(benchmark: Benchmark, root: str | Path, split: str) -> tuple[str, Path, Path]:
    """Find the publisher's files of a split, which may be one that only training reads.

    Returns:
        `(kind, annotations, images)`: the reader of `clipcap_hf.data`, its file, and the folder of the images.

    Raises:
        FileNotFoundError: No annotations; the message names what was looked for.
        ValueError: Several files may be the annotations.
    """
    kind, patterns, image_folders = LAYOUTS[benchmark.name]
    root = Path(root).expanduser()
    spelling = {"val": "validation", "train": "training"}.get(split, split) if kind == "conceptual" else split
    spellings = {"split": spelling, "Split": spelling.capitalize()}
    annotations = _find(root, [pattern.format(**spellings) for pattern in patterns], benchmark.title)
    folders = [annotations.parent / folder.format(**spellings) for folder in image_folders]
    return kind, annotations, next((folder for folder in folders if folder.is_dir()), root)


def load_own_images(
    path: str | Path,
    kind: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    missing: str | None = None,
    **columns,
) -> EvaluationSet:
    """Load your own images and reference captions, in any format that training reads.

    Args:
        path (`str` or `Path`): A folder of captioned images, an annotation file, shards, or a data set on the Hub.
        kind (`str`, *optional*): The format, see [`~clipcap_hf.data.load_captions`]; by default `"imagefolder"` for a
            folder and `"hub"` otherwise.
        split (`str`, *optional*): The split; needed only if there are several.
        images, missing: See [`~clipcap_hf.data.load_captions`].
        columns: `image_column`, `caption_column` and `id_column`, if the data has named columns.

    Raises:
        ValueError: If there are no captions, if there are several splits and none is named, or if the data is not in
            this format.
        FileNotFoundError: If the data or an image is missing.
    """
    from ..data import load_captions

    kind = kind or _kind_of(path)
    if kind == "webdataset":
        columns["streaming"] = False  # images are read more than once
    path = str(path) if "://" in str(path) else str(Path(path).expanduser())
    rows = load_captions(kind, path, images=images, split=split, missing=missing, **columns)
    if isinstance(rows, dict):
        if not rows:
            raise ValueError(f"{path} lists no images with captions.")
        if len(rows) > 1:
            raise ValueError(f"{path} has the splits {', '.join(rows)}: name the one to score by --split.")
        rows = next(iter(rows.values()))
    data = _of_rows(rows, path)
    data.title = Path(path).resolve().name if Path(path).exists() else path
    if not any(data.references):
        raise ValueError(f"{path} has no captions to compare with; `clipcap caption` only writes captions.")
    return data


def _kind_of(path: str | Path) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise ValueError(
                f"{path} is a file: name its form by --data-format, such as karpathy or coco, or name the folder of "
                "the images."
            )
        return "hub"
    return "hub" if any((folder / name).is_file() for name in SAVED_BY_DATASETS) else "imagefolder"


def _of_rows(rows, source: str) -> EvaluationSet:
    return EvaluationSet(list(rows["image_id"]), list(rows["captions"]), images=rows["image"], source=source)


def _load_emoji(split: str, language: str) -> EvaluationSet:
    from ..data import load_emoji

    rows = load_emoji(split, language=language)
    source = f"clipcap_hf.data.load_emoji({split!r}, language={language!r})"
    return EvaluationSet(list(range(len(rows))), list(rows["captions"]), images=rows["image"], source=source)


def _find(root: Path, patterns: list[str], title: str) -> Path:
    """Find the one file that matches a pattern in the folder or in one of its subfolders."""
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    for pattern in patterns:
        if found := sorted({*root.glob(pattern), *root.glob(f"*/{pattern}")}):
            if len(found) > 1:
                names = ", ".join(str(path.relative_to(root)) for path in found)
                raise ValueError(f"{root} has several files for {title}: {names}. Pass one of them as --data.")
            return found[0]
    raise FileNotFoundError(f"{root} has no {' or '.join(patterns)}, the annotations of {title}.")
