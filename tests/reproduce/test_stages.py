"""The stages on small made-up data: what they refuse, what they skip, and that they are those of the commands."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.cli import main
from clipcap_hf.evaluation import load_evaluation_set, write_results
from clipcap_hf.reproduce import TABLES, Settings, reproduce
from clipcap_hf.reproduce.card import write_cards
from clipcap_hf.reproduce.inputs import PublishedSplit, check_inputs
from clipcap_hf.reproduce.ledger import Ledger
from clipcap_hf.reproduce.rehearsal import _emoji, build_data, build_models, rehearsal_settings
from clipcap_hf.reproduce.stages import Captioner
from clipcap_hf.reproduce.status import Score
from clipcap_hf.reproduce.table import build_rows
from transformers import GPT2Config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Build the data and the models of a rehearsal once."""
    folder = tmp_path_factory.mktemp("made")
    build_data(folder / "data", _emoji())
    build_models(folder / "models")
    for name in ("data", "models"):
        (folder / name / "made").write_text("")
    return folder


@pytest.fixture
def out(made, tmp_path):
    for name in ("data", "models"):
        shutil.copytree(made / name, tmp_path / "out" / name)
    return tmp_path / "out"


def settings(out, tables=("coco",), variants=("mlp",), rehearse=True, **values):
    values = {"tokenizer": "python", "training": {"max_steps": 2}, "limit": 6, "data": str(out / "data"), **values}
    chosen = Settings(tables, variants, out=str(out), **values)
    return rehearsal_settings(chosen) if rehearse else chosen


def run(settings):
    said = []
    return reproduce(settings, said.append), said


def cells(rows, metric):
    return next(row.cells() for row in rows if row.claim.metric == metric)


# Data


def test_all_that_is_missing_is_listed_before_anything_runs(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        reproduce(settings(tmp_path, ("all",), ("all",), rehearse=False, data=str(tmp_path)), print)
    text = str(error.value)
    for name in (
        "cocodataset.org",
        "Karpathy",
        "13 GB",
        "Conceptual Captions",
        "Train_GCC-training.tsv",
        "nocaps.org",
    ):
        assert name in text, name
    assert not (tmp_path / "stages").exists()


def test_a_missing_image_names_the_folder_and_its_publisher(out):
    (image,) = list((out / "data/coco/train2014").iterdir())[:1]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of the 130 images.*{image.name}.*2014 Train images"):
        run(settings(out))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "page", "half"])
def test_a_half_downloaded_image_is_refused_before_anything_runs(out, content):
    image = sorted((out / "data/coco/val2014").iterdir())[-1]
    image.write_bytes(image.read_bytes()[:-400] if content is None else content)
    with pytest.raises(ValueError, match=f"1 images are cut short.*{image.name}"):
        run(settings(out))
    assert not (out / "stages").exists()


def test_an_image_with_bytes_after_its_end_is_whole(out):
    image = sorted((out / "data/coco/val2014").iterdir())[-1]
    image.write_bytes(image.read_bytes() + b"\0\0")
    check_inputs([PublishedSplit("coco", "test", out / "data")], allow_subset=True)


def test_the_file_of_another_form_is_refused(out):
    (out / "data/coco/dataset_coco.json").write_text("[]")
    with pytest.raises(ValueError, match="Karpathy split"):
        run(settings(out))


def test_the_other_split_file_is_refused_before_anything_runs(out):
    """Another split of the same images has other numbers of them."""
    with pytest.raises(
        ValueError, match="of another split.*\n.*test: 30 .* 5000\n.*train: 80 .* 113287\n.*val: 20 "
    ) as error:
        run(settings(out, rehearse=False, limit=None))
    assert "--allow-subset" in str(error.value) and not (out / "stages").exists()


def test_the_other_split_file_is_no_reproduction(out):
    assert TABLES["coco"].train_images == 113_287
    rows, _ = run(settings(out, rehearse=False, allow_subset=True, chosen=rehearsal_settings(settings(out)).chosen))
    reasons = "; ".join(rows[0].reasons)
    assert "80 training images of 113287" in reasons and "has 5000 images, and these are" in reasons


@pytest.mark.slow
def test_seeds_train_one_captioner_each_and_are_averaged(out):
    rows, said = run(settings(out, seeds=2))
    assert sum(line.startswith("train-") for line in said) == 2
    number = next(row for row in rows if row.claim.metric == "cider").numbers["official-beam-5"]
    reports = (out / "evaluations").glob("*official-beam-5/scores.json")
    scores = [json.loads(path.read_text())["scores"]["entire"]["cider"] for path in reports]
    assert number.seeds == len(scores) == 2 and number.mean == pytest.approx(sum(scores) / 2)
    digests = {
        json.loads(path.read_text())["model"]["weights_sha256"]
        for path in out.rglob("scores.json")
        if "evaluations" in str(path)
    }
    assert len(digests) == 2


