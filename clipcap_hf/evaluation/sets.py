"""The benchmarks' images and references, from the publishers' files in a folder."""

from pathlib import Path

from .coco_files import read_references
from .protocol import Benchmark, EvaluationSet


# For each benchmark: the reader, patterns of the file's name ({split} is the split), and folders that may hold the images.
LAYOUTS = {
    "coco-karpathy": ("karpathy", ("dataset_coco.json",), (".", "images")),
    "flickr8k": ("karpathy", ("dataset_flickr8k.json",), ("Flicker8k_Dataset", "images", "Images", ".")),
    "flickr30k": ("karpathy", ("dataset_flickr30k.json",), ("flickr30k-images", "flickr30k_images", "images", ".")),
    "nocaps": ("nocaps", ("nocaps_{split}_*captions.json", "nocaps_{split}*.json"), ("{split}", "images", ".")),
    "stair": ("stair", ("stair_captions_*_{split}.json",), (".", "images")),
    "conceptual-captions": ("conceptual", ("*{split}*.tsv", "*{Split}*.tsv"), ("{split}", "images", ".")),
}


def load_evaluation_set(
    benchmark: Benchmark,
    root: str | Path | None = None,
    split: str | None = None,
) -> EvaluationSet:
    """Images and references of a benchmark's split.

    Args:
        benchmark: one of `BENCHMARKS`.
        root: the folder with the publisher's files; the emoji are part of the package.
        split: of the benchmark, the first of its default splits unless named.

    Raises:
        ValueError: no such split, or no folder.
        FileNotFoundError: a file that is not there; the message names what was looked for.
    """
    split = split or benchmark.default_splits[0]
    if split not in benchmark.splits:
        raise ValueError(f"{benchmark.title} has no split {split!r}; choose one of {', '.join(benchmark.splits)}.")
    if benchmark.name.startswith("emoji"):
        return _load_emoji(split, benchmark.language)
    if root is None:
        raise ValueError(f"{benchmark.title} needs the folder of its files: --data ROOT.")
    from ..data import load_captions

    kind, patterns, image_folders = LAYOUTS[benchmark.name]
    root = Path(root).expanduser()
    spellings = {"split": split, "Split": split.capitalize()}
    if kind == "conceptual":
        spellings = {"split": "validation", "Split": "Validation"}
    annotations = _find(root, [pattern.format(**spellings) for pattern in patterns], benchmark.title)
    folders = [annotations.parent / folder.format(**spellings) for folder in image_folders]
    images = next((folder for folder in folders if folder.is_dir()), root)
    if kind in ("nocaps", "stair"):
        # The references as they are published, empty ones included; the reader would leave those out.
        rows = load_captions(kind, {split: annotations}, images=images, split=split)
        data = read_references(annotations)
        place = {image: number for number, image in enumerate(data.ids)}
        found = data.take([place[image] for image in rows["image_id"]])
        return EvaluationSet(found.ids, found.references, found.domains, rows["image"], str(annotations))
    source = {split: annotations} if kind == "conceptual" else annotations
    rows = load_captions(kind, source, images=images, split=split)
    return EvaluationSet(list(rows["image_id"]), list(rows["captions"]), images=rows["image"], source=str(annotations))


def _load_emoji(split: str, language: str) -> EvaluationSet:
    from ..data import load_emoji

    rows = load_emoji(split, language=language)
    source = f"clipcap_hf.data.load_emoji({split!r}, language={language!r})"
    return EvaluationSet(list(range(len(rows))), list(rows["captions"]), images=rows["image"], source=source)


def _find(root: Path, patterns: list[str], title: str) -> Path:
    """The one file of these patterns in the folder, or in one of its own folders."""
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    for pattern in patterns:
        if found := sorted({*root.glob(pattern), *root.glob(f"*/{pattern}")}):
            if len(found) > 1:
                names = ", ".join(str(path.relative_to(root)) for path in found)
                raise ValueError(f"{root} has several files for {title}: {names}. Name the one as --data.")
            return found[0]
    raise FileNotFoundError(f"{root} has no {' or '.join(patterns)}, which {title} is read from.")
