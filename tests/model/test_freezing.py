"""Which parts are trained, and gradients."""

import copy

import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration
from tiny_inputs import pixels, prompt_ids
from transformers import (
    Trainer,
    TrainingArguments,
)


def train_one_step(model, tmp_path, **kwargs):
    input_ids = prompt_ids(model, 7, 8, 0)[0]
    row = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == model.config.image_token_id, -100)}
    image = {"clip_embeds": torch.randn(16)} if model.vision_tower is None else {"pixel_values": pixels(model, 1)[0]}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **kwargs,
    )
    trainer = Trainer(model=model, args=args, train_dataset=[{**row, **image}] * 4)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("freeze_vision", "freeze_language_model"), [(True, False), (True, True), (False, False), (False, True)]
)
@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_frozen_parts_have_no_gradient_and_no_optimizer_state(
    tmp_path, make_model, vision, freeze_vision, freeze_language_model
):
    model = make_model(vision, freeze_vision=freeze_vision, freeze_language_model=freeze_language_model)
    before = copy.deepcopy(model.state_dict())
    trainer = train_one_step(model, tmp_path)

    frozen = {"vision_tower": freeze_vision, "language_model": freeze_language_model, "mapping_network": False}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_groups = {names[id(p)].split(".")[0] for group in trainer.optimizer.param_groups for p in group["params"]}
    in_state = {names[id(parameter)].split(".")[0] for parameter in trainer.optimizer.state}
    trained = {part for part, is_frozen in frozen.items() if not is_frozen}
    assert in_groups == in_state == trained
    for part, is_frozen in frozen.items():
        same = [
            torch.equal(before[name], value) for name, value in model.state_dict().items() if name.startswith(part)
        ]
        assert all(same) if is_frozen else not all(same), part
        if is_frozen:
            assert all(parameter.grad is None for parameter in getattr(model, part).parameters())


def test_batch_norm_of_a_frozen_tower_does_not_drift(make_model):
    model = make_model("resnet").train()
    before = copy.deepcopy(dict(model.vision_tower.named_buffers()))
    assert any("running_mean" in name for name in before)
    model.get_clip_embeds(pixels(model))
    assert all(torch.equal(before[name], value) for name, value in model.vision_tower.named_buffers())
    thawed = make_model("resnet", freeze_vision=False).train()
    thawed.get_clip_embeds(pixels(thawed))
    assert not all(torch.equal(before[name], value) for name, value in thawed.vision_tower.named_buffers())


def test_modes(make_model):
    model = make_model().train()
    assert model.language_model.training and model.mapping_network.training and not model.vision_tower.training
    assert make_model(freeze_vision=False).train().vision_tower.training
    assert not model.eval().language_model.training


@pytest.mark.parametrize(
    "text_config",
    [
        {
            "model_type": "gpt2",
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        {
            "model_type": "opt",
            "vocab_size": 99,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "dropout": 0.3,
            "layerdrop": 0.5,
        },
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_dropout": 0.3,
            "hidden_dropout": 0.3,
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_frozen_language_model_works_without_dropout(text_config):
    config = ClipCapConfig(text_config=text_config, clip_embed_dim=16, freeze_language_model=True)
    model = ClipCapForConditionalGeneration(config)
    batch = {"input_ids": prompt_ids(model, 7, 8, 9), "clip_embeds": torch.randn(1, 16)}
    expected = model.eval()(**batch).logits
    model.train()
    assert all(torch.equal(model(**batch).logits, expected) for _ in range(5))

    thawed = ClipCapForConditionalGeneration(ClipCapConfig(text_config=text_config, clip_embed_dim=16)).train()
    assert not torch.equal(thawed(**batch).logits, thawed(**batch).logits)
    # The saved language model is the original.
    assert config.text_config.to_dict() == thawed.config.text_config.to_dict()


@pytest.mark.parametrize("freeze_language_model", [True, False])
def test_gradient_checkpointing_is_active(make_model, freeze_language_model):
    embeds = torch.randn(2, 16)

    def step(checkpointing):
        model = make_model(None, mapping_type="transformer", freeze_language_model=freeze_language_model).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = {"language_model": 0, "mapping_network": 0}
        for part, block in (
            ("language_model", model.language_model.transformer.h[0].ln_1),
            ("mapping_network", model.mapping_network.layers[0].layer_norm1),
        ):
            block.register_forward_hook(lambda *_, part=part: calls.__setitem__(part, calls[part] + 1))
        labels = torch.cat([torch.full((2, 4), -100), torch.tensor([[7, 8], [9, 0]])], dim=1)
        input_ids = labels.masked_fill(labels == -100, model.config.image_token_id)
        model(input_ids=input_ids, clip_embeds=embeds, labels=labels).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return calls, gradients

    calls, gradients = step(checkpointing=False)
    assert calls == {"language_model": 1, "mapping_network": 1}
    calls, checkpointed = step(checkpointing=True)
    assert calls == {"language_model": 2, "mapping_network": 2}  # once more in the backward pass
    assert gradients.keys() == checkpointed.keys()
    assert all(name.startswith("mapping_network") for name in gradients) == freeze_language_model
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_gradient_checkpointing_through_trainer(tmp_path, make_model):
    model = make_model(None, mapping_type="transformer", freeze_language_model=True)
    before = copy.deepcopy(model.mapping_network.state_dict())
    train_one_step(model, tmp_path, gradient_checkpointing=True)
    assert not all(torch.equal(before[name], value) for name, value in model.mapping_network.state_dict().items())


def test_freezing_survives_a_reload(tmp_path, make_model):
    make_model(freeze_language_model=True).save_pretrained(tmp_path)
    model = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"mapping_network"}
    thawed = ClipCapForConditionalGeneration.from_pretrained(
        tmp_path, freeze_language_model=False, freeze_vision=False
    )
    assert all(parameter.requires_grad for parameter in thawed.parameters())