def test_the_time_of_an_interrupted_session_counts(tmp_path):
    ledger, slept = Ledger(tmp_path), []

    def work():
        time.sleep(0.3)
        slept.append(0.3)
        if len(slept) < 3:
            raise KeyboardInterrupt
        return {"done": True}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ledger.run("train", {}, work, str)
    # ... and a third is killed, which leaves no time.
    begun = json.loads((tmp_path / "stages/train.begun.json").read_text())
    (tmp_path / "stages/train.begun.json").write_text(json.dumps({**begun, "sessions": 3}))
    assert not ledger.is_done("train") and ledger.run("train", {}, work, str) == {"done": True}
    cost = ledger.costs()["train"]
    assert cost["seconds"] >= 0.8 and (cost["sessions"], cost["sessions_without_time"]) == (4, 1)


def test_a_file_that_changes_during_the_run_is_an_error(out):
    def change(line):
        if line.startswith("train-"):
            image = sorted((out / "data/coco/val2014").iterdir())[-1]
            image.write_bytes(image.read_bytes() + b"\0")

    with pytest.raises(ValueError, match="The files of coco, test, .* changed since this run began .*images_sha256"):
        reproduce(settings(out), change)


def test_a_file_that_changed_between_two_runs_is_an_error(out):
    run(settings(out))
    path = out / "data/coco/dataset_coco.json"
    path.write_text(path.read_text().replace("Here we see", "Here you see", 1))
    with pytest.raises(ValueError, match="begun with other values of annotations_sha256"):
        run(settings(out))


# Stages


@pytest.fixture(scope="module")
def finished(made):
    """Run the stages once, in the folder of the data; tests leave it as it is."""
    return made, *run(settings(made, ("coco", "nocaps")))


def test_the_stages_run_in_order_and_are_not_repeated(finished):
    out, rows, said = finished
    kinds = [line.split("-")[0] for line in said]
    assert kinds == ["checking the data ...", "embed", "train", *["evaluate"] * 4]
    table = (out / "table.md").read_text()
    again, said = run(settings(out, ("coco", "nocaps")))
    assert said == ["checking the data ..."] and (out / "table.md").read_text() == table
    record = json.loads((out / "record.json").read_text())
    assert record["data"]["data-coco-train"]["images"] == 80 and record["versions"]["torch"]
    assert all(cost["sessions"] == 1 for cost in record["stages"].values()) and len(record["reports"]) == 4


def test_a_rehearsal_is_marked_everywhere_and_writes_no_card(finished):
    out, rows, _ = finished
    assert len(rows) == 12 and all("rehearsal" in row.reasons[0] for row in rows if row.numbers)
    assert all(row.cells()[4] == "" for row in rows)
    (folder,) = (out / "captioners").iterdir()
    assert not (folder / ".eval_results").exists() and not (folder / "README.md").exists()


def test_what_counts_goes_into_the_card_and_eval_results(finished, tmp_path):
    """The report is a rehearsal's; here it stands for one that counts."""
    out, _, _ = finished
    (trained,) = (out / "captioners").iterdir()
    folder = Path(shutil.copytree(trained, tmp_path / trained.name))
    report = next((out / "evaluations").glob("coco-test-*official-beam-5")) / "scores.json"
    scores = json.loads(report.read_text())["scores"]
    real = Settings(("coco",), ("mlp",), out=str(tmp_path), data=str(tmp_path))
    captioner = Captioner("coco", "mlp", 0)
    found = [Score("coco", "test", captioner, "official-beam-5", scores, (), str(report))]
    rows = build_rows(real, found)
    for _ in range(2):  # again changes nothing
        assert write_cards(real, found, rows, {captioner.name: folder}) == [folder / "README.md"]
        card = (folder / "README.md").read_text()
        assert card.count("## Reproduction of the paper") == 1 and "model-index" in card
    assert f"| 32.15 | {scores['entire']['bleu_4']:.2f} (" in card and "not reproduced" in card
    assert (folder / ".eval_results/clipcap-coco-karpathy-test.yaml").is_file()
    ClipCapForConditionalGeneration.from_pretrained(folder)
    others = [Score("coco", "test", captioner, "official-beam-5", scores, ("a limit of 6 images",), str(report))]
    assert write_cards(real, others, rows, {captioner.name: folder}) == []


