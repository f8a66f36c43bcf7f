"""The prefix from patch tokens, `vision_feature="patches"`."""

import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapConfig, ClipCapForConditionalGeneration
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.model.modeling_mapping import pool_patches
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import ViTConfig, XCLIPVisionConfig


PATCHES = {"vision_feature": "patches", "mapping_type": "transformer"}


@pytest.mark.parametrize(("patches", "clip_length"), [(16, 4), (49, 9), (16, 6), (15, 4)])
def test_pooling(patches, clip_length):
    tokens = torch.randn(2, patches, 8)
    pooled = pool_patches(tokens, clip_length)
    assert pooled.shape == (2, clip_length, 8)
    assert torch.equal(pool_patches(pooled, clip_length), pooled)
    torch.testing.assert_close(pool_patches(torch.ones(1, patches, 8), clip_length), torch.ones(1, clip_length, 8))
    assert torch.equal(pool_patches(tokens, patches + 1), tokens)


def test_pooling_over_the_grid():
    tokens = torch.arange(16.0).reshape(1, 16, 1)  # rows of four
    quadrants = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    expected = torch.tensor([sum(cell) / 4 for cell in quadrants])
    assert torch.equal(pool_patches(tokens, 4).flatten(), expected)
    assert torch.equal(pool_patches(tokens, 8).flatten(), torch.arange(0.5, 16, 2))  # not a square: runs of two


@pytest.mark.parametrize("vision", ["clip", "vit", "resnet", "timm"])
@torch.no_grad()
def test_captions_from_patches(tmp_path, make_model, vision):
    if vision == "timm":  # only the tower itself knows the width of its feature map
        with pytest.raises(ValueError, match="`clip_embed_dim=`"):
            make_model(vision, **PATCHES)
        return
    model = make_model(vision, **PATCHES, clip_length=3)
    dim = {"clip": 32, "vit": 64, "resnet": 256}[vision]
    assert model.config.clip_embed_dim == dim
    pixels = torch.randn(2, 3, 32, 32)
    clip_embeds = model.get_clip_embeds(pixels)
    assert clip_embeds.shape == (2, 1 if vision == "resnet" else 3, dim)
    prefix = model.get_image_features(pixels).pooler_output
    assert prefix.shape == (2, 4, 32) and not torch.equal(*prefix)
    assert torch.equal(model.get_image_features(clip_embeds=clip_embeds).pooler_output, prefix)
    expected = model.generate(pixel_values=pixels)
    assert torch.equal(model.generate(clip_embeds=clip_embeds), expected)
    model.save_pretrained(tmp_path)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.vision_feature == "patches"
    torch.testing.assert_close(again.get_image_features(pixels).pooler_output, prefix)


@torch.no_grad()
def test_unpooled_patches_of_a_data_set_will_do(make_model):
    model = make_model(**PATCHES, clip_length=3, normalize_clip_embeds=True)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = model.vision_tower(pixels).last_hidden_state[:, 1:]
    from_tokens = model.get_image_features(clip_embeds=tokens).pooler_output
    torch.testing.assert_close(from_tokens, model.get_image_features(pixels).pooler_output)


@torch.no_grad()
def test_every_patch_counts(make_model):
    model = make_model(**PATCHES, clip_length=4)
    tokens = torch.randn(1, 16, 32)
    prefix = model.get_image_features(clip_embeds=tokens).pooler_output
    for patch in range(16):
        other = tokens.clone()
        other[:, patch] += 1
        assert not torch.allclose(model.get_image_features(clip_embeds=other).pooler_output, prefix)


def test_training_on_patches(make_model, processor, images, captions):
    model = make_model(**PATCHES, clip_length=4)
    embeds = embed_images(model, processor, images, progress=False)
    assert embeds.shape == (8, 4, 32)
    rows = [{"clip_embeds": embed.tolist(), "captions": caption} for embed, caption in zip(embeds, captions)]
    batch = CaptioningCollator(processor)(rows)
    assert batch["clip_embeds"].shape == (8, 4, 32)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    model.train()
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    model.eval()
    kwargs = {"max_new_tokens": 20, "eos_token_id": processor.tokenizer.eos_token_id}
    learned = caption_embeds(model, processor, embeds, progress=False, **kwargs)
    assert sum(a == b for a, b in zip(learned, captions)) >= 6
    pixels = processor(images=images, return_tensors="pt")
    assert torch.equal(model.generate(**pixels, **kwargs), model.generate(clip_embeds=embeds, **kwargs))


def test_what_does_not_fit(make_model, text_config):
    for mapping_type in ("mlp", "linear"):
        with pytest.raises(ValueError, match=f"needs `mapping_type=\"transformer\"`: a '{mapping_type}' mapping"):
            make_model(vision_feature="patches", mapping_type=mapping_type)
    with pytest.raises(ValueError, match="X-CLIP's video encoder gives no patch tokens"):
        ClipCapConfig(vision_config=XCLIPVisionConfig(), text_config=text_config, mapping_num_heads=4, **PATCHES)
    patches, pooled = make_model(**PATCHES), make_model()
    with pytest.raises(
        ValueError, match=r"\(batch, patches, 32\) that.*`vision_feature` is 'patches'\), got \(2, 32\)"
    ):
        patches.generate(clip_embeds=torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"\(batch, 16\) that.*`vision_feature` is 'pooled'\), got \(2, 5, 16\)"):
        pooled.generate(clip_embeds=torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match="width 32"):
        ClipCapConfig(
            vision_config=ViTConfig(hidden_size=32, num_attention_heads=4),
            text_config=text_config,
            clip_embed_dim=512,
            mapping_num_heads=4,
            **PATCHES,
        )
    with pytest.raises(
        StrictDataclassFieldValidationError, match="expected one of \\('pooled', 'patches'\\), got tokens"
    ):
        make_model(vision_feature="tokens")
