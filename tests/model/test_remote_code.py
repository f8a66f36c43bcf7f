"""Checkpoints load without the package, from the code next to their weights."""

import json
import sys
from pathlib import Path

import pytest
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, add_code
from hub_client import WEIGHTS_HASH, WITHOUT_PACKAGE, run_client, weights_hash
from hub_server import TOKEN, HubServer
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files


LOAD = (
    WEIGHTS_HASH
    + """
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
image = Image.open(os.environ["IMAGE"])
for name in os.environ["CAPTIONERS"].split():
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    ids = model.generate(**processor(images=image, return_tensors="pt"))
    captioner = pipeline("image-captioning", model=name, trust_remote_code=True)
    base_model = AutoModel.from_pretrained(name, trust_remote_code=True)
    hidden = base_model(**processor(images=image, return_tensors="pt")).last_hidden_state
    report[name] = {
        "auto": processor.batch_decode(ids, skip_special_tokens=True)[0].strip(),
        "pipeline": captioner(image, num_beams=3, return_scores=True),
        "modules": [type(part).__module__ for part in (model, model.config, processor, captioner)],
        "one namespace": type(model.config) is type(model).config_class
        and type(captioner.model) is type(model)
        and type(captioner.processor) is type(processor),
        "weights": weights_hash(model.state_dict()),
        "base model": [type(base_model).__name__, weights_hash(base_model.state_dict()), list(hidden.shape)],
    }
assert not any(name.partition(".")[0] == "clipcap_hf" for name in sys.modules)
"""
)


@pytest.fixture
def captioners(tmp_path, make_model, processor):
    for vision in ("clip", "vit"):
        captioner = pipeline("image-captioning", model=make_model(vision), processor=processor)
        captioner.save_pretrained(tmp_path / vision, with_code=True)
    return tmp_path


