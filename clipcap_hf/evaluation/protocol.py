"""The benchmarks (COCO, nocaps, ...), their splits and tokenizers, and the check that a score follows a protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..files import listed
from .evaluation_set import EvaluationSet


@dataclass(frozen=True)
class Benchmark:
    """The protocol of a benchmark.

    Attributes:
        name (`str`): Its name for `clipcap evaluate --benchmark`.
        title (`str`): Its name in tables and pages.
        splits (`Mapping[str, int | None]`): Number of images of each split; `None` if the publisher's list changes.
        default_splits (`tuple[str, ...]`): The splits that are scored by default.
        dataset_id (`str`): The data set's Hub id, for model cards.
        tokenizer (`str`): A tokenizer of `clipcap_hf.metrics.tokenization`.
        language (`str`): The language of the captions.
        empty_references (`str`): What to do with references without text, see
            [`~clipcap_hf.metrics.score_captions`].
        domains (`tuple[str, ...]`): Parts that are scored separately, as well as the whole, in this order.
        extra_metrics (`tuple[str, ...]`): Metrics besides the usual ones.
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
    """Return a benchmark by name; raise a ValueError that lists the names if there is none."""
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r:.80}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


@dataclass
class Protocol:
    """What was checked before scoring, for the record; `complete` is False if only a part was scored."""

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
    """Match captions to images by id, and check the protocol.

    Args:
        captions (`Mapping[int | str, str]`): Captions by image id; `42` and `"42"` are the same id.
        data ([`EvaluationSet`]): Images and references.
        benchmark ([`Benchmark`], *optional*): The benchmark whose number of images is checked.
        split (`str`, *optional*): Its split.
        allow_subset (`bool`): Score the images that have a caption and references, and record that they are only a
            part; otherwise any difference is an error.

    Returns:
        `(captions, data, protocol)`: captions and data of the images that are scored, in the order of `data`.

    Raises:
        ValueError: If there is nothing to score, ids do not match, images have no references, or the number of images
            is not the benchmark's.
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
