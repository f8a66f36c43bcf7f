"""The forward pass: features, mapping, scatter, language model, loss."""

import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration
from tiny_inputs import MAPPINGS, TOWERS, left_padded, pixels, prompt_ids
from torch.nn import functional as F
from transformers import (
    CLIPVisionModelWithProjection,
)


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
    # The prefix is the output at the learned constants, which come last.
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
    # The logits one position before a token predict it; the prefix's last predict the caption's first token.
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
