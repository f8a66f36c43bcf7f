"""Numbers that no option takes: each is refused by its own name, before anything is imported."""

import math
import time

import pytest
from clipcap_hf.cli import build_parser, leaves, main
from clipcap_hf.ranges import TRAINING, Range, check_ranges


NUMBERS = [
    (leaf.prog.removeprefix("clipcap "), action.option_strings[0], action.type)
    for leaf in leaves(build_parser())
    for action in leaf._actions
    if action.option_strings and "number" in getattr(action.type, "__name__", "")
]
WRONG = ["nan", "inf", "-inf", "-1", "1e30", str(10**30), "", "five", "0x10", "1" * 5000]
# Values that look wrong and are not.
RIGHT = {
    ("train", "--max-steps", "-1"): "no limit but the epochs",
    ("train", "--local-rank", "-1"): "a single process, for torchrun's scripts",
}


def test_all_options_that_take_numbers_are_here():
    taken = {(command, option) for command, option, _ in NUMBERS}
    for leaf in leaves(build_parser()):
        for action in leaf._actions:
            shows_number = action.metavar in ("N", "X", "W") or action.type in (int, float)
            name = (leaf.prog.removeprefix("clipcap "), (action.option_strings or [""])[0])
            assert not shows_number or name in taken, f"{name} takes a number of any size"
    assert len(taken) > 60
    assert {option for command, option in taken if command == "train"} >= {"--learning-rate", "--seed", "--beams"}


@pytest.mark.parametrize(("command", "option"), [each[:2] for each in NUMBERS])
def test_numbers_that_make_no_sense(command, option, capsys):
    for value in WRONG:
        if (command, option, value) in RIGHT:
            continue
        start = time.process_time()
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), f"{option}={value}"])
        assert ended.value.code == 2 and time.process_time() - start < 1, value
        printed = capsys.readouterr().err
        [line] = [line for line in printed.splitlines() if "error:" in line]
        assert f"argument {option}" in line and "Traceback" not in printed, value
        assert len(line) < 2200, value


def test_numbers_that_make_sense():
    parsers = {leaf.prog.removeprefix("clipcap "): leaf for leaf in leaves(build_parser())}
    for command, option, value in RIGHT:
        assert vars(parsers[command].parse_known_args([option, value])[0])[option[2:].replace("-", "_")] == -1


def test_ranges_of_training_belong_to_its_options(tmp_path):
    from clipcap_hf.training.arguments import CaptioningArguments, DataArguments, ModelArguments

    runs = [ModelArguments(), DataArguments(), CaptioningArguments(output_dir=str(tmp_path), report_to="none")]
    fields = {name for run in runs for name in vars(run)}
    assert fields >= TRAINING.keys()
    for run in runs:
        check_ranges(run)
        for name in vars(run).keys() & TRAINING.keys():
            for value in (math.nan, math.inf, -2, "three"):
                with pytest.raises(ValueError, match=f"`{name}` must be"):
                    check_ranges(type("Run", (), {name: value}))


def test_a_range_says_what_is_allowed():
    assert Range(0, 1, above=True).complaint(0) == "must be above 0 and at most 1, but is 0"
    assert Range(1, also=(-1,), hint="-1 is for all").complaint(0) == (
        "must be at least 1, or -1, but is 0: -1 is for all"
    )
    assert Range(1).complaint(2**31) == "must be at least 1 and at most 2147483647, but is 2147483648"
    assert Range(1).complaint(1) is Range(1, also=(-1,)).complaint(-1) is None
