"""The memory of training's captions and images, which re-ranking falls back on."""

import random
from pathlib import Path

import pytest
import torch
from clipcap_hf import (
    EMOJI_MINI,
    CaptionMemory,
    CaptionReranker,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    official_beam_search,
)
from clipcap_hf.captioning import caption_embeds, caption_images, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.model.bag_of_tokens_clipcap import BagOfTokensTextConfig, BagOfTokensTextModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import pipeline


BEAMS = 5


@pytest.fixture
def embeds(images, model_folder):
    """Embed eight pictures with the tower of the captioner in `model_folder`."""
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    return embed_images(model, ClipCapProcessor.from_pretrained(model_folder), images, progress=False)


@pytest.fixture
def remembering(model_folder, embeds, captions):
    """Save a text tower that remembers six pictures with three captions; load the captioner and its re-ranker."""
    tower = BagOfTokensTextConfig(vocab_size=291, projection_dim=16, rerank_memory_weight=40.0, rerank_min_cosine=2.0)
    torch.manual_seed(0)
    BagOfTokensTextModel(tower).save_pretrained(model_folder / "text_tower")
    memory = CaptionMemory.from_embeds(embeds[:6], [captions[index // 2] for index in range(6)])
    memory.save(model_folder / "text_tower")
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    model.generation_config.max_new_tokens = 12
    model.generation_config.pad_token_id = 0
    processor = ClipCapProcessor.from_pretrained(model_folder)
    return model, processor, CaptionReranker.from_pretrained(model, processor)


def test_similarity_is_the_mean_of_two_cosines():
    torch.manual_seed(0)
    known, others = F.normalize(torch.randn(9, 6), dim=1), torch.randn(4, 6)
    captions = ["b", "a", "b", "c", "c", "a", "b", "a", "d"]
    memory = CaptionMemory.from_embeds(known, captions, dimensions=6)
    assert memory.captions == ["a", "b", "c", "d"]
    for image, row in zip(F.normalize(others, dim=1), memory.similarities(others)):
        for caption, found in zip(memory.captions, row):
            own = known[[index for index, other in enumerate(captions) if other == caption]]
            expected = (own @ image).max() + F.cosine_similarity(own.mean(0), image, dim=0)
            torch.testing.assert_close(found, expected / 2)
    # In fewer dimensions than the images span, similarities are near.
    plane = torch.randn(2, 6)
    flat = torch.randn(20, 2) @ plane + 0.01 * torch.randn(20, 6)
    names = [f"{index % 7}" for index in range(20)]
    small, whole = (CaptionMemory.from_embeds(flat, names, dimensions=size) for size in (2, 6))
    torch.testing.assert_close(small.similarities(flat), whole.similarities(flat), atol=0.01, rtol=0)


def test_new_captions_have_to_fit_and_known_ones_go_by_similarity():
    torch.manual_seed(0)
    generator = random.Random(0)
    memory = CaptionMemory.from_embeds(torch.randn(9, 6), list("abcdabcda"), weight=3.0, min_cosine=0.1)
    captions = [generator.sample("abcdefgh", 6) for _ in range(40)]
    images, scores, ratings, cosines = torch.randn(4, 40, 6)
    similarities = memory.similarities(images)
    order = memory.order(similarities, captions, scores, ratings, cosines).tolist()
    led = 0
    for image, texts in enumerate(captions):
        known = [place for place in range(6) if texts[place] in "abcd"]
        new = [place for place in range(6) if place not in known]
        remembered = {
            place: scores[image, place] + 3 * similarities[image, "abcd".index(texts[place])] for place in known
        }
        expected = sorted(known, key=remembered.get, reverse=True)
        expected += sorted(new, key=lambda place: ratings[image, place], reverse=True)
        credible = known + [place for place in new if cosines[image, place] >= 0.1]
        best = max(credible, key=lambda place: ratings[image, place])
        if best in new:
            led += 1
            expected = [best] + [place for place in expected if place != best]
        assert order[image] == expected
    assert 5 < led < 35


def test_a_caption_that_no_beam_found_is_recalled_with_its_log_probability(remembering, embeds):
    model, processor, reranker = remembering
    settings = {"clip_embeds": embeds, "num_beams": BEAMS, "rerank": reranker}
    found = model.generate(**settings, return_dict_in_generate=True)
    texts = [text.strip() for text in processor.batch_decode(found.sequences, skip_special_tokens=True)]
    # No beam of a random model says what it knows, so that each image gets the nearest caption.
    nearest = reranker.memory.similarities(embeds).argmax(1).tolist()
    assert texts == [reranker.memory.captions[row] for row in nearest]
    assert len(set(texts)) > 1
    for image, (text, score) in enumerate(zip(texts, found.sequences_scores.tolist())):
        inputs = processor(
            text=text + processor.tokenizer.eos_token, clip_embeds=embeds[image : image + 1], return_tensors="pt"
        )
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        assert score == pytest.approx(-model(**inputs, labels=labels).loss.item(), abs=1e-5)
    several = model.generate(**settings, num_return_sequences=3)
    assert torch.equal(several[::3, : found.sequences.shape[1]], found.sequences[:, : several.shape[1]])
    for extra in ({"custom_generate": official_beam_search}, {"use_cache": False}):
        assert torch.equal(model.generate(**settings, **extra), found.sequences)


def test_pipelines_and_commands_give_recalled_captions(remembering, images):
    model, processor, reranker = remembering
    found = list(
        caption_images(model, processor, images, progress=False, num_beams=BEAMS, rerank=reranker, scores=True)
    )
    assert {one.captions[0] for one in found} <= set(reranker.memory.captions)
    captioner = pipeline("image-captioning", model=model, processor=processor)
    records = captioner(images, num_beams=BEAMS, rerank=True, return_scores=True)
    assert [image[0]["generated_text"] for image in records] == [one.captions[0] for one in found]
    expected = [one.scores[0] for one in found]
    torch.testing.assert_close([image[0]["score"] for image in records], expected, atol=1e-4, rtol=0)


def test_nothing_is_recalled_after_a_prompt_or_with_another_length_penalty(remembering, embeds):
    model, processor, reranker = remembering
    prompts = processor.tokenize_prompts("a red", len(embeds), return_tensors="pt")
    for kwargs in (prompts, {"length_penalty": 2.0}):
        settings = {"clip_embeds": embeds, "num_beams": BEAMS, "num_return_sequences": BEAMS, **kwargs}
        found = processor.batch_decode(model.generate(**settings, rerank=reranker), skip_special_tokens=True)
        assert sorted(found) == sorted(processor.batch_decode(model.generate(**settings), skip_special_tokens=True))
    free = processor.tokenize_prompts(None, len(embeds), return_tensors="pt")
    settings = {"clip_embeds": embeds, "num_beams": BEAMS, "rerank": reranker}
    assert torch.equal(model.generate(**settings, **free), model.generate(**settings))


def test_a_saved_memory_is_near_the_original(remembering, embeds, captions):
    _, _, reranker = remembering
    original = CaptionMemory.from_embeds(embeds[:6], [captions[index // 2] for index in range(6)])
    saved = reranker.memory
    assert (saved.captions, saved.weight, saved.min_cosine) == (original.captions, 40, 2)
    difference = (saved.similarities(embeds) - original.similarities(embeds)).abs()
    assert 0 < difference.max() < 0.02
    assert reranker.record()["memory"] == saved.record() != original.record()


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def change(**weights):
    return lambda file: save_file({**load_file(file), **weights}, file)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        pytest.param(cut, "seen_images.safetensors are incomplete", id="cut"),
        pytest.param(lambda file: file.unlink(), "seen_images.safetensors", id="missing"),
        pytest.param(lambda file: save_file({}, file), "does not hold the images", id="empty"),
        pytest.param(change(owners=torch.zeros(6, dtype=torch.int)), "images for each of its 3", id="owners"),
        pytest.param(change(embeds=torch.full((6, 16), torch.nan)), "finite", id="nan"),
        pytest.param(change(projection=torch.zeros(16, 3)), "projection of shape", id="projection"),
        pytest.param(change(projection=torch.zeros(5, 16)), "by embeddings of width 5", id="width"),
    ],
)
def test_a_damaged_memory_is_refused(remembering, damage, match):
    model, processor, _ = remembering
    damage(Path(model.name_or_path) / "text_tower/seen_images.safetensors")
    with pytest.raises((ValueError, OSError), match=match):
        CaptionReranker.from_pretrained(model, processor)


def test_memories_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="must differ"):
        CaptionMemory(["a", "a"], torch.tensor([0, 1]), torch.ones(2, 3), torch.eye(3))
    with pytest.raises(ValueError, match="images for each of its 2 captions"):
        CaptionMemory(["a", "b"], torch.tensor([0, 0]), torch.ones(2, 3), torch.eye(3))
    for embeds, captions in (
        (torch.ones(2, 3), ["a"]),
        (torch.full((1, 3), torch.nan), ["a"]),
        (torch.ones(0, 3), []),
    ):
        with pytest.raises(ValueError, match="finite embeddings and a caption for each"):
            CaptionMemory.from_embeds(embeds, captions)
    for setting in ({"weight": torch.nan}, {"min_cosine": "high"}):
        with pytest.raises(ValueError, match=f"`{next(iter(setting))}` of a memory must be a number"):
            CaptionMemory.from_embeds(torch.eye(3), list("abc"), **setting)


def test_emoji_mini_names_more_blurred_drawings_of_known_things_by_memory():
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    reranker = CaptionReranker.from_pretrained(model, processor)
    plain = CaptionReranker(reranker.text_tower, processor, reranker.weight, reranker.seen_penalty)
    data = load_emoji("train").select(range(0, 11_000, 100))
    embeds = F.normalize(embed_images(model, processor, data["image"], progress=False), dim=-1)
    torch.manual_seed(0)
    blurred = embeds + 0.08 * torch.randn(embeds.shape)
    right = []
    for rerank in (plain, reranker):
        found = caption_embeds(model, processor, blurred, progress=False, num_beams=10, rerank=rerank)
        right.append(sum(caption == names[0] for caption, names in zip(found, data["captions"])))
    assert right[1] - right[0] >= 6, right  # 97 and 108 of 110