def test_nocaps_has_its_domains_and_the_captioner_of_coco(finished):
    out, rows, _ = finished
    found = [row for row in rows if row.claim.table == "nocaps" and row.numbers]
    assert {row.claim.domain for row in found} == {"entire", "in-domain", "near-domain", "out-domain"}
    assert [path.name.split("-")[0] for path in (out / "captioners").iterdir()] == ["coco"]


def test_the_captioner_decodes_as_the_official_code(finished):
    out, _, _ = finished
    (folder,) = (out / "captioners").iterdir()
    decoding = json.loads((folder / "generation_config.json").read_text())
    tokenizer = ClipCapProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.decode(decoding["eos_token_id"]) == "." and decoding["max_new_tokens"] == 67
    assert json.loads((folder / "reproduction.json").read_text())["trained_on"] == "coco"


def test_the_numbers_are_those_of_clipcap_evaluate(finished):
    out, rows, _ = finished
    (folder,) = (out / "captioners").iterdir()
    command = ["evaluate", "--model", folder, "--benchmark", "coco-karpathy", "--data", out / "data", "--limit", "6"]
    command += ["--tokenizer", "python", "--official-beam-search", "--device", "cpu", "--out", out / "by-hand"]
    assert main([str(word) for word in command]) == 0
    by_hand = json.loads((out / "by-hand/coco-karpathy-test/scores.json").read_text())["scores"]["entire"]
    for metric in ("bleu_4", "cider"):
        row = next(row for row in rows if (row.claim.table, row.claim.metric) == ("coco", metric))
        assert row.numbers["official-beam-5"].mean == by_hand[metric]


def test_a_captioner_that_changed_is_an_error(finished):
    out, _, _ = finished
    (folder,) = (out / "captioners").iterdir()
    path = folder / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "max_new_tokens": 5}))
    with pytest.raises(ValueError, match="changed since it was trained"):
        run(settings(out, ("coco", "nocaps")))
    path.write_text(before)


def test_other_settings_in_the_same_folder_are_an_error(finished):
    out, _, _ = finished
    with pytest.raises(ValueError, match="begun with other values of recipe: name another folder"):
        run(settings(out, training={"max_steps": 3}))


def test_a_folder_of_something_else_is_refused(out):
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="files of something else"):
        run(settings(out))


@pytest.mark.slow
def test_a_grid_is_on_the_validation_split_alone(out):
    rows, said = run(settings(out, grid=True, limit=3))
    grid = json.loads((out / "grid.json").read_text())["rows"]
    assert rows == [] and {row["split"] for row in grid} == {"val"} and not (out / "table.md").exists()
    chosen = {choice for row in grid for choice in row["choices"].split(", ")}
    changed = {choice for choice in chosen if not choice.startswith(("clip=", "language-model="))}  # set for the test
    assert changed == {"captions-end=end-token", "epochs=early-stopping", "normalize=yes"}
    assert not any("evaluate-coco-test" in line for line in said)


# Other sources


def test_a_results_file_fills_the_column(out):
    data = load_evaluation_set(TABLES["coco"].protocol, out / "data", "test")
    write_results(out.parent / "results.json", {image: texts[0] for image, texts in zip(data.ids, data.references)})
    values = {"source": "results", "path": str(out.parent / "results.json"), "limit": None, "training": {}}
    rows, said = run(settings(out, **values))
    assert len(said) == 2 and said[1].startswith("evaluate-")
    assert "a results file" in cells(rows, "cider")[5]
    (out.parent / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="begun with other values of captioner"):
        run(settings(out, **values))


def test_a_results_file_of_another_split_is_refused(out):
    data = load_evaluation_set(TABLES["coco"].protocol, out / "data", "val")
    write_results(out.parent / "results.json", {image: texts[0] for image, texts in zip(data.ids, data.references)})
    with pytest.raises(ValueError, match="captions are of images that .* does not have"):
        run(settings(out, rehearse=False, source="results", path=str(out.parent / "results.json"), training={}))


def test_a_checkpoint_must_say_what_it_was_trained_on(finished, out):
    trained, before, _ = finished
    (source,) = (trained / "captioners").iterdir()
    folder = Path(shutil.copytree(source, out.parent / "captioner"))
    values = {"source": "checkpoint", "path": str(folder), "training": {}}
    known, _ = run(settings(out, variants=("all",), **values))
    for row in before:  # the same captions, so the same numbers
        if row.claim.table == "coco" and row.numbers:
            assert next(each.numbers for each in known if each.claim == row.claim) == row.numbers
    assert not any("nobody says" in reason for row in known for reason in row.reasons)
    with pytest.raises(ValueError, match="trained on coco, and --trained-on nocaps"):
        run(settings(out, trained_on="nocaps", **values))
    (folder / "reproduction.json").unlink()
    nocaps, _ = run(settings(out, ("nocaps",), trained_on="nocaps", **values))
    assert "trained on nocaps, and the claim's saw coco" in "; ".join(nocaps[0].reasons)
    unknown, _ = run(settings(out, **values))
    assert "nobody says" in "; ".join(unknown[0].reasons)


