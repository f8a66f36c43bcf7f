"""The benchmarks: their splits, numbers of images and tokenizers, and the checks that a score follows the protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..files import listed
from .evaluation_set import EvaluationSet


@dataclass(frozen=True)
class Benchmark:
    """The protocol of a benchmark.

    Attributes:
        name: What `clipcap evaluate --benchmark` takes.
        title: As tables and pages call it.
        splits: The number of images of each split; None where the publisher's list changes.
        default_splits: Scored unless others are named.
        tokenizer: Of `clipcap_hf.metrics.tokenization`.
        language: Of the captions.
        empty_references: What to do with references without text, see `clipcap_hf.metrics.score_captions`.
        domains: Names of the parts that are scored in addition to the whole, in order.
        dataset_id: The data set's id on the Hub, which model cards name.
        extra_metrics: Scores that make sense here in addition to the usual ones.
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
    """Return the benchmark of a name, or raise a ValueError that lists the names."""
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r:.80}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


@dataclass
class Protocol:
    """What was checked before scoring, for the record; `complete` is False for a part of the benchmark."""

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
    """Give each image its caption by id, and assert the protocol.

    Args:
        captions: A caption by image id; `42` and `"42"` are the same id.
        data: Images and references.
        benchmark, split: Assert that there are as many images as the split has.
        allow_subset: Score the images that have a caption and references, and record that they are a part;
            otherwise any difference is an error.

    Returns:
        `(captions, data, protocol)`: in the order of `data`, of the images that are scored.

    Raises:
        ValueError: Nothing to score, ids that do not match, images without references, or another number of images
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
    expected = benchmark.splits.get(split) if benchmark and split else None
    scored = len(data) - len(missing) - len(bare)
    faults = []
    if unknown:
        faults.append(f"{len(unknown)} captions are of images that {data.source} does not have: {listed(unknown)}")
    if missing:
        faults.append(f"{len(missing)} of {len(data)} images have no caption: {listed(missing)}")
    if bare:
        faults.append(f"{len(bare)} images have no reference captions: {listed(bare)}")
    if benchmark and expected is not None and scored != expected:
        faults.append(f"{benchmark.title}, {split}, has {expected} images, and these are {scored}")
    if not scored:
        raise ValueError(f"No image has both a caption and references: {'; '.join(faults)}.")
    if faults and not allow_subset:
        raise ValueError(
            f"{'; '.join(faults)}. Published scores are of all images; to score a part, pass "
            "--allow-subset (allow_subset=True); the report will say so."
        )
    keep = [place for place, image in enumerate(data.ids) if str(image) in by_id and data.references[place]]
    if len(keep) < len(data):
        data = data.take(keep)
    return [by_id[str(image)] for image in data.ids], data, Protocol(scored, expected, faults)
