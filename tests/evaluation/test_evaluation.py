"""Benchmarks: the protocol, the paper's tables, files and the page."""

import json
import random
import re
import shutil

import pytest
from clipcap_hf.evaluation import (
    BENCHMARKS,
    PAPER_ROWS,
    Benchmark,
    EvaluationSet,
    difference_lines,
    evaluate_captions,
    get_benchmark,
    load_evaluation_set,
    paper_rows,
    plain_summary,
    read_references,
    read_results,
    rows_to_compare,
    score_table,
    write_report,
    write_results,
)
from clipcap_hf.metrics import score_captions
from PIL import Image


CAPTIONS = {7: "a red heart on grass", 3: "two dogs run", 9: "a man in a hat", 4: "a blue boat"}
REFERENCES = {
    3: ["two dogs run on grass", "dogs"],
    4: ["a blue boat", "the boat is blue"],
    7: ["a red heart", "a heart that is red"],
    9: ["a man wears a hat", "a person in a hat"],
}


def evaluation_set(**kwargs):
    return EvaluationSet(list(REFERENCES), list(REFERENCES.values()), source="the references", **kwargs)


def evaluate(captions=None, data=None, *args, **kwargs):
    kwargs.setdefault("tokenizer", "python")
    return evaluate_captions(CAPTIONS if captions is None else captions, data or evaluation_set(), *args, **kwargs)


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# Scores


def test_captions_meet_their_references_by_id():
    report, data = evaluate(dict(random.Random(0).sample(list(CAPTIONS.items()), 4)))
    expected = score_captions(
        [CAPTIONS[image] for image in REFERENCES], list(REFERENCES.values()), ("bleu", "cider"), "python"
    )
    assert report["scores"]["entire"]["cider"] == pytest.approx(100 * expected["cider"])
    assert [image["image_id"] for image in report["per_image"]] == data.ids == list(REFERENCES)
    assert [image["caption"] for image in report["per_image"]] == [CAPTIONS[image] for image in REFERENCES]
    assert [image["cider"] for image in report["per_image"]] == pytest.approx(expected["cider_per_image"].tolist())


