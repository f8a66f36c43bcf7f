"""The command line: fast help, one-line errors, robust output, and no code from model folders."""

import gc
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import damages
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, __version__
from clipcap_hf.cli import COMMANDS, build_parser, caption, leaves, main
from clipcap_hf.cli.arguments import DATA_FORMATS
from clipcap_hf.data import READERS
from PIL import Image


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments, module="clipcap_hf", **kwargs):
    kwargs.setdefault("env", ENVIRONMENT)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 240, **kwargs}
    return subprocess.run(command, **kwargs)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["--help"], 0, "usage: clipcap "),
        (["--version"], 0, f"clipcap {__version__}"),
        (["embed", "--help"], 0, "usage: clipcap embed"),
        (["train", "--help"], 0, "usage: clipcap train"),
        (["train", "--help-all"], 0, "--torch-compile"),
        (["train", "--data", "d", "--out", "o", "--learnin-rate", "1"], 2, "did you mean --learning-rate?"),
        (["train", "--data", "d"], 2, "usage: clipcap train"),
        (["evaluate", "--model", "m"], 1, "give the images that --model captions"),
        (["caption", "a.png", "--beans", "5"], 2, "usage: clipcap caption"),
        (["convert", "official", "a.pt", "--out", "b", "more"], 2, "usage: clipcap convert official"),
        (["caption", "a.png", "--beams", "100000"], 2, "must be at least 1 and at most 1000"),
        (["completion"], 0, "complete -o default -F _clipcap clipcap"),
    ],
)
def test_help_and_usage_errors_come_at_once(arguments, status, said):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == status
    assert said in (result.stderr if status else result.stdout).decode()
    # Importing torch and transformers takes seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_garbage_is_seldom_looked_for_while_a_command_runs(picture, monkeypatch):
    before, within = gc.get_threshold(), []
    monkeypatch.setattr(caption, "run", lambda arguments: within.append(gc.get_threshold()[0]) or 0)
    assert main(["caption", str(picture)]) == 0
    assert within == [20_000] and gc.get_threshold() == before


