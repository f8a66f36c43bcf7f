"""The claims, the choices, the rule and the table: no captioner is needed."""

import json

import pytest
from clipcap_hf.evaluation import PAPER_ROWS
from clipcap_hf.reproduce import TABLES, Claim, Settings, claims_of
from clipcap_hf.reproduce.card import may_be_written
from clipcap_hf.reproduce.choices import CHOICES, complete, grid, read_choices
from clipcap_hf.reproduce.stages import Captioner, choices_of_training
from clipcap_hf.reproduce.status import Number, Score, reasons_against
from clipcap_hf.reproduce.table import build_rows, markdown, write_table


PARTS = {"mapping_type": "mlp", "clip_embed_dim": 512, "language_model": ["gpt2", 12, 768]}


def settings(tmp_path, **values):
    values = {"tables": ("coco",), "variants": ("mlp",), "data": str(tmp_path), **values}
    return Settings(out=str(tmp_path / "out"), **values)


def evaluation(tokenizer="ptb (Stanford CoreNLP 3.4.1)", deviations=(), **parts):
    return {"protocol": {"deviations": list(deviations), "tokenizer": tokenizer}, "parts": {**PARTS, **parts}}


def captioner(trained_on="coco", variant="mlp", seed=0):
    return Captioner(trained_on, variant, seed, choices_of_training(complete({}), variant))


def score(value, seed=0, decoding="official-beam-5", reasons=(), metric="cider", table="coco", variant="mlp"):
    scores = {"entire": {metric: value}}
    return Score(
        table, TABLES[table].split, captioner(seed=seed, variant=variant), decoding, scores, reasons, "scores.json"
    )


def cells(rows, metric="cider"):
    return next(row.cells() for row in rows if row.claim.metric == metric)


# The claims


def test_the_page_claims_twelve_numbers():
    claims = [
        (claim.table, claim.variant, claim.domain, claim.metric, claim.claimed)
        for table in ("coco", "conceptual-captions", "nocaps")
        for variant in ("transformer", "mlp")
        for claim in claims_of(table, variant)
        if claim.is_headline
    ]
    nocaps = {
        "transformer": {"in-domain": 84.85, "near-domain": 66.82, "out-domain": 49.14, "entire": 65.83},
        "mlp": {"in-domain": 79.73, "near-domain": 67.69, "out-domain": 49.35, "entire": 65.7},
    }
    assert claims == [
        ("coco", "transformer", "entire", "bleu_4", 33.53),
        ("coco", "mlp", "entire", "bleu_4", 32.15),
        ("conceptual-captions", "transformer", "entire", "cider", 71.82),
        ("conceptual-captions", "mlp", "entire", "cider", 87.26),
        *(
            ("nocaps", variant, domain, "cider", value)
            for variant in nocaps
            for domain, value in nocaps[variant].items()
        ),
    ]


def test_every_number_of_the_papers_two_captioners_is_a_claim():
    main = [row for row in PAPER_ROWS if row.is_clipcap and not row.ablation]
    numbers = sum(len(scores) for row in main for scores in row.scores.values())
    found = [claim for table in TABLES for variant in ("mlp", "transformer") for claim in claims_of(table, variant)]
    assert sum(claim.claimed is not None for claim in found) == numbers == 30


def test_nocaps_is_scored_with_the_captioner_of_coco():
    assert TABLES["nocaps"].trained_on == "coco" and TABLES["nocaps"].choose_on is None


# The choices


def test_choices_are_read_strictly():
    assert read_choices(["normalize=yes", "clip=/models/clip"]) == {"normalize": "yes", "clip": "/models/clip"}
    for text, message in (
        ("decoding", "NAME=VALUE"),
        ("beams=5", "NAME=VALUE"),
        ("normalize=maybe", "no, yes"),
        ("lengths=40", "like 40/40"),
        ("lengths=0/10", "like 40/40"),
    ):
        with pytest.raises(ValueError, match=message):
            read_choices([text])
    with pytest.raises(ValueError, match="given twice"):
        read_choices(["normalize=yes", "normalize=no"])