def test_scores_equal_pycocoevalcap_to_seven_digits(tmp_path):
    """Score files, as `clipcap evaluate --results ... --references ...` does."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("there is no java on the PATH")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rng = random.Random(0)
    words = "a the man's dog, cat runs sits on in grass (green) U.S. T-shirt black/white 猫 café isn't .".split()
    sentence = lambda: " ".join(rng.choices(words, k=rng.randint(3, 12)))  # noqa: E731
    annotations = [{"image_id": n * 7, "caption": sentence()} for n in range(60) for _ in range(rng.randint(1, 5))]
    results = [{"image_id": n * 7, "caption": sentence()} for n in rng.sample(range(60), 60)]
    captions = read_results(write_json(tmp_path / "results.json", results))
    data = read_references(write_json(tmp_path / "references.json", {"annotations": annotations}))
    report, _ = evaluate_captions(captions, data)

    tokenizer = PTBTokenizer()
    groups = {}
    for annotation in annotations:
        groups.setdefault(annotation["image_id"], []).append(annotation)
    gts, res = tokenizer.tokenize(groups), tokenizer.tokenize({r["image_id"]: [r] for r in results})
    expected = {"meteor": Meteor().compute_score(gts, res)[0]}
    expected |= {f"bleu_{n + 1}": value for n, value in enumerate(Bleu(4).compute_score(gts, res, verbose=0)[0])}
    expected["rouge_l"], expected["cider"] = Rouge().compute_score(gts, res)[0], Cider().compute_score(gts, res)[0]
    for name, value in expected.items():
        assert report["scores"]["entire"][name] / 100 == pytest.approx(value, abs=5e-8), name


def test_each_domain_is_an_evaluation_of_its_own():
    rng = random.Random(1)
    images = list(range(30))
    captions = {
        image: f"a {rng.choice('red blue green'.split())} {rng.choice(['dog', 'cat'])} runs" for image in images
    }
    references = [[f"a {rng.choice(['red', 'blue'])} {rng.choice(['dog', 'cat'])} sits", "a dog"] for _ in images]
    domains = [["near-domain", "in-domain", "out-domain"][image % 3] for image in images]
    data = EvaluationSet(images, references, domains, source="nocaps")
    report, _ = evaluate(captions, data, BENCHMARKS["nocaps"], "val", allow_subset=True)
    assert list(report["scores"]) == ["entire", "in-domain", "near-domain", "out-domain"]
    assert report["images"] == {"entire": 30, "in-domain": 10, "near-domain": 10, "out-domain": 10}
    for domain in ("in-domain", "out-domain"):
        part = [image for image in images if domains[image] == domain]
        alone, _ = evaluate({image: captions[image] for image in part}, data.take(part), metrics=["bleu", "cider"])
        for name in ("bleu_4", "cider"):
            assert report["scores"][domain][name] == pytest.approx(alone["scores"][domain][name])
            assert alone["scores"][domain] == alone["scores"]["entire"]
    assert report["scores"]["entire"]["cider"] != pytest.approx(report["scores"]["in-domain"]["cider"])
    lines = difference_lines(report)
    here = f"{report['scores']['in-domain']['cider']:.2f}"
    assert any(line.startswith("CIDEr, in-domain: paper 84.85 (ClipCap; Transformer), here " + here) for line in lines)


def test_meteor_of_groups_starts_java_once(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("there is no java on the PATH")
    from clipcap_hf.metrics import java

    starts = []
    original = java.subprocess.Popen
    monkeypatch.setattr(
        java.subprocess, "Popen", lambda *args, **kwargs: starts.append(1) or original(*args, **kwargs)
    )
    captions, references = list(CAPTIONS.values()), [REFERENCES[image] for image in CAPTIONS]
    scores = score_captions(captions, references, ("meteor", "cider"), groups=["a", "b", "a", "b"])
    assert len(starts) == 2  # the tokenizer and METEOR
    for group, part in (("a", slice(0, 4, 2)), ("b", slice(1, 4, 2))):
        alone = score_captions(captions[part], references[part], "meteor")
        assert scores["groups"][group]["meteor"] == pytest.approx(alone["meteor"], abs=1e-12)


def test_everything_that_made_the_number_is_recorded():
    report, _ = evaluate()
    assert report["protocol"]["tokenizer"] == "python (not exact)"
    assert report["versions"]["numpy"] and report["data"]["references"] == 8
    again, _ = evaluate(dict(reversed(CAPTIONS.items())))
    assert again == report
    other, _ = evaluate({**CAPTIONS, 3: "two cats"})
    assert other["captions_sha256"] != report["captions_sha256"] and other["data"] == report["data"]
    json.dumps(report)


# The protocol


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({}, "no captions to score"),
        ({**CAPTIONS, 5: "a"}, "1 captions are of images that the references does not have: 5"),
        ({3: "a", 4: "b", 7: "c"}, "1 of 4 images have no caption: 9"),
        ({1: "a"}, "No image has both"),
    ],
)
def test_ids_that_do_not_match_are_named(captions, message):
    with pytest.raises(ValueError, match=message):
        evaluate(captions)


def test_images_without_references_are_named_and_can_be_left_out():
    data = EvaluationSet([1, 2, 3], [["a dog"], [], ["a cat"]], source="x")
    captions = {1: "a dog", 2: "b", 3: "a cow"}
    with pytest.raises(ValueError, match="1 images have no reference captions: 2.*--allow-subset"):
        evaluate(captions, data)
    report, scored = evaluate(captions, data, allow_subset=True)
    assert scored.ids == [1, 3] and not report["protocol"]["complete"]
    assert "no reference captions" in plain_summary(report)


def test_the_number_of_images_is_asserted():
    benchmark = Benchmark("coco-karpathy", "COCO", {"test": 5}, ("test",), "x/y")
    with pytest.raises(ValueError, match="COCO, test, has 5 images, and these are 4.*--allow-subset"):
        evaluate(None, None, benchmark, "test")
    report, _ = evaluate(None, None, benchmark, "test", allow_subset=True)
    assert report["protocol"]["deviations"] == ["COCO, test, has 5 images, and these are 4"]
    complete, _ = evaluate(None, None, Benchmark("x", "X", {"test": 4}, ("test",), "x/y"), "test")
    assert complete["protocol"]["complete"]


def test_empty_references_and_captions():
    data = EvaluationSet([1, 2], [["a dog", " "], ["a cat"]], source="x")
    with pytest.raises(ValueError, match="1 images have references without text: 1.*--empty-references"):
        evaluate({1: "a dog", 2: ""}, data)
    report, _ = evaluate({1: "a dog", 2: ""}, data, empty_references="keep")
    assert report["notes"] == ["1 captions are empty and score 0."]


def test_one_image_has_no_cider_and_the_report_says_so():
    report, _ = evaluate({3: "two dogs run"}, evaluation_set().take([0]))
    assert report["scores"]["entire"]["cider"] == 0
    assert "single image is 0 by definition" in plain_summary(report)


def test_line_separators_shift_nothing():
    separated = {image: caption.replace(" ", "\u2028", 1) for image, caption in CAPTIONS.items()}
    assert evaluate(separated)[0]["scores"] == evaluate()[0]["scores"]


def test_unknown_benchmarks_and_splits():
    with pytest.raises(ValueError, match="no benchmark 'coco'; choose one of coco-karpathy"):
        get_benchmark("coco")
    with pytest.raises(ValueError, match="no split 'train'; choose one of new_design"):
        load_evaluation_set(BENCHMARKS["emoji"], split="train")
    with pytest.raises(ValueError, match="--data ROOT"):
        load_evaluation_set(BENCHMARKS["nocaps"])


# Files


def test_results_files_round_trip(tmp_path):
    write_results(tmp_path / "results.json", {"42": "猫\u2028", 7: "", "a.jpg": "b", "007": "c"})
    entries = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [entry["image_id"] for entry in entries] == [42, 7, "a.jpg", "007"]
    assert list(read_results(tmp_path / "results.json").values()) == ["猫\u2028", "", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "a list .*, not a dict with a"),
        ('[{"image_id": 1}]', "entry 0 is"),
        ('[{"image_id": 1.5, "caption": "a"}]', "image_id must be"),
        ('[{"image_id": 1, "caption": null}]', "caption must be a string, not None"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]', "more than one caption: 1"),
        ('[{"image_id": 1, "cap', "is not a JSON file, or is incomplete"),
    ],
)
def test_bad_results_files_are_named(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


def test_references_of_coco_nocaps_and_plain(tmp_path):
    annotations = [{"image_id": image, "caption": text} for image, group in REFERENCES.items() for text in group]
    plain = read_references(write_json(tmp_path / "plain.json", {str(k): v for k, v in REFERENCES.items()}))
    coco = read_references(write_json(tmp_path / "coco.json", {"annotations": annotations}))
    assert coco.references == plain.references == list(REFERENCES.values()) and coco.domains is None
    images = [{"id": image, "domain": "in-domain"} for image in (*REFERENCES, 100)]
    nocaps = read_references(write_json(tmp_path / "n.json", {"images": images, "annotations": annotations}))
    assert nocaps.domains == ["in-domain"] * 5 and nocaps.references[4] == []
    del images[0]["domain"]
    with pytest.raises(ValueError, match="some images have a domain and others have none: 3"):
        read_references(write_json(tmp_path / "n.json", {"images": images, "annotations": annotations}))
    with pytest.raises(ValueError, match="references are .*annotations"):
        read_references(write_json(tmp_path / "x.json", [1]))
    with pytest.raises(ValueError, match="annotation 0: the caption must be a string, not 3"):
        read_references(write_json(tmp_path / "x.json", {"annotations": [{"image_id": 1, "caption": 3}]}))


# Publishers' layouts


def make_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (20, 20), "red").save(folder / name)


def test_layouts_of_the_publishers_are_found(tmp_path):
    coco = {"images": [], "dataset": "coco"}
    for cocoid, split in ((9, "test"), (10, "test"), (11, "val"), (12, "restval")):
        name = f"COCO_val2014_{cocoid:012}.jpg"
        sentences = [{"raw": f"a picture {cocoid}."}, {"raw": "red"}]
        image = {"filepath": "val2014", "filename": name, "cocoid": cocoid, "split": split, "sentences": sentences}
        coco["images"].append(image)
        make_images(tmp_path / "coco" / "val2014", [name])
    write_json(tmp_path / "coco" / "dataset_coco.json", coco)
    data = load_evaluation_set(BENCHMARKS["coco-karpathy"], tmp_path / "coco")
    assert (data.ids, data.references[0]) == ([9, 10], ["a picture 9.", "red"])
    assert data.images[1].size == (20, 20)
    assert load_evaluation_set(BENCHMARKS["coco-karpathy"], tmp_path / "coco", "val").ids == [11]

    domains = ["near-domain", "out-domain"]
    nocaps = {"images": [{"id": n, "file_name": f"{n}.jpg", "domain": domains[n]} for n in (0, 1)]}
    nocaps["annotations"] = [{"image_id": n, "caption": "red", "id": n} for n in (1, 0)]
    make_images(tmp_path / "nocaps" / "val", ["0.jpg", "1.jpg"])
    write_json(tmp_path / "nocaps" / "nocaps_val_4500_captions.json", nocaps)
    data = load_evaluation_set(BENCHMARKS["nocaps"], tmp_path / "nocaps")
    assert (data.domains, data.images[0].size) == (domains, (20, 20))

    stair = {"images": [{"id": 5, "file_name": "COCO_val2014_000000000005.jpg"}]}
    stair["annotations"] = [{"image_id": 5, "id": n, "caption": text} for n, text in enumerate(["赤い", ""])]
    make_images(tmp_path / "stair" / "val2014", ["COCO_val2014_000000000005.jpg"])
    write_json(tmp_path / "stair" / "stair_captions_v1.2_val.json", stair)
    data = load_evaluation_set(BENCHMARKS["stair"], tmp_path / "stair")
    assert data.references == [["赤い", ""]]  # empty ones count in published scores

    make_images(tmp_path / "cc" / "validation", ["0.jpg", "2.jpg"])
    rows = "".join(f"picture {n}\thttp://example.org/{n}.jpg\n" for n in range(3))
    (tmp_path / "cc" / "Validation_GCC-1.1.0-Validation.tsv").write_text(rows)
    data = load_evaluation_set(BENCHMARKS["conceptual-captions"], tmp_path / "cc")
    assert (data.ids, data.references) == ([0, 2], [["picture 0"], ["picture 2"]])

    with pytest.raises(FileNotFoundError, match="dataset_flickr8k.json"):
        load_evaluation_set(BENCHMARKS["flickr8k"], tmp_path)


def test_emoji_has_the_number_of_images_that_its_benchmark_says():
    for name in ("emoji", "emoji-ja"):
        for split, images in BENCHMARKS[name].splits.items():
            data = load_evaluation_set(BENCHMARKS[name], split=split)
            assert len(data) == images and data.images[images - 1].size == (128, 128)


# The paper's tables


def test_the_papers_tables():
    assert {row.benchmark for row in PAPER_ROWS} == {"conceptual-captions", "nocaps", "coco-karpathy"}
    assert [len(paper_rows(name)) for name in ("conceptual-captions", "nocaps", "coco-karpathy")] == [3, 4, 7]
    assert paper_rows("coco-karpathy", "val") == [] and paper_rows("emoji") == []
    coco = {row.method: row.scores["entire"]["cider"] for row in paper_rows("coco-karpathy")}
    assert coco["ClipCap; Transformer"] == 113.08 and coco["Oscar"] == 124.12
    for row in PAPER_ROWS:
        assert row.split in BENCHMARKS[row.benchmark].splits
        assert {*row.scores} == {"entire", *BENCHMARKS[row.benchmark].domains}


def test_a_model_is_held_against_the_row_of_its_variant(make_model):
    def methods(**config):
        model = make_model(**config)
        return [row.method for row in rows_to_compare("coco-karpathy", "test", model.config)]

    assert methods(mapping_type="transformer", clip_length=4, freeze_language_model=True) == ["ClipCap; Transformer"]
    assert methods(mapping_type="mlp") == ["ClipCap; MLP + GPT-2 tuning"]
    assert methods(mapping_type="mlp", freeze_language_model=True) == ["ClipCap; MLP, GPT-2 frozen"]
    assert methods(mapping_type="linear") == ["ClipCap; Transformer", "ClipCap; MLP + GPT-2 tuning"]


def test_scores_stand_beside_the_papers():
    report, _ = evaluate(None, None, BENCHMARKS["coco-karpathy"], "test", allow_subset=True)
    here = report["scores"]["entire"]["cider"]
    line = f"CIDEr: paper 113.08 (ClipCap; Transformer), here {here:.2f}, difference {here - 113.08:+.2f}"
    summary = plain_summary(report)
    assert line in summary and "never reproduced" in summary
    head, *rows = score_table(report)
    assert [row[0] for row in rows[-2:]] == ["paper: ClipCap; MLP, GPT-2 frozen", "here"]
    assert rows[0][head.index("CIDEr")] == "113.50" and rows[-1][head.index("CIDEr")] == f"{here:.2f}"


# The page


def test_the_page_holds_its_images_and_escapes_its_texts(tmp_path, images):
    captions = {**CAPTIONS, 3: "<script>alert(1)</script> & dogs"}
    report, data = evaluate(captions, evaluation_set(images=images[:4]))
    write_report(tmp_path, report, data)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 4
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=.?(?!.?data:)", page)  # nothing is loaded
    assert page.index("two dogs run on grass") < page.index("a blue boat")  # the worst first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "results.json", "scores.json"]
    assert read_results(tmp_path / "results.json") == captions
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == report


def test_the_page_shows_the_worst_the_middle_and_the_best(tmp_path):
    words = "a red dog sits on the green grass of a park".split()
    captions = {n: " ".join(words[: n % 10 + 1]) for n in range(60)}
    data = EvaluationSet(list(range(60)), [[" ".join(words), f"number {n}"] for n in range(60)], source="x")
    report, data = evaluate(captions, data)
    write_report(tmp_path, report, data)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    worst, middle, best = re.split(r"<h2>(?:The worst 12|12 in the middle|The best 12)</h2>", page)[1:]
    scores = [[float(x) for x in re.findall(r"CIDEr ([\d.]+)</span>", part)] for part in (worst, middle, best)]
    ranked = sorted(round(100 * image["cider"], 1) for image in report["per_image"])
    assert scores == [ranked[:12], ranked[24:36], ranked[:-13:-1]]
