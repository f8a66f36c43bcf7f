"""The benchmarks: which split, how many images, which tokenizer, and the checks that a score is by the protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..files import listed


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's protocol.

    Attributes:
        name: what `clipcap evaluate --benchmark` takes.
        title: as tables and pages call it.
        splits: the number of images of each split; None where the publisher's list changes.
        default_splits: those scored unless others are named.
        tokenizer: of `clipcap_hf.metrics.tokenization`.
        language: of the captions.
        empty_references: what to do with references without text, see `clipcap_hf.metrics.score_captions`.
        domains: names of the parts that are scored beside the whole, in order.
        dataset_id: the data set's id on the Hub, which model cards name.
        extra_metrics: scores that make sense here beside the usual ones.
    """

    name: str
    title: str
    splits: Mapping[str, int | None]
    default_splits: tuple[str, ...]
    dataset_id: str
    tokenizer: str = "ptb"
    language: str = "en"
    empty_references: str = "error"
    domains: tuple[str, ...] = ()
    extra_metrics: tuple[str, ...] = ()


_EMOJI = ({"new_design": 1637, "new_caption": 904, "validation": 190}, ("new_design", "new_caption"))
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "coco-karpathy", "COCO, Karpathy split", {"test": 5000, "val": 5000}, ("test",), "yerevann/coco-karpathy"
        ),
        Benchmark(
            "conceptual-captions",
            "Conceptual Captions",
            {"val": 15840},
            ("val",),
            "google-research-datasets/conceptual_captions",
        ),
        Benchmark(
            "nocaps",
            "nocaps",
            {"val": 4500},  # the references of the test split are not public
            ("val",),
            "HuggingFaceM4/NoCaps",
            domains=("in-domain", "near-domain", "out-domain"),
        ),
        Benchmark("flickr8k", "Flickr8k, Karpathy split", {"test": 1000, "val": 1000}, ("test",), "jxie/flickr8k"),
        Benchmark(
            "flickr30k", "Flickr30k, Karpathy split", {"test": 1000, "val": 1014}, ("test",), "nlphuji/flickr30k"
        ),
        Benchmark(
            "stair",
            "STAIR Captions",
            {"val": 40504},
            ("val",),
            "shunk031/STAIR-Captions",
            tokenizer="ja",
            language="ja",
            empty_references="keep",  # the data has some, and published scores count them
        ),
        Benchmark("emoji", "emoji drawings", *_EMOJI, "clipcap-hf/emoji", extra_metrics=("exact_match",)),
        Benchmark(
            "emoji-ja",
            "emoji drawings, in Japanese",
            *_EMOJI,
            "clipcap-hf/emoji-ja",
            tokenizer="characters",
            language="ja",
            extra_metrics=("exact_match",),
        ),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or a ValueError that lists the names."""
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


@dataclass
class EvaluationSet:
    """Images and their reference captions, in order.

    Attributes:
        ids: of the images.
        references: the reference captions of each image.
        domains: the domain of each image, or None.
        images: paths or PIL images, read when asked for by index; None where there are only captions.
        source: where they are from, for the record.
    """

    ids: list[int | str]
    references: list[list[str]]
    domains: list[str] | None = None
    images: Sequence[Any] | None = None
    source: str = ""

    def __post_init__(self):
        if repeated := repeated_ids(self.ids):
            raise ValueError(f"{self.source}: images stand there more than once: {listed(repeated)}.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Sequence[int]) -> "EvaluationSet":
        """The images at some positions."""

        def pick(values):
            return None if values is None else [values[position] for position in positions]

        images = self.images
        if images is not None:
            images = images.select(positions) if hasattr(images, "select") else Subset(images, positions)
        return EvaluationSet(pick(self.ids), pick(self.references), pick(self.domains), images, self.source)


@dataclass
class Subset(Sequence):
    """Items of a sequence by position, fetched when asked for."""

    items: Sequence
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int):
        return self.items[self.positions[index]]


@dataclass
class Protocol:
    """What was checked before scoring, for the record: `complete` says whether it is the benchmark's own number."""

    images: int
    expected_images: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.notes


def match(
    captions: Mapping[int | str, str],
    data: EvaluationSet,
    benchmark: Benchmark | None = None,
    split: str | None = None,
    allow_subset: bool = False,
) -> tuple[list[str], EvaluationSet, Protocol]:
    """Gives each image its caption by id, and asserts the protocol.

    Args:
        captions: a caption by image id; `42` and `"42"` are the same id.
        data: images and references.
        benchmark, split: whose number of images is asserted.
        allow_subset: score the images that have a caption and references, and record that it was a part, where
            otherwise any difference is an error.

    Returns:
        `(captions, data, protocol)`: in the order of `data`, of the images that are scored.

    Raises:
        ValueError: nothing to score, ids that do not match, images without references, or another number of images
            than the benchmark has.
    """
    if not captions:
        raise ValueError("There are no captions to score.")
    if not len(data):
        raise ValueError(f"{data.source or 'The data'} has no images with reference captions.")
    by_id = {str(image): caption for image, caption in captions.items()}
    known = {str(image) for image in data.ids}
    unknown = [image for image in by_id if image not in known]
    missing = [image for image in data.ids if str(image) not in by_id]
    bare = [image for image, group in zip(data.ids, data.references) if not group and str(image) in by_id]
    expected = benchmark.splits.get(split) if benchmark else None
    scored = len(data) - len(missing) - len(bare)
    faults = []
    if unknown:
        faults.append(f"{len(unknown)} captions are of images that {data.source} does not have: {listed(unknown)}")
    if missing:
        faults.append(f"{len(missing)} of {len(data)} images have no caption: {listed(missing)}")
    if bare:
        faults.append(f"{len(bare)} images have no reference captions: {listed(bare)}")
    if expected is not None and scored != expected:
        faults.append(f"{benchmark.title}, {split}, has {expected} images, and these are {scored}")
    if not scored:
        raise ValueError(f"No image has both a caption and references: {'; '.join(faults)}.")
    if faults and not allow_subset:
        raise ValueError(
            f"{'; '.join(faults)}. Published scores are of all images; to score what is there, say --allow-subset "
            "(allow_subset=True), and it will be recorded."
        )
    keep = [place for place, image in enumerate(data.ids) if str(image) in by_id and data.references[place]]
    if len(keep) < len(data):
        data = data.take(keep)
    return [by_id[str(image)] for image in data.ids], data, Protocol(scored, expected, faults)


def repeated_ids(ids: Sequence) -> list:
    """Ids that stand there more than once; `42` and `"42"` are the same."""
    seen, repeated = set(), []
    for image in ids:
        if str(image) in seen:
            repeated.append(image)
        seen.add(str(image))
    return repeated
