"""The commands and code of the README work, and the links of all pages lead somewhere."""

import json
import re
import runpy
from pathlib import Path

import clipcap_hf
import pytest
from PIL import Image


README = Path(__file__).parent.parent / "README.md"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_block(code: str):
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


def test_caption_block(tmp_path, monkeypatch, capsys):
    (code,) = [block for block in code_blocks("python") if "PHOTO_MINI" in block]
    monkeypatch.chdir(tmp_path)
    for name in ("photo-1.jpg", "photo-2.jpg"):
        Image.new("RGB", (80, 60), "red").save(name)
    run_block(code)
    assert capsys.readouterr().out.count("generated_text") == 2


@pytest.fixture
def tiny_clip_folder(tmp_path, clip_config, image_processor):
    """Make a repository of a whole CLIP, as in the README."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=clip_config.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    image_processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def tiny_gpt2_folder(tmp_path, text_config, tokenizer):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_training_block(tmp_path, monkeypatch, tiny_clip_folder, tiny_gpt2_folder):
    """Run the block as it stands, except for the names of the two models, which are made here, and the epochs."""
    from transformers import pipeline

    (code,) = [block for block in code_blocks("python") if "Trainer(" in block]
    for name, folder in (
        ("openai/clip-vit-base-patch32", tiny_clip_folder),
        ("openai-community/gpt2", tiny_gpt2_folder),
    ):
        assert name in code
        code = code.replace(name, str(folder))
    code = code.replace("num_train_epochs=10", "num_train_epochs=1, report_to='none'")
    monkeypatch.chdir(tmp_path)
    Path("my-images").mkdir()
    with open("my-images/metadata.jsonl", "w") as metadata:
        for index, colour in enumerate(["red", "green", "blue"]):
            Image.new("RGB", (40, 30), colour).save(f"my-images/{index}.png")
            metadata.write(json.dumps({"file_name": f"{index}.png", "text": f"a {colour} picture"}) + "\n")
    run_block(code)
    captions = pipeline("image-captioning", model="my-captioner")("my-images/0.png")
    assert isinstance(captions[0]["generated_text"], str)


@pytest.mark.parametrize("command", ["pip install . && clipcap demo", "pip install '.[test]' && pytest -n 2"])
def test_two_commands_are_given(command):
    assert any(command in block.splitlines() for block in code_blocks("bash"))


def test_public_names_exist():
    for name in clipcap_hf.__all__:
        assert getattr(clipcap_hf, name) is not None


def test_scores_block():
    (code,) = [block for block in code_blocks("python") if "score_captions" in block]
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert 0 < names["scores"]["rouge_l"] < 1


GUIDES = sorted((README.parent / "examples" / "guides").glob("*.md"))


def test_length_and_order():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert text.split("\n\n")[1].startswith("![")


@pytest.mark.parametrize("command", ["pip install . && clipcap demo", "pip install '.[test]' && pytest -n 2"])
def test_each_set_up_command_has_a_block_of_its_own(command):
    assert f"{command}\n" in code_blocks("bash")


@pytest.mark.parametrize(
    "page", [README, README.parent / "examples" / "README.md", *GUIDES], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, heading = link.partition("#")
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, link


def test_the_api_reference_is_current():
    namespace = runpy.run_path(str(README.parent / "examples" / "guides" / "make_api_reference.py"))
    assert namespace["PAGE"].read_text(encoding="utf-8") == namespace["reference"](), (
        "run `python examples/guides/make_api_reference.py`"
    )