def test_a_checkpoint_that_is_no_captioner_is_refused(out):
    with pytest.raises(ValueError, match="is a gpt2 model, not a captioner"):
        run(settings(out, source="checkpoint", path=str(out / "models/gpt2"), training={}))


OFFICIAL_NAMES = (
    ("fc1", "model.0"),
    ("fc2", "model.2"),
    ("clip_projection", "linear"),
    ("layers.", "transformer.layers."),
    ("layer_norm", "norm"),
    ("self_attn.q_proj", "attn.to_queries"),
    ("self_attn.out_proj", "attn.project"),
    (r"(layers\.\d+)\.model\.0", r"\1.mlp.fc1"),
    (r"(layers\.\d+)\.model\.2", r"\1.mlp.fc2"),
)


def official_file(path: Path, model):
    """Write the weights of a captioner as the official code names them."""
    state = {f"gpt.{name}": value for name, value in model.language_model.state_dict().items()}
    for name, value in model.mapping_network.state_dict().items():
        if "k_proj" in name:
            values = model.mapping_network.get_parameter(name.replace("k_proj", "v_proj"))
            name, value = name.replace("self_attn.k_proj", "attn.to_keys_values"), torch.cat([value, values])
        if "v_proj" in name:
            continue
        for ours, official in OFFICIAL_NAMES:
            name = re.sub(ours, official, name)
        state[f"clip_project.{name}"] = value
    torch.save(state, path)
    return path


def test_official_weights_of_the_transformer_are_converted_and_scored(out):
    """Its captions are those of the captioner that the weights are of, with the embedding divided by its norm."""
    captioner = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(out / "models/clip"),
        str(out / "models/gpt2"),
        mapping_type="transformer",
        prefix_length=4,
        clip_length=3,
        mapping_num_layers=2,
        normalize_clip_embeds=True,
    )
    path = official_file(out.parent / "transformer_weights.pt", captioner)
    values = {"source": "official-weights", "path": str(path), "training": {}}
    rows, said = run(settings(out, ("coco", "nocaps"), variants=("transformer",), **values))
    assert [line.split("-")[0] for line in said] == ["checking the data ...", "convert", *["evaluate"] * 4]
    (folder,) = (out / "captioners").iterdir()
    converted = ClipCapForConditionalGeneration.from_pretrained(folder)
    assert converted.config.normalize_clip_embeds and converted.config.freeze_language_model
    assert (converted.config.prefix_length, converted.config.clip_length) == (4, 3)
    for name, value in captioner.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name
    tokenizer = ClipCapProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.decode(converted.generation_config.eos_token_id) == "."
    assert {row.claim.table for row in rows if row.numbers} == {"coco", "nocaps"}


def test_official_weights_are_converted_and_scored(finished, out):
    trained, before, _ = finished
    (folder,) = (trained / "captioners").iterdir()
    official_file(out.parent / "coco_weights.pt", ClipCapForConditionalGeneration.from_pretrained(folder))
    values = {"source": "official-weights", "training": {}}
    rows, said = run(settings(out, ("coco", "nocaps"), path=str(out.parent), variants=("all",), **values))
    assert sum(line.startswith("convert-") for line in said) == 1
    assert {row.claim.variant for row in rows if row.numbers} == {"mlp"}
    wrong = shutil.copy(out.parent / "coco_weights.pt", out.parent / "transformer_weights.pt")
    with pytest.raises(ValueError, match="is of the variant mlp, not transformer"):
        run(settings(out, path=str(wrong), variants=("transformer",), **values))
    other = shutil.copy(out.parent / "coco_weights.pt", out.parent / "mine.pt")
    with pytest.raises(ValueError, match="name its --variant"):
        run(settings(out, path=str(other), variants=("all",), **values))
    unknown, _ = run(settings(out, path=str(other), **values))
    assert "nobody says" in "; ".join(unknown[0].reasons)


def test_the_models_of_a_rehearsal_are_small(made):
    assert GPT2Config.from_pretrained(made / "models/gpt2").n_embd == 64