def test_the_parser_imports_nothing_slow():
    code = (
        "import sys; sys.argv = ['/usr/bin/clipcap']; from clipcap_hf.cli import build_parser; build_parser(); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_captioning_imports_no_trainer_and_no_data_set(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    code = (
        "import sys; import clipcap_hf; from clipcap_hf.cli import main; before = set(sys.modules); "
        f"main(['caption', {str(tmp_path / 'a.png')!r}]); "
        "print(sorted({'transformers.trainer', 'transformers.training_args', 'datasets', 'evaluate', 'peft'} "
        "& set(sys.modules)), sorted({'open_clip', 'timm'} & before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.stdout.splitlines()[-1] == "[] []", result.stdout + result.stderr


def test_names_are_there_when_the_package_was_imported_by_the_command():
    code = (
        "import sys; sys.argv = ['/usr/bin/clipcap']; import clipcap_hf; "
        "print([name for name in clipcap_hf.__all__ if getattr(clipcap_hf, name, None) is None])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.stdout.strip() == "[]", result.stderr


def test_data_formats_are_those_of_the_readers():
    assert list(DATA_FORMATS) == list(READERS)


def test_completion_in_bash():
    script = run("completion").stdout.decode()
    words = f'{script}\nCOMP_WORDS=(clipcap convert official --nor); COMP_CWORD=3; _clipcap; echo "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=30)
    assert result.stdout.strip() == "--normalize-clip-embeds", result.stderr
    words = f'{script}\nCOMP_WORDS=(clipcap ca); COMP_CWORD=1; _clipcap; echo "${{COMPREPLY[@]}}"'
    assert subprocess.run(["bash", "-c", words], capture_output=True, text=True).stdout.strip() == "caption"


def test_every_command_is_a_leaf_with_a_name():
    commands = {leaf.prog.split()[1] for leaf in leaves(build_parser())}
    assert commands == {module.__name__.rpartition(".")[2] for module in COMMANDS}


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyError("image"), "clipcap: KeyError: 'image' (--debug prints the traceback)"),
        (TypeError("two\nlines"), "clipcap: TypeError: two\\nlines (--debug prints the traceback)"),
        (RecursionError(), "clipcap: RecursionError:  (--debug prints the traceback)"),
        (pickle.UnpicklingError("use weights_only=False"), "clipcap: a file of weights is damaged or holds more than"),
        (MemoryError(), "clipcap: out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. " * 9),
            "clipcap: out of memory on the accelerator: use a smaller",
        ),
        (ValueError("mended by a user"), "clipcap: mended by a user"),
        (OSError("The folder \x1b[2J\x07 is gone"), "clipcap: The folder \\x1b[2J\\x07 is gone"),
        (
            OSError("must be executed:\nPass trust_remote_code=True."),
            "clipcap: the model's folder or repository brings",
        ),
        (ValueError("x" * 400_000), f"clipcap: {'x' * 1000} [...] {'x' * 1000}"),
    ],
)
def test_any_error_is_one_line(monkeypatch, capsys, error, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(caption, "run", fail)
    assert main(["caption", "a.png"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said) and "weights_only" not in line and len(line) < 2100
    for arguments in (["--debug", "caption", "a.png"], ["caption", "a.png", "--debug"]):
        with pytest.raises(type(error)):
            main(arguments)


def test_names_and_prompts_with_line_breaks_stay_on_their_line(tmp_path, picture):
    strange = tmp_path / "two\tcolumns\nand lines\u2028.png"
    picture.rename(strange)
    result = run("caption", "--model", "emoji-mini", strange, tmp_path / "gone\n.png", "--prompt", "a\nb\tc")
    (line,) = result.stdout.decode().splitlines()
    path, text = line.split("\t")
    assert path == str(strange).replace("\t", "\\t").replace("\n", "\\n").replace("\u2028", "\\u2028")
    assert text.startswith("a\\nb\\tc")
    assert "gone\\n.png: no such file" in result.stderr.decode()


def test_json_is_utf8_and_gives_every_name_back(tmp_path, picture):
    names = [os.fsencode(tmp_path) + b"/" + name for name in (b"\xff\xe9.png", "é\u2028.png".encode())]
    for name in names:
        with open(name, "wb") as file:
            file.write(picture.read_bytes())
    result = run("caption", "--model", "emoji-mini", *map(os.fsdecode, names), "--json")
    lines = result.stdout.decode("utf-8").splitlines()
    assert [os.fsencode(json.loads(line)["image"]) for line in lines] == names


def test_a_terminal_without_utf8_stops_nothing(tmp_path, picture):
    name = tmp_path / "日本.png"
    picture.rename(name)
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "z.png")
    ascii_only = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = run("caption", "--model", "emoji-mini", tmp_path, env=ascii_only)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.decode("ascii").splitlines()
    assert "z.png\t" in first and "\\u65e5\\u672c.png\t" in second or "\\u65e5\\u672c.png\t" in first


@pytest.mark.parametrize("redirection, said", [(">&-", "standard output is closed"), ("> /dev/full", "No space left")])
def test_output_that_cannot_be_written_is_an_error(picture, redirection, said):
    command = f'"{sys.executable}" -m clipcap_hf caption --model emoji-mini "{picture}" {redirection}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def trap(tmp_path, model_folder):
    """Make a model folder whose parts all name their own code, which writes a file if it is run."""
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Thing: pass\n")
    auto = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor"), "code.Thing"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "never_heard_of", "auto_map": auto}))
    tokenizer = {"tokenizer_class": "NeverHeardOf", "auto_map": {"AutoTokenizer": ["code.Thing", "code.Thing"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"image_processor_type": "NeverHeardOf", "auto_map": auto}))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "caption {picture} --model {trap}",
        "caption {picture} --model {mixed}",
        "caption {picture} --model {light}",
        "caption {picture} --model {nested}",
        "caption {picture} --model emoji-mini --text-tower {trap}",
        "serve --model {trap}",
        "embed emoji --vision {trap} --out {out}",
        "embed emoji --model {trap} --out {out}",
        "train --data emoji --model {trap} --output_dir {out} --use_cpu",
        "train --data emoji --vision {trap} --text {good}/gpt2 --output_dir {out} --use_cpu",
        "train --data emoji --vision {good}/clip --text {trap} --output_dir {out} --use_cpu",
        "export onnx {trap} --out {out}",
        "convert official {golden} --text {trap} --out {out}",
        "convert official {golden} --vision {trap} --text {good}/gpt2 --out {out}",
        "evaluate --benchmark emoji --tokenizer python --model {trap} --out {out}",
        "evaluate --benchmark emoji --tokenizer python --results {out} --metrics clip_score --clip-model {trap}",
    ],
)
def test_no_command_runs_code_of_a_model_folder(
    tmp_path, picture, trap, model_folder, clip_config, image_processor, text_config, tokenizer, command
):
    from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path / "clip")
    image_processor.save_pretrained(tmp_path / "clip")
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    light, nested = _light(tmp_path, trap), _nested(tmp_path, trap, model_folder)
    # A captioner as we save it, but for a processor that names code.
    for name in ("processor_config.json", "tokenizer_config.json", "code.py"):
        (model_folder / name).write_text((trap / name).read_text())
    words = command.format(
        picture=picture,
        trap=trap,
        mixed=model_folder,
        light=light,
        nested=nested,
        good=tmp_path,
        out=tmp_path / "out",
        golden=Path(__file__).parents[1] / "golden" / "mlp" / "state_dict.pt",
    ).split()
    if words[0] == "train" and "--model" in words:  # as torchrun starts it; others are forked, which is faster
        result = run(*words[1:], module="clipcap_hf.cli.train", input="y\n" * 20, text=True)
        status, said = result.returncode, result.stdout + result.stderr
    else:
        outcome = damages.run(words, tmp_path, typed="y\n" * 20)
        status, said = outcome.status, outcome.out + outcome.err
    assert not (tmp_path / "ran").exists()
    assert status == 1, said
    assert "Traceback" not in said
    assert "[y/N]" not in said, "nothing is asked"


