"""One name per option in every command, help in two lengths, and the options of training without torch."""

import argparse
import json
import re

import pytest
from clipcap_hf.cli import build_parser, leaves, main
from clipcap_hf.cli.arguments import DTYPES
from clipcap_hf.cli.parser import ALIASES, one_spelling
from clipcap_hf.cli.train import FIRST, parse
from clipcap_hf.cli.train_options import read_options


LEAVES = {leaf.prog.removeprefix("clipcap "): leaf for leaf in leaves(build_parser())}
WRITES = {
    "demo",
    "caption",
    "train",
    "embed",
    "evaluate",
    "reproduce",
    "convert official",
    "convert embeddings",
    "export onnx",
}
LOADS_A_CAPTIONER = {"caption", "train", "embed", "evaluate", "serve", "export onnx"}
COMPUTES = {"caption", "train", "embed", "evaluate", "reproduce", "serve", "benchmark"}
READS_IMAGES = {"caption", "train", "embed", "evaluate", "reproduce"}


def options(leaf: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in leaf._actions for name in action.option_strings}


@pytest.mark.parametrize("command", LEAVES)
def test_the_same_thing_has_the_same_name(command):
    found = options(LEAVES[command])
    for name, commands in (
        ("--out", WRITES | {"benchmark"}),
        ("--model", LOADS_A_CAPTIONER),
        ("--device", COMPUTES),
        ("--dtype", COMPUTES),
        ("--batch-size", COMPUTES - {"benchmark"}),
        ("--workers", READS_IMAGES),
        ("--data", {"train", "embed", "evaluate", "reproduce"}),
        ("--beams", {"caption", "evaluate", "benchmark", "train"}),
        ("--epochs", {"demo", "train"}),
    ):
        assert (name in found) == (command in commands), name
    assert not found.keys() & ALIASES.keys()
    assert not [name for name in found if "_" in name]
    if "--dtype" in found:
        assert tuple(found["--dtype"].choices) == DTYPES
    assert found["--help"].help and "--debug" in found


def test_other_names_and_spellings_are_understood():
    words = "train --data d --output_dir=o --num-beams 2 --num_workers 1 --num_train_epochs 3 --no_freeze_vision"
    arguments, rest = build_parser().parse_known_args(one_spelling(words.split()))
    assert (arguments.output_dir, arguments.generation_num_beams, arguments.num_train_epochs) == ("o", 2, 3)
    assert arguments.dataloader_num_workers == 1 and arguments.freeze_vision is False and not rest
    words = "evaluate --model m --data d --output_dir o --num_beams 2 --batch_size 3"
    arguments = build_parser().parse_args(one_spelling(words.split()))
    assert (arguments.out, arguments.beams, arguments.batch_size) == ("o", 2, 3)
    assert one_spelling(["caption", "--prompt=a_b", "--", "--my_file.png"]) == [
        "caption", "--prompt=a_b", "--", "--my_file.png",
    ]  # fmt: skip


@pytest.mark.parametrize("command", LEAVES)
def test_help_has_two_lengths(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    first = capsys.readouterr().out
    assert first.startswith(f"usage: clipcap {command}") and "(default: None)" not in first
    assert first.count("\n  --") <= 32, "name the rarer options with `add_more_arguments`"
    if "--help-all" not in first:
        return
    with pytest.raises(SystemExit):
        main([*command.split(), "--help-all"])
    everything = capsys.readouterr().out
    for name, action in options(LEAVES[command]).items():
        shown = bool(re.search(rf"  {name}[ ,\n]|, {name}[ \n]", everything))
        assert shown == (action.help != argparse.SUPPRESS), name
    assert everything.count("\n  --") > first.count("\n  --")


def test_training_shows_about_25_options_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n{title}:\n" in printed for title in FIRST)
    assert 22 <= printed.count("\n  --") <= 32


def test_options_of_training_are_the_fields_of_its_dataclasses():
    from clipcap_hf.training.arguments import CaptioningArguments, DataArguments, ModelArguments
    from transformers import HfArgumentParser

    theirs = {
        action.dest: action
        for action in HfArgumentParser((ModelArguments, DataArguments, CaptioningArguments))._actions
    }
    theirs.pop("help")
    ours = read_options()
    assert ours.keys() == theirs.keys()
    for name, option in ours.items():
        if option.owner in ("ModelArguments", "DataArguments", "CaptioningArguments"):
            assert option.help == theirs[name].help
            assert option.is_switch or option.default is None or option.default == theirs[name].default
        if option.choices:
            assert option.choices == theirs[name].choices
    assert LEAVES["train"] and {action.dest for action in LEAVES["train"]._actions} >= ours.keys()


def test_values_arrive_as_they_were_given(tmp_path):
    model_args, data_args, args = parse(
        [
            *(
                "--data",
                "d",
                "--out",
                str(tmp_path),
                "--epochs",
                "2.5",
                "--lr-scheduler-type",
                "cosine",
                "--beams",
                "3",
            ),
            *("--freeze-language-model", "--config-overrides", '{"mapping_num_layers": 4}', "--max_steps", "7"),
            *("--report-to", "none", "--use-cpu", "--disable-tqdm", "--label-names", "labels"),
        ]
    )
    assert model_args.freeze_language_model is True and model_args.config_overrides == {"mapping_num_layers": 4}
    assert (args.num_train_epochs, args.max_steps, args.generation_num_beams) == (2.5, 7, 3)
    assert args.lr_scheduler_type == "cosine" and args.disable_tqdm and args.label_names == ["labels"]
    assert args.report_to == [] and data_args.data == "d"


def test_device_and_dtype_of_training(tmp_path):
    args = parse(["--data", "d", "--out", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"])[2]
    assert args.use_cpu and args.bf16 and not args.fp16 and args.device.type == "cpu"
    assert not parse(["--data", "d", "--out", str(tmp_path), "--device", "cpu", "--dtype", "float32"])[2].bf16
    with pytest.raises(ValueError, match="no device nonsense"):
        parse(["--data", "d", "--out", str(tmp_path), "--device", "nonsense"])


def test_recipe_files_take_the_names_of_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"out": str(tmp_path), "epochs": 3, "num_beams": 2, "device": "cpu", "data": "d"}))
    args = parse([str(recipe), "--epochs", "4"])[2]
    assert (args.output_dir, args.num_train_epochs, args.generation_num_beams) == (str(tmp_path), 4, 2)
    assert args.use_cpu
    recipe.write_text("learnin_rate: 1\n")
    with pytest.raises(ValueError, match="unknown options: learnin_rate. See clipcap train --help-all"):
        parse([str(recipe)])