def test_the_grid_changes_one_choice_at_a_time():
    tried = grid({"normalize": "yes"}, "mlp")
    base = tried[0]
    assert base["normalize"] == "yes" and base["decoding"] == CHOICES["decoding"].default
    changed = [{name for name in base if other[name] != base[name]} for other in tried[1:]]
    assert changed == [{"clip"}, {"normalize"}, {"epochs"}, {"language-model"}, {"captions-end"}]
    with_lengths = [other for other in grid({}, "transformer") if other["lengths"] != "40/40"]
    assert with_lengths == [{**complete({}), "lengths": "10/10"}]


def test_captioners_of_other_choices_have_other_names():
    names = {
        Captioner("coco", variant, seed, choices_of_training(complete(chosen), variant)).name
        for variant in ("mlp", "transformer")
        for seed in (0, 1)
        for chosen in ({}, {"normalize": "yes"}, {"lengths": "10/10"}, {"decoding": "greedy"})
    }
    # Decoding makes no other captioner, and lengths are of the transformer.
    assert len(names) == 2 * (2 + 3)


# The rule


@pytest.mark.parametrize(
    ("values", "metric", "reproduces"),
    [
        ([109.35], "cider", True),
        ([109.36], "cider", False),
        ([107.35], "cider", True),
        ([32.65], "bleu_4", True),
        ([32.66], "bleu_4", False),
        ([31.0, 35.0], "bleu_4", False),  # a deviation of two seeds says little
        ([31.0, 33.2, 34.5], "bleu_4", True),
        ([100.0, 100.1, 100.2], "cider", False),
    ],
)
def test_a_number_reproduces_within_the_tolerance_or_two_deviations(values, metric, reproduces):
    claim = next(claim for claim in claims_of("coco", "mlp") if claim.metric == metric)
    assert Number.of(values).reproduces(claim) is reproduces


def test_what_rules_a_number_out(tmp_path):
    trained = {"images": 113_287}
    plain = settings(tmp_path)

    def reasons(
        settings=plain, table="coco", split="test", captioner=captioner(), evaluation=evaluation(), training=trained
    ):
        return "; ".join(reasons_against(settings, table, split, captioner, evaluation, training))

    assert reasons() == ""
    assert "rehearsal" in reasons(settings(tmp_path, rehearsal=True))
    assert "limit of 10 images" in reasons(settings(tmp_path, limit=10))
    assert "another recipe: max_steps=10" in reasons(settings(tmp_path, training={"max_steps": 10}))
    assert "the split val" in reasons(split="val")
    assert "these are 30" in reasons(evaluation=evaluation(deviations=["has 5000 images, and these are 30"]))
    assert "the tokenizer python (not exact)" in reasons(evaluation=evaluation("python (not exact)"))
    assert "the tokenizer none" in reasons(evaluation=evaluation("none"))
    assert "trained on nocaps" in reasons(table="nocaps", split="val", captioner=captioner("nocaps"))
    assert "trained on conceptual-captions" in reasons(captioner=captioner("conceptual-captions"))
    assert "nobody says" in reasons(captioner=captioner(None))
    assert "82783 training images of 113287" in reasons(training={"images": 82_783})
    assert "the mapping linear" in reasons(evaluation=evaluation(mapping_type="linear"))
    assert "gpt2, 24 layers" in reasons(evaluation=evaluation(language_model=["gpt2", 24, 1024]))
    assert "width 768" in reasons(evaluation=evaluation(clip_embed_dim=768))


# The table


def test_a_table_of_nothing_is_empty_cells(tmp_path):
    rows = build_rows(settings(tmp_path, tables=("all",), variants=("all",)), [])
    assert len(rows) == 30 and all(row.cells()[4:] == ["", ""] for row in rows)
    assert [row.claim.is_headline for row in rows] == [True] * 12 + [False] * 18


def test_numbers_are_means_of_seeds_with_the_difference(tmp_path):
    found = [score(107.0, 0), score(108.0, 1), score(109.0, 2), score(50.0, 0, "greedy")]
    rows = build_rows(settings(tmp_path, seeds=3), found)
    assert cells(rows)[3:] == [
        "108.35",
        "108.00 ± 1.00 of 3 seeds (-0.35), official-beam-5; 50.00 (-58.35), greedy",
        "reproduced",
    ]
    assert cells(rows, "meteor")[4:] == ["", ""]