def _light(tmp_path, trap) -> Path:
    """Save a captioner without its frozen language model, which its configuration seeks in the trap."""
    parts = str(tmp_path / "clip"), str(tmp_path / "gpt2")
    frozen = {"prefix_length": 2, "freeze_language_model": True, "save_frozen": False}
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(*parts, **frozen)
    model.save_pretrained(tmp_path / "light")
    ClipCapProcessor.from_vision_text_pretrained(*parts, prefix_length=2).save_pretrained(tmp_path / "light")
    _change(
        tmp_path / "light" / "config.json", lambda config: config["donors"]["language_model"].update(name=str(trap))
    )
    return tmp_path / "light"


def _nested(tmp_path, trap, model_folder) -> Path:
    """Copy a captioner, and let the configuration of its language model name code."""
    shutil.copytree(model_folder, tmp_path / "nested")
    shutil.copy(trap / "code.py", tmp_path / "nested")
    auto = {"model_type": "never_heard_of", "auto_map": {"AutoConfig": "code.Thing"}}
    _change(tmp_path / "nested" / "config.json", lambda config: config["text_config"].update(auto))
    return tmp_path / "nested"


def _change(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_code_beside_what_the_package_knows_is_not_run(tmp_path, picture, trap, model_folder):
    auto = json.loads((trap / "config.json").read_text())["auto_map"]

    def name_code(content: dict):
        content["auto_map"] = auto
        for part in content.values():
            if isinstance(part, dict) and part is not auto:
                part["auto_map"] = auto

    for name in ("config.json", "processor_config.json"):
        _change(model_folder / name, name_code)
    _change(
        model_folder / "tokenizer_config.json",
        lambda content: content.update(auto_map={"AutoTokenizer": ["code.Thing", "code.Thing"]}),
    )
    _change(model_folder / "generation_config.json", lambda content: content.update(custom_generate=str(model_folder)))
    (model_folder / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py"):
        shutil.copy(trap / "code.py", model_folder / name)
    result = run("caption", picture, "--model", model_folder, input=b"y\n" * 20)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "ran").exists()
