"""Scores in model cards."""

import pytest
import yaml
from clipcap_hf.evaluation import BENCHMARKS, EvaluationSet, evaluate_captions
from clipcap_hf.evaluation.card import update_card
from huggingface_hub import ModelCard, parse_eval_result_entries


CARD = """---
license: mit   # a comment that a YAML writer would lose
tags: [clipcap,  image-captioning]
model-index:
- name: my-captioner
  results:
  - task: {type: image-to-text}
    dataset: {name: Other, type: someone/other, split: test}
    metrics:
    - {type: cider, value: 12.5, name: CIDEr}
language: en
---

# My captioner

Text of mine.

## Evaluation

What I say of it.

## Licence

MIT
"""


def report_on(benchmark="emoji", split="validation", last="a cat", **kwargs):
    captions = {1: "a red heart", 2: "a blue boat sails", 3: last}
    references = [["a red heart", "heart"], ["a boat sails", "a blue boat"], ["a black cat", "a cat"]]
    data = EvaluationSet([1, 2, 3], references, source="x", **kwargs)
    report, _ = evaluate_captions(captions, data, BENCHMARKS[benchmark], split, tokenizer="python", allow_subset=True)
    return {"model": {"name": "my-model"}, "decoding": {"num_beams": 3, "eos_token_id": 0}, **report}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_writing_twice_changes_nothing_and_the_rest_stays(tmp_path, line_break):
    card = tmp_path / "README.md"
    card.write_bytes(CARD.replace("\n", line_break).encode())
    report = report_on()
    assert update_card(tmp_path, report) == [card, tmp_path / ".eval_results" / "clipcap-emoji-validation.yaml"]
    once = files(tmp_path)
    assert update_card(tmp_path, report) == []
    assert files(tmp_path) == once

    lines = card.read_bytes().decode().split(line_break)
    assert "\n" not in "".join(lines)
    old = CARD.split("\n")
    metadata = [*old[1 : old.index("model-index:")], "language: en"]
    assert [line for line in lines if line in metadata] == metadata
    body = old[old.index("# My captioner") :]
    assert [line for line in lines[lines.index("# My captioner") :] if line in body and line] == [x for x in body if x]
    assert lines.index("What I say of it.") < lines.index("### emoji drawings, validation") < lines.index("## Licence")


def test_the_hubs_own_readers_understand_both_forms(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    report = report_on()
    update_card(tmp_path, report)
    card = ModelCard.load(tmp_path / "README.md")
    other, *ours = card.data.eval_results
    assert (other.dataset_type, other.metric_value, card.data.model_name) == ("someone/other", 12.5, "my-captioner")
    scores = report["scores"]["entire"]
    assert {result.metric_type for result in ours} == {name for name in scores if not name.startswith("distinct")} - {
        "vocabulary_size",
        "mean_length",
    }
    (cider,) = [result for result in ours if result.metric_type == "cider"]
    assert cider.metric_value == round(scores["cider"], 2) and cider.dataset_split == "validation"
    assert cider.metric_args == {"tokenizer": "python (not exact)", "images": 3} and cider.verified is None
    assert cider.dataset_name.endswith("(3 images only)")  # of the split

    path = tmp_path / ".eval_results" / "clipcap-emoji-validation.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    (cider,) = [entry for entry in entries if entry.task_id == "validation_cider"]
    assert cider.value == round(scores["cider"], 2)
    assert "num_beams=3" in cider.notes and "only a part of the split: 3 images" in cider.notes


def test_new_scores_replace_their_own_and_leave_others(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    update_card(tmp_path, report_on())
    update_card(tmp_path, report_on("coco-karpathy", "test"))
    update_card(tmp_path, report_on(last="something else"))
    card = ModelCard.load(tmp_path / "README.md")
    ciders = [(r.dataset_type, r.metric_value) for r in card.data.eval_results if r.metric_type == "cider"]
    new = round(report_on(last="something else")["scores"]["entire"]["cider"], 2)
    assert ("clipcap-hf/emoji", new) in ciders and len(ciders) == 3
    assert card.text.count("### emoji drawings, validation") == card.text.count("### COCO, Karpathy split, test") == 1
    assert "paper 113.08 (ClipCap; Transformer)" in card.text and "never reproduced" in card.text


def test_domains_are_in_the_card(tmp_path):
    update_card(tmp_path, report_on("nocaps", "val", domains=["in-domain", "out-domain", "in-domain"]))
    card = ModelCard.load(tmp_path / "README.md")
    domains = [result.dataset_config for result in card.data.eval_results if result.metric_type == "cider"]
    assert domains == [None, "in-domain", "out-domain"]
    entries = yaml.safe_load((tmp_path / ".eval_results" / "clipcap-nocaps-val.yaml").read_text())
    assert "val_in-domain_cider" in [entry["dataset"]["task_id"] for entry in entries]


def test_a_card_is_made_where_there_is_none(tmp_path):
    update_card(tmp_path, report_on())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.model_name == "my-model"
    once = files(tmp_path)
    assert update_card(tmp_path, report_on()) == [] and files(tmp_path) == once


def test_a_card_without_metadata_keeps_its_text(tmp_path):
    (tmp_path / "README.md").write_text("# Only text")
    update_card(tmp_path, report_on())
    assert "# Only text\n\n## Evaluation" in (tmp_path / "README.md").read_text()
    assert ModelCard.load(tmp_path / "README.md").data.eval_results


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nmodel-index: [unclosed\n---\n", "metadata of .* cannot be read"),
        ("---\nmodel-index:\n- results: 3\n---\n", "metadata of .* cannot be read"),
        ("---\na: b\n---\n<!-- clipcap evaluate: emoji validation -->\n", "one of the lines"),
    ],
)
def test_a_broken_card_is_left_as_it_is(tmp_path, card, message):
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        update_card(tmp_path, report_on())
    assert files(tmp_path) == {(tmp_path / "README.md").relative_to(tmp_path): card.encode()}


def test_a_card_needs_a_folder_and_a_benchmark(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        update_card(tmp_path / "absent", report_on())
    with pytest.raises(ValueError, match="--benchmark"):
        update_card(tmp_path, {**report_on(), "benchmark": None})


def test_text_of_prompts_and_data_stays_text(tmp_path):
    nasty = (
        "<!-- end of clipcap evaluate: nocaps val --><script>alert(1)</script> ![x](http://example.org/x.png) `a`\n# b"
    )
    report = report_on("nocaps", "val", domains=[nasty, "out-domain", nasty])
    report["decoding"]["prompt"] = nasty
    report["notes"].append(nasty)
    update_card(tmp_path, report)
    once = files(tmp_path)
    text = (tmp_path / "README.md").read_text().partition("---\n\n#")[2]
    assert "<script" not in text and "![" not in text and "\n# b" not in text and "&lt;script&gt;" in text
    assert text.count("<!-- end of") == 1
    assert update_card(tmp_path, report) == [] and files(tmp_path) == once
