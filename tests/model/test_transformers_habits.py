"""Behaviour that trainers, wrappers and users of transformers rely on."""

import inspect
import os
import subprocess
import sys

import clipcap_hf
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration
from tiny_inputs import pixels, prompt_ids
from transformers import PreTrainedModel


def test_public_classes():
    assert issubclass(ClipCapForConditionalGeneration, clipcap_hf.ClipCapPreTrainedModel)
    assert issubclass(clipcap_hf.ClipCapPreTrainedModel, PreTrainedModel)
    assert {"ClipCapPreTrainedModel", "ClipCapCausalLMOutputWithPast"} <= set(clipcap_hf.__all__)


def test_output_class(make_model):
    model = make_model(None)
    outputs = model(input_ids=prompt_ids(model, 5), clip_embeds=torch.randn(1, 16))
    assert type(outputs) is clipcap_hf.ClipCapCausalLMOutputWithPast


def test_keyword_arguments_are_typed():
    parameters = inspect.signature(ClipCapForConditionalGeneration.forward).parameters
    assert "TransformersKwargs" in str(parameters["kwargs"].annotation)


# -- attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_mapping_network(
    model_folder_of_transformer, implementation, monkeypatch
):
    from clipcap_hf.model import modeling_mapping

    calls = []
    eager = modeling_mapping.eager_attention_forward
    monkeypatch.setattr(
        modeling_mapping, "eager_attention_forward", lambda *args, **kw: calls.append(1) or eager(*args, **kw)
    )
    model = ClipCapForConditionalGeneration.from_pretrained(
        model_folder_of_transformer, attn_implementation=implementation
    )
    model(input_ids=prompt_ids(model, 5), pixel_values=pixels(model, 1))
    assert len(calls) == (2 if implementation == "eager" else 0)  # a call for each layer
    model.set_attn_implementation("eager")
    model(input_ids=prompt_ids(model, 5), pixel_values=pixels(model, 1))
    assert len(calls) == (4 if implementation == "eager" else 2)


@torch.no_grad()
def test_attention_implementations_agree(model_folder_of_transformer):
    images = torch.randn(3, 3, 32, 32)
    prefixes = [
        ClipCapForConditionalGeneration.from_pretrained(model_folder_of_transformer, attn_implementation=name)
        .get_image_features(images)
        .pooler_output
        for name in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*prefixes)


@pytest.fixture
def model_folder_of_transformer(tmp_path, make_model):
    make_model(mapping_type="transformer").save_pretrained(tmp_path)
    return tmp_path


# -- sharding


@pytest.mark.parametrize("mapping_type", ["mlp", "transformer", "linear"])
@pytest.mark.parametrize("vision", ["clip", "vit", None])
def test_classes_not_to_split_are_in_the_model(make_model, vision, mapping_type):
    from accelerate import FullyShardedDataParallelPlugin

    model = make_model(vision, mapping_type=mapping_type)
    here = {type(module).__name__ for module in model.modules()}
    assert "GPT2Block" in model._no_split_modules and model._no_split_modules <= here
    assert ("ClipCapMappingLayer" in model._no_split_modules) == (mapping_type == "transformer")
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)  # looks every class up
    assert plugin.auto_wrap_policy is not None


TRAIN = """
import os, sys
import torch, torch.distributed as dist
from clipcap_hf import ClipCapForConditionalGeneration
from torch.distributed.fsdp import fully_shard

folder, sharded, file = sys.argv[1], sys.argv[2] == "sharded", sys.argv[3]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if sharded:
    dist.init_process_group("gloo")
model = ClipCapForConditionalGeneration.from_pretrained(folder, freeze_vision=False).train()
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
if sharded:
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
losses = []
for step in range(10):
    ids = torch.randint(1, 200, (4, 10), generator=generator)
    ids[:, :4] = model.config.image_token_id
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss = model(input_ids=ids[mine], pixel_values=pixels[mine], labels=ids[mine]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if sharded:
        dist.all_reduce(loss)
    losses.append(loss.item() / world)
if rank == 0:
    open(file, "w").write(" ".join(map(repr, losses)))
if sharded:
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive Python and abort it
"""


@pytest.mark.parametrize("mapping_type", [pytest.param("mlp", marks=pytest.mark.slow), "transformer"])
def test_fsdp2_on_two_ranks_trains_as_one_process(tmp_path, make_model, mapping_type):
    make_model(mapping_type=mapping_type).save_pretrained(tmp_path / "captioner")
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    losses = {}
    for name, launcher in (("alone", []), ("sharded", torchrun)):
        command = [sys.executable, *launcher, script, tmp_path / "captioner", name, tmp_path / name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        losses[name] = torch.tensor([float(loss) for loss in (tmp_path / name).read_text().split()])
    assert len(losses["alone"]) == 10 and losses["alone"][-1] != losses["alone"][0]
    torch.testing.assert_close(losses["sharded"], losses["alone"], atol=1e-5, rtol=0)