def test_the_decoding_that_counts_was_chosen_before(tmp_path):
    found = [score(100.0), score(108.0, 0, "greedy")]
    assert cells(build_rows(settings(tmp_path), found))[5] == "not reproduced (tried: official-beam-5, greedy)"
    chosen = settings(tmp_path, chosen={"decoding": "greedy"})
    assert cells(build_rows(chosen, found))[5] == "reproduced"


def test_what_is_no_reproduction_is_never_in_the_column_verified(tmp_path):
    rows = build_rows(settings(tmp_path), [score(108.35, reasons=("a limit of 10 images",))])
    assert cells(rows)[4] == "" and "not a reproduction" in cells(rows)[5]
    assert rows[0].record()["verified"] is None
    text = markdown(settings(tmp_path), rows)
    assert "No reproduction: COCO, Karpathy split, ClipCap; MLP + GPT-2 tuning: a limit of 10 images." in text


def test_one_seed_that_does_not_count_spoils_the_mean(tmp_path):
    rows = build_rows(settings(tmp_path, seeds=2), [score(108.35), score(108.35, 1, reasons=("a rehearsal",))])
    assert cells(rows)[4] == ""


def test_a_table_without_a_claim_shows_its_numbers(tmp_path):
    rows = build_rows(settings(tmp_path, tables=("flickr8k",)), [score(50.0, table="flickr8k")])
    assert cells(rows)[3:] == ["", "50.00, official-beam-5", "no claim of the paper"]


@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_three_files_say_the_same(tmp_path, rehearsal):
    chosen = settings(tmp_path, rehearsal=rehearsal)
    rows = build_rows(chosen, [score(108.0), score(99.0, metric="bleu_4", reasons=("<b>|",))])
    written = write_table(chosen, rows)
    text, content, page = (path.read_text(encoding="utf-8") for path in written)
    assert json.loads(content)["rehearsal"] is rehearsal
    assert ("REHEARSAL" in text) is ("REHEARSAL" in page) is rehearsal
    assert [row["status"] for row in json.loads(content)["rows"]] == [row.status for row in rows]
    # The heading of a rehearsal is the one reason against all of its numbers.
    assert "<b>" not in page and ("&lt;b&gt;" in page) is not rehearsal
    for row in rows:
        assert f"| {row.status} |" in text and f"<td>{row.status}</td>" in page
    assert "Oscar" in text and "Oscar" in page  # as context


def test_a_rehearsal_is_never_written_into_a_card(tmp_path):
    assert may_be_written(settings(tmp_path), score(1.0))
    assert not may_be_written(settings(tmp_path, rehearsal=True), score(1.0))
    assert not may_be_written(settings(tmp_path), score(1.0, reasons=("a limit of 10 images",)))
    assert not may_be_written(settings(tmp_path), score(1.0, decoding="greedy"))


# The settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tables": ("imagenet",)}, "--table must be one of coco, "),
        ({"variants": ("cnn",)}, "--variant must be one of"),
        ({"data": None}, "--data ROOT"),
        ({"tables": ("stair",)}, "not trained by the paper's recipe"),
        ({"source": "somewhere"}, "--from must be"),
        ({"source": "checkpoint"}, "needs a path"),
        ({"source": "checkpoint", "path": "/nowhere"}, "There is no /nowhere"),
        ({"source": "results", "path": ".", "tables": ("all",)}, "one table by one captioner"),
        ({"source": "checkpoint", "path": ".", "seeds": 3}, "--seeds is for --from train"),
        ({"source": "checkpoint", "path": ".", "grid": True}, "--grid compares trainings"),
        ({"grid": True, "tables": ("nocaps",)}, "scored with COCO's captioner"),
        ({"grid": True, "tables": ("conceptual-captions",)}, "one split only"),
        ({"trained_on": "coco"}, "training here is recorded"),
        ({"tables": ("conceptual-captions",), "chosen": {"epochs": "early-stopping"}}, "needs a validation split"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        settings(tmp_path, **values)


def test_a_claim_is_a_plain_value():
    assert Claim("coco", "mlp", "entire", "bleu_4", 32.15) in claims_of("coco", "mlp")
