import copy
import json
import shutil

import pytest
import torch
import transformers
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor, OpenClipVisionModel
from packaging import version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)


MAPPINGS = ["mlp", "transformer", "linear"]
TOWERS = ["clip", "vit", "resnet", "timm"]


def pixels(model, batch=2):
    size = model.config.vision_config.image_size
    return torch.randn(batch, 3, size, size)


def prompt_ids(model, *rest):
    """`input_ids` of one row: the placeholders and then these tokens."""
    return torch.tensor([[model.config.image_token_id] * model.config.prefix_length + list(rest)])


def left_padded(model, *rows):
    rows = [prompt_ids(model, *row)[0] for row in rows]
    length = max(map(len, rows))
    input_ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask}


def aligned(model):
    """The same model; weights lie at odd addresses after loading, which changes the last bit of some products."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def assert_same_weights(model, other):
    state, other = model.state_dict(), other.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


# -- the forward pass


@pytest.mark.parametrize("mapping_type", MAPPINGS)
def test_prefix_takes_the_place_of_the_placeholders(make_model, mapping_type):
    model = make_model(mapping_type=mapping_type)
    embeds = torch.randn(2, 16)
    prefix = model.get_image_features(clip_embeds=embeds).pooler_output
    assert prefix.shape == (2, 4, 32)
    assert not torch.allclose(prefix[0], prefix[1])

    input_ids = prompt_ids(model, 7, 8, 9).repeat(2, 1)
    outputs = model(input_ids=input_ids, clip_embeds=embeds)
    words = model.get_input_embeddings()(input_ids[:, 4:])
    expected = model.language_model(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.image_hidden_states, prefix)


def test_mlp_mapping_is_that_of_the_paper(make_model):
    model = make_model(None)
    network = model.mapping_network
    assert network.fc1.weight.shape == (4 * 32 // 2, 16) and network.fc2.weight.shape == (4 * 32, 4 * 32 // 2)
    embeds = torch.randn(3, 16)
    hidden = torch.tanh(embeds @ network.fc1.weight.T + network.fc1.bias)
    expected = (hidden @ network.fc2.weight.T + network.fc2.bias).view(3, 4, 32)
    torch.testing.assert_close(model.get_image_features(clip_embeds=embeds).pooler_output, expected)


def test_transformer_mapping_is_that_of_the_paper(make_model):
    model = make_model(None, mapping_type="transformer", clip_length=3)
    network = model.mapping_network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    embeds = torch.randn(2, 16)
    tokens = (embeds @ network.clip_projection.weight.T + network.clip_projection.bias).view(2, 3, 32)
    hidden = torch.cat([tokens, network.prefix_const.expand(2, 4, 32)], dim=1)
    for layer in network.layers:
        normed, attention = layer.layer_norm1(hidden), layer.self_attn
        # 4 heads of 8 dimensions; every token sees every other.
        query, key, value = (
            (normed @ projection.weight.T).view(2, 7, 4, 8)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 7, 32)
        hidden = hidden + attention.out_proj(attended)
        hidden = hidden + layer.fc2(layer.fc1(layer.layer_norm2(hidden)).clamp(min=0))
    # The prefix is what became of the learned constants, which come last.
    torch.testing.assert_close(model.get_image_features(clip_embeds=embeds).pooler_output, hidden[:, 3:])


def test_transformer_mapping_has_its_own_clip_length(make_model):
    model = make_model(None, mapping_type="transformer", clip_length=3)
    assert model.mapping_network.clip_projection.weight.shape == (3 * 32, 16)
    assert model.mapping_network.prefix_const.shape == (4, 32)
    assert model.get_image_features(clip_embeds=torch.randn(2, 16)).pooler_output.shape == (2, 4, 32)


def test_mapping_network_starts_from_the_defaults_of_torch(make_model):
    model = make_model(None, mapping_type="transformer", mapping_mlp_ratio=4.0)
    for layer in (model.mapping_network.clip_projection, model.mapping_network.layers[0].fc2):
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        assert layer.weight.abs().max() > 0.9 * bound and layer.bias.std() > 0
    assert 0.7 < model.mapping_network.prefix_const.std() < 1.3
    assert (model.mapping_network.layers[0].layer_norm1.weight == 1).all()


def test_clip_tower_gives_the_projected_embedding(tmp_path, make_model):
    model = make_model("clip")
    model.vision_tower.save_pretrained(tmp_path)
    reference = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    images = pixels(model)
    embeds = model.get_clip_embeds(images)
    assert embeds.shape == (2, 16)
    torch.testing.assert_close(embeds, reference(pixel_values=images).image_embeds)


@pytest.mark.parametrize("vision", TOWERS)
def test_pixels_and_embeddings_give_the_same_prefix(make_model, vision):
    model = make_model(vision)
    images = pixels(model)
    from_pixels = model.get_image_features(pixel_values=images).pooler_output
    from_embeds = model.get_image_features(clip_embeds=model.get_clip_embeds(images)).pooler_output
    assert torch.equal(from_pixels, from_embeds)
    if vision != "clip":
        assert torch.equal(model.get_clip_embeds(images), model.vision_tower.visual(images))


def test_siglip_tower_gives_its_pooled_output(make_model, text_config):
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    model = ClipCapForConditionalGeneration(ClipCapConfig(vision_config=vision, text_config=text_config)).eval()
    images = pixels(model)
    embeds = model.get_clip_embeds(images)
    assert torch.equal(embeds, model.vision_tower(pixel_values=images).pooler_output)
    assert model.get_image_features(images).pooler_output.shape == (2, 10, 32)


def test_normalize_clip_embeds(make_model):
    embeds = torch.randn(2, 16)
    plain, normal = make_model(None), make_model(None, normalize_clip_embeds=True)
    normal.load_state_dict(plain.state_dict())
    prefixes = [model.get_image_features(clip_embeds=embeds).pooler_output for model in (plain, normal)]
    assert not torch.allclose(*prefixes)
    unit = embeds / embeds.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(prefixes[1], plain.get_image_features(clip_embeds=unit).pooler_output)
    torch.testing.assert_close(prefixes[1], normal.get_image_features(clip_embeds=3 * embeds).pooler_output)


def test_output_names(make_model):
    model = make_model()
    images = pixels(model)
    outputs = model(
        input_ids=prompt_ids(model, 5).repeat(2, 1),
        pixel_values=images,
        output_hidden_states=True,
        output_attentions=False,
    )
    assert outputs.loss is None and outputs.past_key_values is not None
    assert len(outputs.hidden_states) == 3
    as_tuple = model(input_ids=prompt_ids(model, 5).repeat(2, 1), pixel_values=images, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.logits)


def test_loss_is_the_cross_entropy_of_the_labelled_tokens(make_model):
    model = make_model()
    caption = torch.tensor([[7, 8, 9, 0], [3, 0, 0, 0]])
    labels = torch.tensor([[7, 8, 9, 0], [3, 0, -100, -100]])
    input_ids = torch.cat([prompt_ids(model).repeat(2, 1), caption], dim=1)
    labels = torch.cat([torch.full((2, 4), -100), labels], dim=1)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "pixel_values": pixels(model)}
    outputs = model(**batch, labels=labels)

    logprobs = model(**batch).logits.log_softmax(-1)
    # The logits one place to the left of a token predict it; the last of the prefix predicts the first of the caption.
    taken = [logprobs[0, 3 + i, token] for i, token in enumerate([7, 8, 9, 0])]
    taken += [logprobs[1, 3 + i, token] for i, token in enumerate([3, 0])]
    torch.testing.assert_close(outputs.loss, -torch.stack(taken).mean())
    torch.testing.assert_close(
        model(**batch, labels=labels, num_items_in_batch=torch.tensor(12)).loss, -torch.stack(taken).sum() / 12
    )


def test_logits_to_keep_changes_no_loss(make_model):
    model = make_model()
    input_ids = prompt_ids(model, 7, 8, 9).repeat(2, 1)
    labels = input_ids.masked_fill(input_ids == model.config.image_token_id, -100)
    batch = {"input_ids": input_ids, "pixel_values": pixels(model), "labels": labels}
    full = model(**batch)
    kept = model(**batch, logits_to_keep=4)
    assert kept.logits.shape[1] == 4
    torch.testing.assert_close(kept.loss, full.loss)
    torch.testing.assert_close(kept.logits, full.logits[:, -4:])
    chosen = model(**batch, logits_to_keep=torch.tensor([3, 4, 5, 6]))
    torch.testing.assert_close(chosen.loss, full.loss)


def test_padding_on_either_side_changes_nothing(make_model):
    model = make_model()
    images = pixels(model)
    alone = [
        model(input_ids=prompt_ids(model, *row), pixel_values=images[i : i + 1]).logits
        for i, row in enumerate([(5, 6, 7), (8,)])
    ]
    batch = left_padded(model, (5, 6, 7), (8,))
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as generate() makes them
    left = model(**batch, position_ids=position_ids, pixel_values=images).logits
    torch.testing.assert_close(left[0], alone[0][0])
    torch.testing.assert_close(left[1, 2:], alone[1][0])
    right_ids = torch.cat([prompt_ids(model, 5, 6, 7), F.pad(prompt_ids(model, 8), (0, 2))])
    right_mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    right = model(input_ids=right_ids, attention_mask=right_mask, pixel_values=images).logits
    torch.testing.assert_close(right[1, :5], alone[1][0])


def test_cached_decoding_equals_the_full_pass(make_model):
    model = make_model()
    images, input_ids = pixels(model, 1), prompt_ids(model, 5, 6, 7)
    full = model(input_ids=input_ids, pixel_values=images).logits
    first = model(input_ids=input_ids[:, :5], pixel_values=images, use_cache=True)
    rest = model(input_ids=input_ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), full)


# -- freezing and gradients


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
    # What is saved is the language model as it was.
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


# -- generate()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_generate_from_pixels_equals_generate_from_embeddings(make_model, settings):
    model = make_model()
    images = pixels(model)
    captions = []
    for kwargs in ({"pixel_values": images}, {"clip_embeds": model.get_clip_embeds(images)}):
        torch.manual_seed(3)
        captions.append(model.generate(**kwargs, **settings))
    assert torch.equal(*captions)
    assert len(captions[0]) == 2 * settings.get("num_return_sequences", 1)
    assert (captions[0][:, :4] == model.config.image_token_id).all()
    assert (captions[0][:, 4:] < model.config.text_config.vocab_size).all()
    assert captions[0].shape[1] <= 4 + 8
    assert not torch.equal(captions[0][0], captions[0][-1])


def test_greedy_takes_the_likeliest_token(make_model):
    model = make_model()
    images = pixels(model, 1)
    input_ids = prompt_ids(model)
    for _ in range(8):
        token = model(input_ids=input_ids, pixel_values=images).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    assert torch.equal(model.generate(pixel_values=images, eos_token_id=None), input_ids)


def test_ways_of_decoding_that_must_not_change_greedy(make_model):
    model = make_model()
    images = pixels(model)
    expected = model.generate(pixel_values=images)
    for settings in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(pixel_values=images, **settings), expected), settings


@pytest.mark.parametrize("source", ["pixel_values", "clip_embeds"])
def test_chunked_prefill_keeps_the_image_or_says_so(make_model, source):
    model = make_model()
    images = pixels(model)
    if source == "clip_embeds":
        images = model.get_clip_embeds(images)
    if version.parse(transformers.__version__) < version.parse("5.23.0"):
        with pytest.raises(ValueError, match="`prefill_chunk_size` needs transformers 5.23"):
            model.generate(**{source: images}, prefill_chunk_size=3)
    else:
        expected = model.generate(**{source: images})
        assert torch.equal(model.generate(**{source: images}, prefill_chunk_size=3), expected)
        assert not torch.equal(expected[0], expected[1])


def test_beam_search_finds_likelier_captions(make_model):
    model = make_model()
    images = pixels(model, 4)

    def mean_logprobs(sequences):
        logprobs = model(input_ids=sequences, pixel_values=images).logits[:, 3:-1].log_softmax(-1)
        return logprobs.gather(-1, sequences[:, 4:, None]).squeeze(-1).mean(-1)

    settings = {"pixel_values": images, "eos_token_id": None, "max_new_tokens": 5}
    beams = mean_logprobs(model.generate(**settings, num_beams=8))
    greedy = mean_logprobs(model.generate(**settings))
    assert (beams >= greedy - 1e-5).all() and (beams > greedy + 1e-3).any()
    several = model.generate(**settings, num_beams=4, num_return_sequences=3)
    assert len(several) == 12
    assert all(len({tuple(row) for row in several[i : i + 3].tolist()}) == 3 for i in range(0, 12, 3))


def test_sampling_follows_the_seed(make_model):
    model = make_model()
    images = pixels(model)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(pixel_values=images, do_sample=True, num_return_sequences=4, eos_token_id=None)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert len({tuple(row) for row in sample(1)[:4].tolist()}) > 1


def test_prompt_is_continued(make_model):
    model = make_model()
    images = pixels(model, 1)
    free = model.generate(pixel_values=images, eos_token_id=None)
    forced = model.generate(prompt_ids(model, 11, 12), pixel_values=images, eos_token_id=None)
    assert forced[0, 4:6].tolist() == [11, 12] and forced.shape[1] == 4 + 2 + 8
    # To continue the model's own words is to arrive where it would have.
    continued = model.generate(free[:, :7], pixel_values=images, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(continued, free)


@pytest.mark.parametrize("source", ["pixel_values", "clip_embeds"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_of_unequal_prompts_equals_one_by_one(make_model, source, num_beams):
    model = make_model()
    images = pixels(model, 3)
    if source == "clip_embeds":
        images = model.get_clip_embeds(images)
    prompts = [(5, 6, 7, 8), (), (9,)]
    settings = {"num_beams": num_beams, "eos_token_id": None}
    together = model.generate(**left_padded(model, *prompts), **{source: images}, **settings)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt_ids(model, *prompt), **{source: images[i : i + 1]}, **settings)
        assert torch.equal(together[i, 4 - len(prompt) :], alone[0])


def test_rows_end_at_the_end_token(make_model):
    model = make_model()
    images = pixels(model, 4)
    free = model.generate(pixel_values=images, eos_token_id=None)
    end = int(free[0, 6])
    stopped = model.generate(pixel_values=images, eos_token_id=end, pad_token_id=1)
    place = free[0].tolist().index(end)
    assert torch.equal(stopped[0, : place + 1], free[0, : place + 1])
    assert (stopped[0, place + 1 :] == 1).all()


def test_labels_of_a_training_batch_are_ignored(make_model):
    model = make_model()
    images = pixels(model)
    expected = model.generate(pixel_values=images)
    assert torch.equal(model.generate(pixel_values=images, labels=torch.zeros(2, 9, dtype=torch.long)), expected)


def test_assisted_decoding_changes_nothing(make_model):
    model = make_model()
    images = pixels(model, 1)
    assistant = make_model()
    expected = model.generate(pixel_values=images, eos_token_id=None)
    assert torch.equal(model.generate(pixel_values=images, assistant_model=assistant, eos_token_id=None), expected)


def test_guidance_scale(make_model):
    model = make_model()
    images = pixels(model, 1)
    # Against no image at all (the last token of the prompt alone): a strong scale changes the caption, 1 does not.
    plain = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None)
    guided = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None, guidance_scale=5.0)
    neutral = model.generate(prompt_ids(model, 5), pixel_values=images, eos_token_id=None, guidance_scale=1.0)
    assert torch.equal(plain, neutral)
    assert not torch.equal(plain, guided)


def test_generate_without_a_tower(make_model):
    model = make_model(None)
    assert model.generate(clip_embeds=torch.randn(3, 16)).shape[0] == 3
    with pytest.raises(ValueError, match="no vision tower.*pass `clip_embeds`"):
        model.generate(pixel_values=torch.randn(1, 3, 32, 32))


def test_generate_in_bfloat16_takes_embeddings_of_any_type(make_model):
    model = make_model().to(torch.bfloat16)
    images = pixels(model)
    assert model.generate(pixel_values=images).shape[0] == 2
    embeds = model.get_clip_embeds(images)
    assert torch.equal(model.generate(clip_embeds=embeds.float()), model.generate(clip_embeds=embeds))


# -- bad input


def test_embeddings_of_the_wrong_shape(make_model):
    model = make_model()
    for call in (model.generate, lambda **kwargs: model(input_ids=prompt_ids(model), **kwargs)):
        with pytest.raises(
            ValueError, match=r"`clip_embeds` must have the shape \(batch, 16\).*\(1, 24\).*another CLIP"
        ):
            call(clip_embeds=torch.randn(1, 24))
        with pytest.raises(ValueError, match=r"`clip_embeds` must have the shape \(batch, 16\).*got \(16,\)"):
            call(clip_embeds=torch.randn(16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_numbers(make_model, value):
    model = make_model()
    embeds = torch.randn(3, 16)
    embeds[1, 2] = value
    with pytest.raises(
        ValueError, match=r"`clip_embeds` hold NaN or infinity in rows \[1\].*embed those images again"
    ):
        model.generate(clip_embeds=embeds)


def test_pixels_and_embeddings_at_once(make_model):
    model = make_model()
    for call in (model.generate, model.get_image_features, lambda **kw: model(input_ids=prompt_ids(model), **kw)):
        with pytest.raises(ValueError, match="exactly one of `pixel_values` and `clip_embeds`"):
            call(clip_embeds=torch.randn(1, 16), pixel_values=pixels(model, 1))


def test_prompt_longer_than_the_context(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="70 tokens long.*context is 64.*shorten the prompt"):
        model.generate(prompt_ids(model, *[5] * 66), pixel_values=pixels(model, 1))


def test_max_new_tokens_beyond_the_context(make_model):
    model = make_model()
    images = pixels(model, 1)
    with pytest.raises(ValueError, match="`max_new_tokens` is 61, but after 4 tokens.*64 leaves room for 60"):
        model.generate(pixel_values=images, max_new_tokens=61)
    generation_config = copy.deepcopy(model.generation_config)
    generation_config.max_new_tokens = 61
    with pytest.raises(ValueError, match="`max_new_tokens` is 61"):
        model.generate(pixel_values=images, generation_config=generation_config)
    assert model.generate(pixel_values=images, max_new_tokens=60, eos_token_id=None).shape == (1, 64)


def test_placeholders_must_match_the_images(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"hold 5 image placeholders \(id 290\).*need 4.*`prefix_length` \(4\)"):
        model(input_ids=prompt_ids(model, 290), pixel_values=pixels(model, 1))
    with pytest.raises(ValueError, match="hold 4 image placeholders.*2 images.*need 8"):
        model.generate(prompt_ids(model), pixel_values=pixels(model, 2))
    with pytest.raises(ValueError, match=r"hold 0 image placeholders.*`image_token_id` \(290\)"):
        model(input_ids=prompt_ids(model).fill_(291), pixel_values=pixels(model, 1))
    with pytest.raises(ValueError, match="no image: pass `pixel_values` or `clip_embeds`"):
        model.generate(prompt_ids(model, 5))
    with pytest.raises(ValueError, match="need `input_ids`"):
        model(inputs_embeds=torch.randn(1, 4, 32), pixel_values=pixels(model, 1))


def edited_config(folder, tmp_path, **changes):
    copied = tmp_path / "edited"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    config.update(changes)
    (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"mapping_type": "transformer"}, "mapping_network.*mapping_type"),
        ({"mapping_type": "linear"}, "mapping_network.*mapping_type"),
        ({"prefix_length": 5}, r"mapping_network.fc1.bias \(64,\).*asks for \(80,\).*prefix_length 5"),
    ],
    ids=["transformer", "linear", "prefix_length"],
)
def test_config_that_contradicts_its_weights(model_folder, tmp_path, changes, pattern):
    folder = edited_config(model_folder, tmp_path, **changes)
    for auto_class in (ClipCapForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match=rf"(?s){folder}.*do not fit its configuration.*{pattern}"):
            auto_class.from_pretrained(folder)


def test_weights_that_belong_to_another_tower(model_folder, tmp_path):
    weights = load_file(model_folder / "model.safetensors")
    del weights["vision_tower.visual_projection.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, for example vision_tower.visual_projection.weight"):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


def test_truncated_weights(model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{model_folder}.*incomplete or damaged.*again"):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


def test_folder_without_weights(model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=str(model_folder)):
        ClipCapForConditionalGeneration.from_pretrained(model_folder)


# -- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vision", [*TOWERS, None])
def test_saving_is_exact(tmp_path, make_model, vision, dtype):
    model = make_model(vision, mapping_type="transformer").to(dtype)
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == dtype  # the default is the type it was saved in
    assert_same_weights(model, again)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    aligned(again)
    images = {"clip_embeds": torch.randn(2, 16)} if vision is None else {"pixel_values": pixels(model)}
    batch = {"input_ids": prompt_ids(model, 5).repeat(2, 1), **images}
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**images), model.generate(**images))
    if dtype == torch.bfloat16:
        assert ClipCapForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("mapping_type", MAPPINGS)
def test_every_mapping_is_saved(tmp_path, make_model, mapping_type):
    model = make_model(None, mapping_type=mapping_type)
    model.save_pretrained(tmp_path)
    again, info = ClipCapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(model, again)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_shards(tmp_path, make_model):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(model, ClipCapForConditionalGeneration.from_pretrained(tmp_path))


def test_tied_head_stays_tied_and_is_saved_once(tmp_path, make_model):
    model = make_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "language_model.transformer.wte.weight" in keys and "language_model.lm_head.weight" not in keys
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    for tied in (model, again):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with torch.no_grad():
        again.get_input_embeddings().weight[7] += 1
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)


def test_untied_head_stays_untied(tmp_path, make_model, text_config):
    text_config.tie_word_embeddings = False
    model = make_model()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert_same_weights(model, ClipCapForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes(model_folder, auto_class):
    assert type(AutoConfig.from_pretrained(model_folder)) is ClipCapConfig
    assert type(auto_class.from_pretrained(model_folder)) is ClipCapForConditionalGeneration


# -- starting from pretrained parts

TEXT_CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2}
    | {
        "num_attention_heads": 4,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"bos_token_id": 0, "eos_token_id": 0},
    "qwen3": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": True},
}


def text_folder(tmp_path, model_type, vocab_size=290):
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **TEXT_CONFIGS[model_type])
    language_model = AutoModelForCausalLM.from_config(config)
    language_model.save_pretrained(tmp_path / model_type)
    return tmp_path / model_type, language_model


@pytest.mark.parametrize("model_type", list(TEXT_CONFIGS))
def test_from_language_model_folder(tmp_path, model_type, clip_config):
    folder, donor = text_folder(tmp_path, model_type)
    clip = CLIPVisionModelWithProjection(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    torch.manual_seed(5)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(folder), mapping_type="transformer", mapping_num_layers=1, prefix_length=3
    ).eval()
    assert_same_weights(model.language_model, donor)
    assert_same_weights(model.vision_tower, clip)
    assert model.config.text_config.model_type == model_type
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.vision_tower.config._attn_implementation == "sdpa"
    assert (model.config.prefix_length, model.config.image_token_id) == (3, 290)

    settings = model.generation_config
    eos = TEXT_CONFIGS[model_type]["eos_token_id"]
    assert settings.eos_token_id == eos
    assert settings.pad_token_id == TEXT_CONFIGS[model_type].get("pad_token_id", eos)
    # 67 as in the official code, or what the context leaves after the prefix.
    assert settings.max_new_tokens == (64 - 3 if model_type == "gpt2" else 67)
    assert not settings.do_sample

    images = pixels(model)
    captions = aligned(model).generate(pixel_values=images)
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    assert_same_weights(model, again)
    assert torch.equal(aligned(again).generate(pixel_values=images), captions)


def test_new_mapping_network_follows_the_seed(tmp_path):
    folder, _ = text_folder(tmp_path, "gpt2")

    def start(seed):
        torch.manual_seed(seed)
        model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
            None, str(folder), mapping_type="transformer"
        )
        return model.mapping_network

    assert_same_weights(start(1), start(1))
    assert not torch.equal(start(1).prefix_const, start(2).prefix_const)
    network = start(1)
    bound = network.clip_projection.in_features**-0.5
    assert 0.9 * bound < network.clip_projection.weight.abs().max() <= bound
    assert 0.7 < network.prefix_const.std() < 1.3


def test_from_a_whole_clip_folder(tmp_path, clip_config):
    folder, _ = text_folder(tmp_path, "gpt2")
    config = CLIPConfig(
        vision_config=clip_config.to_dict(),
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=16,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "clip"), str(folder)).eval()
    assert torch.equal(model.vision_tower.visual_projection.weight, clip.visual_projection.weight)
    images = pixels(model)
    with torch.no_grad():
        embeds = aligned(model).get_clip_embeds(images)
    torch.testing.assert_close(embeds, clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output))
    assert model.config.clip_embed_dim == 16
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    with torch.no_grad():
        assert torch.equal(aligned(again).get_clip_embeds(images), embeds)


def test_projection_width_of_a_whole_clip_is_that_of_its_vision_config(tmp_path, clip_config):
    # CLIPModel projects to its own `projection_dim`, whatever its vision configuration says.
    folder, _ = text_folder(tmp_path, "gpt2")
    config = CLIPConfig(
        vision_config={**clip_config.to_dict(), "projection_dim": 512},
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=24,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "clip"), str(folder)).eval()
    assert model.config.clip_embed_dim == 24
    assert torch.equal(model.vision_tower.visual_projection.weight, clip.visual_projection.weight)


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
def test_from_an_open_clip_folder(tmp_path, open_clip_configs, tower):
    folder, _ = text_folder(tmp_path, "gpt2")
    config = open_clip_configs[tower]
    donor = OpenClipVisionModel(config).eval()
    (tmp_path / "tower").mkdir()
    model_cfg = {"embed_dim": 16, "vision_cfg": config.vision_cfg, "quick_gelu": config.quick_gelu, "text_cfg": {}}
    preprocess_cfg = {"size": config.image_size, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "tower" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    save_file(donor.state_dict(), tmp_path / "tower" / "open_clip_model.safetensors")

    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "tower"), str(folder)).eval()
    assert type(model.vision_tower) is (CLIPVisionModelWithProjection if tower == "vit" else OpenClipVisionModel)
    images = pixels(model)
    with torch.no_grad():  # attention takes another path where gradients are wanted
        embeds = aligned(model).get_clip_embeds(images)
        torch.testing.assert_close(embeds, donor.visual(images), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    with torch.no_grad():
        assert torch.equal(aligned(again).get_clip_embeds(images), embeds)


def test_from_loaded_parts_and_in_bfloat16(tmp_path, clip_config, text_config):
    clip, gpt2 = CLIPVisionModelWithProjection(clip_config), GPT2LMHeadModel(text_config)
    weights = copy.deepcopy(gpt2.state_dict())
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(clip, gpt2, freeze_language_model=True)
    assert model.language_model is gpt2 and model.vision_tower is clip
    assert all(torch.equal(weights[name], value) for name, value in gpt2.state_dict().items())
    assert not any(parameter.requires_grad for parameter in gpt2.parameters())

    clip.save_pretrained(tmp_path / "clip")
    gpt2.save_pretrained(tmp_path / "gpt2")
    half = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "clip"), str(tmp_path / "gpt2"), dtype=torch.bfloat16
    )
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    full = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "clip", tmp_path / "gpt2", vision_kwargs={"local_files_only": True}
    )
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


def test_placeholder_of_a_vocabulary_that_is_larger_than_its_tokenizer(tmp_path, make_tokenizer):
    # As with OPT and Qwen: the language model has more rows than the tokenizer has tokens.
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    folder, _ = text_folder(tmp_path, "gpt2", vocab_size=vocabulary + 30)
    tokenizer.save_pretrained(folder)
    processor = ClipCapProcessor.from_vision_text_pretrained(None, str(folder), prefix_length=4)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(None, str(folder), prefix_length=4)
    assert model.config.image_token_id == processor.image_token_id == vocabulary
    inputs = processor(text=["a red", ""], clip_embeds=torch.randn(2, 512), return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=20).shape[0] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_langauge_model": True}, "did you mean `freeze_language_model`"),
        ({"token": "hf_secret"}, "no field `token`.*`vision_kwargs` or `text_kwargs`"),
        ({"torch_dtype": torch.bfloat16}, "did you mean `dtype`"),
    ],
)
def test_what_is_no_field_of_the_configuration(clip_config, text_config, fields, message):
    with pytest.raises(TypeError, match=message):
        ClipCapForConditionalGeneration.from_vision_text_pretrained(
            CLIPVisionModelWithProjection(clip_config), GPT2LMHeadModel(text_config), **fields
        )


def test_what_is_no_causal_language_model(tmp_path, clip_config):
    clip = CLIPVisionModelWithProjection(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    start = ClipCapForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="clip is a `clip_vision_model`, which is not a causal language model"):
        start(clip, tmp_path / "clip")
    with pytest.raises(TypeError, match="`text` must be the name or folder of a model"):
        start(clip, None)
    with pytest.raises(OSError, match="Could not load the language model 'no/such'"):
        start(clip, "no/such")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=290, **sizes)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="A `bert` is an encoder.*is_decoder"):
        start(clip, tmp_path / "bert")
    decoder = BertLMHeadModel.from_pretrained(tmp_path / "bert", is_decoder=True)
    model = start(clip, decoder, prefix_length=4).eval()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    logits = model.language_model(ids).logits
    torch.testing.assert_close(logits[0, :3], logits[1, :3])


@pytest.mark.parametrize(
    "setting", [{"prompt_lookup_num_tokens": 3}, {"token_healing": True}, {"encoder_repetition_penalty": 1.2}]
)
def test_generation_that_looks_prompts_up_in_the_vocabulary(make_model, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` looks the prompt's tokens up"):
        make_model().generate(clip_embeds=torch.randn(1, 16), **setting)
