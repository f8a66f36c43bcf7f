"""Pushing to and loading from a server that speaks the Hub's protocol (`hub_server.py`), with the unmodified clients.

These tests prove that our classes call the clients correctly, that pushes are complete and come back bit for bit in a
new process with an empty cache, and that failures end in clear errors. They do not prove that the real Hub, with its
Xet storage, agrees in every detail: `HF_TOKEN=... HF_HUB_OFFLINE=0 pytest -m hub` does the round trip there.
"""

import hashlib
import json
import os
import uuid

import pytest
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from hub_client import WEIGHTS_HASH, run_client, weights_hash
from hub_server import TOKEN, HubServer, Repository
from transformers import GPT2LMHeadModel


PUSH = (
    WEIGHTS_HASH
    + """
import clipcap_hf, torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from huggingface_hub import HfApi
from transformers import pipeline
folder, repo = os.environ["FOLDER"], os.environ["REPO"]
model = ClipCapForConditionalGeneration.from_pretrained(folder)
processor = ClipCapProcessor.from_pretrained(folder)
model.generation_config.max_new_tokens = 5
report["weights"] = weights_hash(model.state_dict())
report["sharded"] = model.push_to_hub(repo + "-sharded", max_shard_size="40KB", private=True).oid
processor.push_to_hub(repo + "-sharded")
captioner = pipeline("image-captioning", model=model, processor=processor)
report["pipeline"] = captioner.push_to_hub(repo).oid
"""
)

PUSH_MORE = """
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
pictures = [Picture.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
features = Features({"image": Image(), "captions": List(Value("string"))})
data = Dataset.from_dict({"image": pictures, "captions": [["a red one"], ["blue", "sky"]]}, features=features)
data.push_to_hub("tester/data")
embeds = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
features = Features({"clip_embeds": List(Value("float32"), length=16), "captions": List(Value("string"))})
rows = {"clip_embeds": embeds.numpy(), "captions": [["a"], ["b"], ["c"]]}
Dataset.from_dict(rows, features=features).push_to_hub("tester/embeds")

# A second version of the model; the first stays reachable by its commit and by its tag.
HfApi().create_tag(repo, tag="v1")
for parameter in model.mapping_network.parameters():
    torch.nn.init.constant_(parameter, 0.5)
report["second"] = model.push_to_hub(repo).oid
report["second weights"] = weights_hash(model.state_dict())

# A separate language model, and a captioner that leaves it out.
from transformers import AutoModelForCausalLM
donor = AutoModelForCausalLM.from_pretrained(os.environ["DONOR"])
donor.push_to_hub("tester/donor")
processor.tokenizer.push_to_hub("tester/donor")
light = ClipCapForConditionalGeneration.from_vision_text_pretrained(
    None, "tester/donor", clip_embed_dim=16, freeze_language_model=True, save_frozen=False, prefix_length=4
)
light.push_to_hub("tester/light")
report["light"] = weights_hash(light.state_dict())
"""

LOAD = (
    WEIGHTS_HASH
    + """
import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline
repo = os.environ["REPO"]
for name in (repo, repo + "-sharded"):
    revision = os.environ["FIRST"] if name == repo else None
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision)
    report[name] = [weights_hash(model.state_dict()), model.generation_config.max_new_tokens]
captioner = pipeline("image-captioning", model=repo, revision=os.environ["FIRST"])
report["captions"] = captioner(Image.open(os.environ["IMAGE"]), num_beams=2)
"""
)

LOAD_MORE = """
from datasets import load_dataset
report["tag"] = weights_hash(AutoModelForImageTextToText.from_pretrained(repo, revision="v1").state_dict())
report["main"] = weights_hash(AutoModelForImageTextToText.from_pretrained(repo).state_dict())
data = load_dataset("tester/data", split="train")
report["data"] = [[list(row["image"].getpixel((3, 3))), row["captions"]] for row in data]
import torch
embeds = load_dataset("tester/embeds", split="train").with_format("torch")["clip_embeds"][:]
report["embeds"] = bool((embeds == torch.randn(3, 16, generator=torch.Generator().manual_seed(0))).all())
report["light"] = weights_hash(ClipCapForConditionalGeneration.from_pretrained("tester/light").state_dict())
"""