@pytest.mark.parametrize(
    "words, said",
    [
        ("train --data d", "the following arguments are required: --out"),
        ("train my-images --out o", "a file of options ends in .yaml"),
        ("train --data d --out o --learnin-rate 1", "did you mean --learning-rate?"),
        ("train --data d --out o --epochs many", "argument --epochs: invalid number value"),
        ("train --data d --out o --recipe papers", "invalid choice: 'papers'"),
        ("train --data d --out o --resume maybe", "'maybe' is neither True nor False"),
        ("export onnx --out o", "give the captioner once: --model NAME"),
        ("convert official a.pt", "usage: clipcap convert official STATE.pt --out DIR"),
    ],
)
def test_usage_errors_name_the_command(words, said, capsys, monkeypatch):
    monkeypatch.setattr("clipcap_hf.cli._import_package", lambda: pytest.fail("something slow was imported"))
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    command = " ".join(error.split()[2:4]) if words.startswith(("export", "convert")) else words.split()[0]
    assert stop.value.code == 2 and said in error
    assert error.endswith(f"clipcap {command} --help shows the options.\n")


def test_names_of_files_that_look_like_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.png").touch()
    with pytest.raises(SystemExit):
        main(["caption", "a.png", "-dash.png"])
    assert "unrecognized arguments: -dash.png (write ./-dash.png for the file)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("caption a.png --skip-existing", "go with --out or --sidecar"),
        ("evaluate --model m", "give the images that --model captions"),
        ("evaluate --benchmark emoji", "give --model"),
    ],
)
def test_arguments_are_checked_before_anything_slow_is_imported(words, said, capsys, monkeypatch):
    monkeypatch.setattr("clipcap_hf.cli._import_package", lambda: pytest.fail("something slow was imported"))
    assert main(words.split()) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nan", "", "-1", "0mb", "1e30gb", "20", "9" * 30 + "mb", "5 parsecs"])
def test_sizes_that_make_no_sense(size, capsys):
    with pytest.raises(SystemExit):
        main(["serve", f"--max-file-size={size}"])
    assert "argument --max-file-size: must be like 500kb, 20mb or 1gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("seed: null", "`seed` has no value"),
        ("learning_rate: [1]", "`learning_rate` must be a number, but is \\[1"),
        ("learning_rate: true", "`learning_rate` must be a number, but is True"),
        ("epochs: {a: 1}", "`num_train_epochs` must be a number"),
        ("epochs: !!python/object/apply:os.getpid []", "is neither YAML nor JSON"),
    ],
)
def test_recipes_with_values_of_other_types(tmp_path, recipe, message):
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        parse([str(tmp_path / "r.yaml"), "--data", "d", "--out", str(tmp_path)])


def test_what_a_recipe_leaves_out(tmp_path):
    (tmp_path / "r.yaml").write_text("batch_size: null\nsave_total_limit: null\nmax_caption_length: null")
    _, _, args = parse([str(tmp_path / "r.yaml"), "--data", "d", "--out", str(tmp_path)])
    assert args.per_device_train_batch_size == 16 and args.save_total_limit is None


def test_files_whose_names_look_like_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a.png").touch()
    for words in (["caption", "-a.png"], ["caption", "b.png", "-a.png"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "(write ./-a.png for the file)" in capsys.readouterr().err
