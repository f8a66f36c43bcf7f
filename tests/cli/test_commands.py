"""`clipcap caption` as a user runs it: real processes on real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clipcap_hf.cli import main
from clipcap_hf.cli.arguments import load_captioner
from clipcap_hf.data import load_emoji
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def drawings():
    return load_emoji("new_design")


def run(*arguments, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "clipcap_hf.cli", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=240, **kwargs,
    )  # fmt: skip


def test_captions_good_images_and_lists_bad_ones(tmp_path, drawings):
    drawing = drawings[3]["image"]
    good = ["a.png", "b.jpg", "c.png", "d.png", "e.jpg", "sub/f.png"]
    (tmp_path / "sub").mkdir()
    drawing.save(tmp_path / "a.png")
    drawing.convert("CMYK").save(tmp_path / "b.jpg", quality=95)
    drawing.convert("P").save(tmp_path / "c.png")
    grey = np.asarray(drawing.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "d.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing.save(tmp_path / "e.jpg", exif=exif)
    drawing.convert("RGBA").save(tmp_path / "sub" / "f.png")
    complete = (tmp_path / "a.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<svg></svg>")
    (tmp_path / "notes.txt").write_text("no image, and not named like one")
    (tmp_path / "no images").mkdir()

    missing, nothing = tmp_path / "missing.png", tmp_path / "*.tiff"
    result = run(
        "caption",
        tmp_path,
        missing,
        tmp_path / "no images",
        nothing,
        "--batch-size",
        4,
        "--workers",
        2,
        "--model",
        "emoji-mini",
    )

    assert result.returncode == 1
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [path for path, _ in lines] == [str(tmp_path / name) for name in good]
    assert all(caption for _, caption in lines)
    assert lines[0][1] == lines[2][1] == lines[5][1], "the file format must not change the caption"
    for bad in ("truncated.png", "empty.png", "page.png", "missing.png", "no images", "*.tiff"):
        assert sum(f"{tmp_path / bad}: " in line for line in result.stderr.splitlines()) == 1, bad
    assert "emoji-mini knows drawings of emoji only" in result.stderr
    assert "notes.txt" not in result.stderr and "Traceback" not in result.stderr


def test_json_prompt_and_several_captions(tmp_path, drawings, capsys):
    path = tmp_path / "näme with spaces.png"
    drawings[3]["image"].save(path)
    assert (
        main(
            [
                "caption",
                str(path),
                "--model",
                "emoji-mini",
                "--json",
                "--captions",
                "3",
                "--beams",
                "4",
                "--prompt",
                "flag of",
            ]
        )
        == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["image"] == str(path)
    assert len(set(record["captions"])) == 3
    assert all(caption.startswith("flag of") for caption in record["captions"])


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--model", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--device", "nonsense"], "no device nonsense"),
        (["--max-new-tokens", "500"], "leaves room for"),
        (["--prompt", "word " * 100], "shorten the prompt"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, drawings, capsys, arguments, complaint):
    path = tmp_path / "a.png"
    drawings[3]["image"].save(path)
    assert main(["caption", str(path), *arguments]) == 1
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert not captured.out


def test_model_of_another_kind_is_refused(tmp_path, drawings, capsys):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "a.png"
    drawings[3]["image"].save(path)
    assert main(["caption", str(path), "--model", str(tmp_path / "gpt2")]) == 1
    assert "gpt2 model, not a ClipCap captioner" in capsys.readouterr().err


def test_batches_and_workers_do_not_change_captions(tmp_path, drawings, capsys):
    for index in range(0, 30, 3):
        drawings[index]["image"].save(tmp_path / f"{index:02}.png")
    outputs = []
    for extra in (["--batch-size", "1"], ["--batch-size", "4", "--workers", "2"], []):
        assert main(["caption", str(tmp_path), "--model", "emoji-mini", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0].splitlines()) == 10


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "demo" in printed and "caption" in printed


def test_convert_official_checkpoint(tmp_path, tokenizer, capsys):
    from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
    from transformers import GPT2Config

    golden = Path(__file__).parents[1] / "golden" / "mlp"
    GPT2Config(**json.loads((golden / "gpt2_config.json").read_text())).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    command = ["convert", "official", str(golden / "state_dict.pt"), "--text", str(tmp_path / "gpt2")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "mlp mapping of 512 dimensions to 10 vectors" in capsys.readouterr().out

    model = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = ClipCapProcessor.from_pretrained(tmp_path / "out")
    data = load_file(golden / "tensors.safetensors")
    inputs = processor(clip_embeds=data["clip_embedding"], return_tensors="pt")
    generated = model.generate(**inputs)[:, model.config.prefix_length :].tolist()
    expected = json.loads((golden / "decode.json").read_text())["greedy"]
    for ids, official in zip(generated, expected):
        assert ids[: len(official)] == official

    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "out"]


def test_dtype(tmp_path, drawings, capsys):
    for number in range(16):
        drawings[50 * number]["image"].save(tmp_path / f"{number:02d}.png")
    captions = {}
    for dtype in ("float32", "bfloat16", "float16"):
        assert main(["caption", str(tmp_path), "--model", "emoji-mini", "--dtype", dtype]) == 0
        captions[dtype] = capsys.readouterr().out.splitlines()
        assert str(load_captioner("emoji-mini", "cpu", dtype)[0].dtype) == f"torch.{dtype}"
    assert str(load_captioner("emoji-mini", "cpu")[0].dtype) == "torch.float32"
    for dtype in ("bfloat16", "float16"):
        same = sum(one == other for one, other in zip(captions[dtype], captions["float32"], strict=True))
        assert same >= 14, captions


def test_folder_with_odd_files(tmp_path, drawings):
    drawings[3]["image"].save(tmp_path / "a.png")
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "line.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for other in ("paper.pdf", "film.mpg"):
        (tmp_path / other).write_bytes(b"no image, and not taken for one")
    strange = os.fsencode(tmp_path / "z") + b"\xff.png"
    with open(strange, "wb") as file:
        drawings[3]["image"].save(file, "png")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "clipcap_hf.cli", "caption", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, env=environment, timeout=240)
    assert result.returncode == 1
    paths = [line.split(b"\t")[0] for line in result.stdout.splitlines()]
    assert paths == [os.fsencode(tmp_path / "a.png"), strange]
    errors = os.fsdecode(result.stderr)  # bytes of names are printed as they are
    assert "line.png: refused, the image is too large or too narrow (20000 x 1 pixels)" in errors
    assert "gone.png: no such file" in errors and "paper.pdf" not in errors and "film.mpg" not in errors