@pytest.fixture
def donor_folder(tmp_path, text_config):
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def picture(tmp_path, images):
    images[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_round_trip(tmp_path, model_folder, donor_folder, picture):
    environment = {"FOLDER": str(model_folder), "REPO": "tester/captioner", "DONOR": str(donor_folder)}
    with HubServer() as hub:
        # The connection breaks in the middle of the first upload; the client resumes it.
        hub.fail("PUT", "/lfs/", "drop", times=1)
        pushed = run_client(PUSH + PUSH_MORE, tmp_path / "push", hub, TOKEN, **environment)
        environment |= {"FIRST": pushed["pipeline"], "IMAGE": str(picture)}
        loaded = run_client(LOAD + LOAD_MORE, tmp_path / "load", hub, TOKEN, **environment)

    here = ClipCapForConditionalGeneration.from_pretrained(model_folder)
    assert pushed["weights"] == weights_hash(here.state_dict())
    # The same bits, the same generation configuration.
    assert loaded["tester/captioner"] == loaded["tester/captioner-sharded"] == [pushed["weights"], 5]
    processor = ClipCapProcessor.from_pretrained(model_folder)
    ids = here.generate(**processor(images=[str(picture)], return_tensors="pt"), num_beams=2, max_new_tokens=5)
    assert loaded["captions"] == [{"generated_text": processor.batch_decode(ids, skip_special_tokens=True)[0].strip()}]
    # Commits and tags stay, the branch moves on.
    assert loaded["tag"] == pushed["weights"] != pushed["second weights"]
    assert loaded["main"] == pushed["second weights"]
    assert loaded["light"] == pushed["light"]
    assert loaded["embeds"]
    red, blue = loaded["data"]
    assert (red, blue) == ([[255, 0, 0], ["a red one"]], [[0, 0, 255], ["blue", "sky"]])

    # The files on the server.
    assert sum(name.endswith(".safetensors") for name in hub.files("tester/captioner-sharded")) > 3
    assert "processor_config.json" in hub.files("tester/captioner-sharded")
    light = json.loads(hub.files("tester/light")["config.json"])["donors"]["language_model"]
    assert light["name"] == "tester/donor" and not light["in_checkpoint"]
    assert light["revision"] == hub.repositories["models", "tester/donor"].refs["main"]
    assert len(hub.files("tester/light")["model.safetensors"]) < len(hub.files("tester/donor")["model.safetensors"])
    # No object was sent twice, except for the interrupted one.
    puts = [count for (method, path), count in hub.requests.items() if method == "PUT"]
    assert sorted(puts)[-2:] == [1, 2]
    assert hub.repositories["models", "tester/captioner-sharded"].private

    for repo in ("tester/captioner", "tester/captioner-sharded", "tester/light"):
        card = hub.files(repo)["README.md"].decode()
        assert "library_name: transformers" in card and "pipeline_tag: image-to-text" in card and repo in card
    card = hub.files("tester/light")["README.md"].decode()
    assert "base_model:\n- tester/donor" in card
    assert "The language model is not part of this repository and is loaded from `tester/donor`" in card


PUSH_IN_SHARDS = """
import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration
model = ClipCapForConditionalGeneration.from_pretrained(os.environ["FOLDER"])
try:
    report["commit"] = model.push_to_hub("tester/captioner", max_shard_size="40KB").oid
except Exception as error:
    report["error"] = str(error)
"""


def test_push_that_broke_off_goes_on(tmp_path, model_folder):
    """A second push, from another process, sends exactly the objects that the first could not."""
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.safetensors")}
    last = hashlib.sha256(shards[max(shards)]).hexdigest()
    with HubServer() as hub:
        hub.fail("PUT", last, 400)  # unlike a 500, the client does not retry it
        broken = run_client(PUSH_IN_SHARDS, tmp_path / "broken", hub, TOKEN, FOLDER=str(model_folder))
        assert f"Error while uploading '{max(shards)}'" in broken["error"]
        assert 0 < len(hub.lfs) < len(shards)
        assert not hub.files("tester/captioner"), "a commit of half a model"
        hub.heal()
        run_client(PUSH_IN_SHARDS, tmp_path / "again", hub, TOKEN, FOLDER=str(model_folder))
        pushed = hub.files("tester/captioner")
    assert {name: data for name, data in pushed.items() if name.endswith(".safetensors")} == shards
    puts = {path: count for (method, path), count in hub.requests.items() if method == "PUT"}
    assert puts.pop(f"/lfs/{last}") == 2
    assert set(puts.values()) == {1} and len(puts) == len(shards) - 1


TRAIN = """
import clipcap_hf
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor, ClipCapTrainer
from transformers import Seq2SeqTrainingArguments
folder = os.environ["FOLDER"]
model = ClipCapForConditionalGeneration.from_pretrained(folder)
processor = ClipCapProcessor.from_pretrained(folder)
trainer = ClipCapTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir="run", max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        push_to_hub=True, hub_strategy="every_save", hub_model_id="tester/trained", hub_always_push=True,
        remove_unused_columns=False, logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    ),
    train_dataset=[{"clip_embeds": [0.1 * i] * 16, "captions": "a red heart"} for i in range(4)],
    data_collator=CaptioningCollator(processor),
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub(license="apache-2.0", language="en", dataset="tester/data")
with open("run/README.md", "a") as card:
    card.write("A line of my own.")
trainer.push_to_hub(commit_message="edited")
"""


def test_trainer_pushes_every_save(tmp_path, model_folder):
    with HubServer() as hub:
        run_client(TRAIN, tmp_path / "train", hub, TOKEN, FOLDER=str(model_folder))
    repository = hub.repositories["models", "tester/trained"]
    assert repository.messages == [
        "initial commit",
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
        "edited",
    ]
    commits = list(repository.commits.values())
    assert all({"README.md", "config.json", "processor_config.json"} <= set(files) for files in commits[1:])
    # (Trainer uploads in the background while training goes on, so an early commit may hold later weights.)
    trained = (tmp_path / "train" / "run" / "model.safetensors").read_bytes()
    assert trained == commits[-1]["model.safetensors"][0] != (model_folder / "model.safetensors").read_bytes()
    card = commits[3]["README.md"][0].decode()
    for line in (
        "license: apache-2.0",
        "language: en",
        "- tester/data",
        "learning_rate: 5e-05",
        "### Framework versions",
    ):
        assert line in card
    assert 'model="tester/trained"' in card
    assert commits[4]["README.md"][0].decode() == card + "A line of my own."


FAIL = """
import time, traceback
import clipcap_hf
from clipcap_hf import ClipCapForConditionalGeneration
from transformers import pipeline
for label, name, kwargs in json.loads(os.environ["CASES"]):
    start = time.monotonic()
    try:
        if kwargs.pop("pipeline", False):
            pipeline("image-captioning", model=name)
        else:
            ClipCapForConditionalGeneration.from_pretrained(name, **kwargs)
        report[label] = None
    except Exception as error:
        report[label] = [type(error).__name__, str(error), time.monotonic() - start]
"""


def test_failures_end_clearly(tmp_path, model_folder, donor_folder):
    environment = {"FOLDER": str(model_folder), "REPO": "tester/captioner", "DONOR": str(donor_folder)}
    environment["CASES"] = json.dumps(
        [
            ["private", "tester/captioner-sharded", {}],
            ["wrong token", "tester/captioner-sharded", {"token": "hf_wrong"}],
            ["no such repository", "tester/nothing", {}],
            ["no such revision", "tester/captioner", {"revision": "v9"}],
            ["another model", "tester/other", {}],
            ["donor gone", "tester/light", {}],
            ["truncated", "tester/truncated", {}],
            ["broken download", "tester/once", {}],
            ["one error", "tester/once", {}],
            ["no processor", "tester/lone", {"pipeline": True}],
        ]
    )
    with HubServer() as hub:
        run_client(PUSH + PUSH_MORE, tmp_path / "push", hub, TOKEN, **environment)
        whole = {path: (data, False) for path, data in hub.files("tester/captioner").items()}
        repositories = hub.repositories
        for name in ("truncated", "once", "lone"):
            files = dict(whole)
            if name == "truncated":
                files["model.safetensors"] = (whole["model.safetensors"][0][:-1000], False)
            if name == "lone":
                files = {path: file for path, file in files.items() if "token" not in path and "processor" not in path}
            repositories["models", f"tester/{name}"] = Repository(private=False)
            repositories["models", f"tester/{name}"].commit("main", files, "files")
        repositories["models", "tester/other"] = repositories.pop(("models", "tester/donor"))
        hub.fail("HEAD", "^/tester/once/resolve/main/config.json", 503, times=1)
        hub.fail("GET", "^/tester/once/resolve/.*/model.safetensors", 503, times=1)
        report = run_client(FAIL, tmp_path / "load", hub, **environment)
    expected = {
        "private": ("OSError", "private repository, make sure to pass a token"),
        "wrong token": ("OSError", "Invalid credentials"),
        "no such repository": ("OSError", "tester/nothing is not a local folder and is not a valid model identifier"),
        "no such revision": ("OSError", "v9 is not a valid git identifier"),
        "another model": ("ValueError", "tester/other is a `gpt2`, not a clipcap captioner"),
        "donor gone": ("OSError", "leaves out its frozen language model, which is tester/donor at revision"),
        "truncated": ("ValueError", "The weights in tester/truncated are incomplete or damaged"),
        "broken download": ("OSError", "503 Service Unavailable"),
        "no processor": ("OSError", "tester/lone has no processor"),
    }
    assert report.pop("one error") is None  # the client retries
    assert set(report) == set(expected)
    for label, (kind, message) in expected.items():
        assert report[label][0] == kind, report[label]
        assert message in report[label][1], report[label]
        assert report[label][2] < 60


@pytest.mark.slow  # the client tries every request six times, with growing pauses
@pytest.mark.parametrize("how", [500, "hang"])
def test_server_that_is_down(tmp_path, model_folder, how):
    """Fail with an error if files do not arrive.

    A silent answer to `/api/models/...` hangs instead: `model_info` of huggingface_hub 2.4 has no timeout.
    """
    with HubServer() as hub:
        files = {path.name: (path.read_bytes(), False) for path in model_folder.iterdir()}
        hub.repositories["models", "tester/captioner"] = Repository(private=False)
        hub.repositories["models", "tester/captioner"].commit("main", files, "files")
        for method in ("HEAD", "GET"):
            hub.fail(method, "/resolve/", how)
        report = run_client(FAIL, tmp_path, hub, CASES=json.dumps([["down", "tester/captioner", {}]]), timeout=500)
    kind, message, seconds = report["down"]
    assert kind == "OSError" and f"couldn't connect to '{hub.endpoint}'" in message
    assert seconds < 480


@pytest.mark.hub
@pytest.mark.skipif(
    not os.environ.get("HF_TOKEN") or os.environ.get("HF_HUB_OFFLINE") != "0",
    reason="needs HF_TOKEN, a token that may write, and HF_HUB_OFFLINE=0 in the environment",
)
def test_round_trip_through_the_real_hub(tmp_path, model_folder, picture):
    """`HF_TOKEN=... HF_HUB_OFFLINE=0 pytest -m hub`: makes two private repositories and deletes them."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint="https://huggingface.co", token=os.environ["HF_TOKEN"])
    repo = f"{api.whoami()['name']}/clipcap-test-{uuid.uuid4().hex[:8]}"
    real = {"HF_ENDPOINT": "https://huggingface.co", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "0", "REPO": repo}
    real |= {"HF_HUB_ETAG_TIMEOUT": "10", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
    try:
        api.create_repo(repo, private=True)
        token = os.environ["HF_TOKEN"]
        pushed = run_client(PUSH, tmp_path / "push", token=token, FOLDER=str(model_folder), **real)
        environment = {**real, "FIRST": pushed["pipeline"], "IMAGE": str(picture)}
        loaded = run_client(LOAD, tmp_path / "load", token=token, **environment)
        assert loaded[repo] == loaded[repo + "-sharded"] == [pushed["weights"], 5]
    finally:
        for name in (repo, repo + "-sharded"):
            api.delete_repo(name, missing_ok=True)