@pytest.fixture
def picture(tmp_path, images):
    images[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_without_the_package(captioners, picture):
    """A transformers CLIP and an open_clip tower, each from a folder and from the test server."""
    with HubServer() as hub:
        push = "from huggingface_hub import upload_folder, create_repo\n" + "".join(
            f"create_repo('tester/{name}')\n"
            f"upload_folder(repo_id='tester/{name}', folder_path={str(captioners / name)!r})\n"
            for name in ("clip", "vit")
        )
        run_client(push, captioners / "push", hub, TOKEN)
        names = [str(captioners / "clip"), str(captioners / "vit"), "tester/clip", "tester/vit"]
        environment = {"CAPTIONERS": " ".join(names), "IMAGE": str(picture)}
        report = run_client(WITHOUT_PACKAGE + LOAD, captioners / "home", hub, **environment)
    for kind, folder in (("clip", names[0]), ("vit", names[1])):
        here = pipeline("image-captioning", model=folder)
        weights = weights_hash(here.model.state_dict())
        image = Image.open(picture)
        expected = here(image, num_beams=3, return_scores=True)
        for name in (folder, f"tester/{kind}"):
            found = report[name]
            (module,) = set(found["modules"])
            assert module.startswith("transformers_modules.") and module.endswith(".captioner")
            assert found["one namespace"]
            assert found["weights"] == weights
            assert found["base model"] == ["ClipCapModel", weights, [1, 4, 32]]
            assert found["auto"] == here(image)[0]["generated_text"]
            assert found["pipeline"][0]["generated_text"] == expected[0]["generated_text"]
            assert found["pipeline"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)


SAVE_AGAIN = """
from transformers import AutoModelForImageTextToText, pipeline
for with_code in (None, True):
    captioner = pipeline("image-captioning", model=os.environ["CAPTIONER"], trust_remote_code=True)
    for again in ("once", "twice"):
        captioner.save_pretrained(f"{again}-{with_code}", with_code=with_code)
        captioner = pipeline("image-captioning", model=f"{again}-{with_code}", trust_remote_code=True)
        assert type(captioner.model.config) is type(captioner.model).config_class
        for file in ("config.json", "processor_config.json"):
            with open(f"{again}-{with_code}/{file}") as opened:
                saved = json.load(opened)
            pipelines = saved.get("custom_pipelines", {}).values()
            named = [*saved["auto_map"].values(), *(info["impl"] for info in pipelines)]
            assert named and all(name.startswith("captioner.") for name in named), named
    report[str(with_code)] = captioner(os.environ["IMAGE"])
    report[f"files {with_code}"] = sorted(name for name in os.listdir(f"twice-{with_code}") if name.endswith(".py"))
AutoModelForImageTextToText.from_pretrained("twice-None", trust_remote_code=True).save_pretrained("model")
report["files of a model"] = sorted(name for name in os.listdir("model") if name.endswith(".py"))
"""


def test_saved_again_without_the_package(captioners, picture):
    environment = {"CAPTIONER": str(captioners / "clip"), "IMAGE": str(picture)}
    report = run_client(WITHOUT_PACKAGE + SAVE_AGAIN, captioners / "home", **environment)
    expected = pipeline("image-captioning", model=str(captioners / "clip"))(str(picture))
    assert report["None"] == report["True"] == expected
    files = sorted(file.name for file in (captioners / "clip").glob("*.py"))
    assert report["files None"] == report["files True"] == report["files of a model"] == files


def test_no_trust_is_needed_with_the_package(captioners, images):
    folder = str(captioners / "clip")
    assert json.loads((captioners / "clip" / "config.json").read_text())["auto_map"]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is ClipCapForConditionalGeneration
    trusting = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(trusting) is ClipCapForConditionalGeneration  # the installed code, not the repository's
    assert pipeline("image-captioning", model=folder)(images[0])[0]["generated_text"]


def test_saved_again_without_code(captioners, tmp_path):
    model = ClipCapForConditionalGeneration.from_pretrained(captioners / "clip")
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config and "custom_pipelines" not in config
    assert not list((tmp_path / "again").glob("*.py"))


def test_code_is_saved_only_when_asked(tmp_path, make_model, processor):
    pipeline("image-captioning", model=make_model(), processor=processor).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config = (tmp_path / "config.json").read_text()
    assert "auto_map" not in config
    files = add_code(tmp_path)
    names = {file.name for file in files}
    assert {"captioner.py", "modeling_clipcap.py", "modeling_open_clip.py", "pipeline_clipcap.py"} <= names
    # All files of the folder travel, and `captioner.py` imports them all.
    assert {Path(file).name for file in get_relative_import_files(tmp_path / "captioner.py")} | {
        "captioner.py"
    } == names
    assert add_code(tmp_path) == files  # repeating it changes nothing


def test_what_the_code_requires(captioners):
    """Import nothing else outside a `try`: transformers would require it of everybody."""
    core = {"huggingface_hub", "numpy", "packaging", "PIL", "safetensors", "torch", "transformers"}
    standard = sys.stdlib_module_names
    for file in (captioners / "clip").glob("*.py"):
        assert set(get_imports(file)) - standard <= core, file.name


def test_add_code_wants_a_captioner(tmp_path, text_config):
    with pytest.raises(ValueError, match="config.json is missing"):
        add_code(tmp_path)
    text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`gpt2`, not of a clipcap captioner"):
        add_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_vision_tower_without_package_is_registered_once(captioners):
    # Loading the remote configuration must not replace the classes of the installed package.
    from clipcap_hf import OpenClipVisionConfig
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = get_class_from_dynamic_module("captioner.ClipCapConfig", str(captioners / "vit"))
    assert remote is not ClipCapConfig
    assert CONFIG_MAPPING["open_clip_vision_model"] is OpenClipVisionConfig


OLD_ENTRIES = """
import glob
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
folder = os.environ["CAPTIONER"]
report["caption"] = pipeline("image-captioning", model=folder, trust_remote_code=True)(os.environ["IMAGE"])
report["config"] = type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__.split(".")[-1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
report["model"] = type(model).__module__.split(".")[-1]
"""


def test_entries_of_earlier_versions_still_load(captioners, picture):
    """Folders saved before `captioner.py` name four modules and hold code without it."""
    folder = captioners / "clip"
    expected = pipeline("image-captioning", model=str(folder))(str(picture))
    modules = {
        "ClipCapConfig": "configuration_clipcap",
        "ClipCapForConditionalGeneration": "modeling_clipcap",
        "ClipCapModel": "modeling_clipcap",
        "ClipCapProcessor": "processing_clipcap",
        "ImageCaptioningPipeline": "pipeline_clipcap",
        "PillowImageProcessor": "image_processing_pillow",
        "ClipCapVideoProcessor": "video_processing_clipcap",
    }
    for file in (folder / "config.json", folder / "processor_config.json"):
        text = file.read_text()
        for name, module in modules.items():
            text = text.replace(f"captioner.{name}", f"{module}.{name}")
        assert "captioner." not in text
        file.write_text(text)
    (folder / "captioner.py").unlink()
    environment = {"CAPTIONER": str(folder), "IMAGE": str(picture)}
    report = run_client(WITHOUT_PACKAGE + OLD_ENTRIES, captioners / "home", **environment)
    assert report == {"caption": expected, "config": "configuration_clipcap", "model": "modeling_clipcap"}
    assert pipeline("image-captioning", model=str(folder))(str(picture)) == expected
