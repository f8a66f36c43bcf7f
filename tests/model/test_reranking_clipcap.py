"""Re-ranking of the captions of a beam search by the text tower of the captioner's CLIP."""

import json
from dataclasses import replace

import pytest
import torch
from clipcap_hf import (
    EMOJI_MINI,
    CaptionReranker,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    official_beam_search,
)
from clipcap_hf.captioning import caption_embeds, caption_images
from clipcap_hf.cli import main
from clipcap_hf.cli.output import escape
from clipcap_hf.clip import load_text_tower
from clipcap_hf.data import load_emoji
from clipcap_hf.evaluation import EvaluationSet, caption_benchmark
from clipcap_hf.model.bag_of_tokens_clipcap import BagOfTokensTextConfig, BagOfTokensTextModel
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipModel,
    pipeline,
)


TEXT = {"vocab_size": 290, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 40, "eos_token_id": 0, "bos_token_id": 0}
TEXT |= {"pad_token_id": 0}
BEAMS = 6


@pytest.fixture
def save_clip(tmp_path, clip_config, make_tokenizer, image_processor):
    def save(name, seed=0, projection_dim=16):
        torch.manual_seed(seed)
        clip_config.projection_dim = projection_dim
        config = CLIPConfig(
            text_config=TEXT,
            vision_config=clip_config.to_dict(),
            projection_dim=projection_dim,
            initializer_factor=5.0,
        )
        CLIPModel(config).save_pretrained(tmp_path / name)
        tokenizer = make_tokenizer(pad_token="<|endoftext|>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.save_pretrained(tmp_path / name)
        image_processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def clip(save_clip):
    return save_clip("clip")


@pytest.fixture
def captioner(clip, tmp_path, text_config, tokenizer):
    """Assemble a captioner by names, so that its configuration says which CLIP it is of."""
    torch.manual_seed(0)
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        clip, str(tmp_path / "gpt2"), prefix_length=4
    ).eval()
    model.generation_config.max_new_tokens = 8
    model.generation_config.pad_token_id = 0
    processor = ClipCapProcessor.from_vision_text_pretrained(clip, str(tmp_path / "gpt2"), prefix_length=4)
    return model, processor


@pytest.fixture
def pixels(captioner, images):
    return captioner[1].image_processor(images[:4], return_tensors="pt")["pixel_values"]


def candidates(captioner, pixels, **kwargs):
    """Search with transformers' own beam search: texts and scores of all beams, and cosines by the complete CLIP."""
    model, processor = captioner
    outputs = model.generate(
        pixel_values=pixels,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )
    texts = [text.strip() for text in processor.batch_decode(outputs.sequences, skip_special_tokens=True)]
    folder = model.config.donors["vision_tower"]["name"]
    clip, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        seen = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        read = [clip.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0] for text in texts]
    cosines = (F.normalize(torch.stack(read), dim=-1).unflatten(0, (-1, BEAMS)) * seen.unsqueeze(1)).sum(-1)
    rows = [texts[start : start + BEAMS] for start in range(0, len(texts), BEAMS)]
    return rows, outputs.sequences_scores.unflatten(0, (-1, BEAMS)), cosines


def best_of(texts, scores):
    return [[row[place] for place in order] for row, order in zip(texts, scores.argsort(1, descending=True).tolist())]


def decoded(processor, sequences, images):
    texts = [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    return [texts[start : start + len(texts) // images] for start in range(0, len(texts), len(texts) // images)]


@pytest.mark.parametrize("weight", [0.0, 2.0, 1e4])
def test_score_is_log_probability_plus_weighted_cosine(captioner, pixels, weight):
    model, processor = captioner
    texts, log_probs, cosines = candidates(captioner, pixels)
    reranker = CaptionReranker.from_pretrained(model, processor, weight=weight)
    found = model.generate(pixel_values=pixels, num_beams=BEAMS, num_return_sequences=BEAMS, rerank=reranker)
    expected = best_of(texts, log_probs + weight * cosines)
    assert decoded(processor, found, len(pixels)) == expected
    if weight:
        assert expected != texts, "re-ranking changes nothing here"
    else:
        assert expected == texts
    first = model.generate(pixel_values=pixels, num_beams=BEAMS, rerank=reranker)
    assert decoded(processor, first, len(pixels)) == [row[:1] for row in expected]


def test_scores_and_other_outputs_follow_their_captions(captioner, pixels):
    model, processor = captioner
    texts, log_probs, cosines = candidates(captioner, pixels)
    reranker = CaptionReranker.from_pretrained(model, processor, weight=2.0)
    found = model.generate(
        pixel_values=pixels,
        num_beams=BEAMS,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
        rerank=reranker,
    )
    order = (log_probs + 2 * cosines).argsort(1, descending=True)[:, :2]
    torch.testing.assert_close(found.sequences_scores.unflatten(0, (-1, 2)), log_probs.gather(1, order))
    expected = [[row[place] for place in places] for row, places in zip(texts, order.tolist())]
    assert decoded(processor, found.sequences, len(pixels)) == expected


def test_embeddings_prompts_and_the_official_search(captioner, pixels):
    model, processor = captioner
    reranker = CaptionReranker.from_pretrained(model, processor, weight=2.0)
    expected = decoded(processor, model.generate(pixel_values=pixels, num_beams=BEAMS, rerank=reranker), len(pixels))
    embeds = model.get_clip_embeds(pixels)
    found = caption_embeds(model, processor, embeds, progress=False, num_beams=BEAMS, rerank=reranker)
    assert [[caption] for caption in found] == expected
    official = model.generate(
        pixel_values=pixels, num_beams=BEAMS, rerank=reranker, custom_generate=official_beam_search
    )
    assert len(official) == len(pixels)
    inputs = processor.tokenize_prompts("a red", len(pixels), return_tensors="pt")
    prompted = model.generate(pixel_values=pixels, num_beams=BEAMS, rerank=reranker, **inputs)
    assert all(text.startswith("a red") for (text,) in decoded(processor, prompted, len(pixels)))


def test_texts_are_embedded_once_and_in_one_batch(captioner, pixels):
    model, processor = captioner
    reranker = CaptionReranker.from_pretrained(model, processor)
    calls = []
    original = reranker.text_tower.embed
    reranker.text_tower.embed = lambda texts, device: calls.append(texts) or original(texts, device)
    first = model.generate(pixel_values=pixels, num_beams=BEAMS, rerank=reranker)
    assert len(calls) == 1 and len(calls[0]) == len(set(calls[0]))
    assert torch.equal(first, model.generate(pixel_values=pixels, num_beams=BEAMS, rerank=reranker))
    assert len(calls) == 1, "the same captions were embedded again"


def test_pipelines(captioner, images):
    model, processor = captioner
    reranker = CaptionReranker.from_pretrained(model, processor, weight=10.0)
    captioned = caption_images(
        model, processor, images, progress=False, num_beams=BEAMS, num_return_sequences=2, rerank=reranker, scores=True
    )
    captioned = list(captioned)
    captioner = pipeline("image-captioning", model=model, processor=processor)
    for rerank in (True, reranker, model.config.donors["vision_tower"]["name"]):
        found = captioner(images, num_beams=BEAMS, num_return_sequences=2, rerank=rerank, return_scores=True)
        assert [[one["generated_text"] for one in image] for image in found] == [one.captions for one in captioned]
        scores = [[one["score"] for one in image] for image in found]
        torch.testing.assert_close(scores, [one.scores for one in captioned], atol=1e-4, rtol=0)
    assert len(captioner._rerankers) == 2
    explained = list(
        caption_images(model, processor, images, progress=False, explain=2, num_beams=BEAMS, rerank=reranker)
    )
    assert [one.captions[0] for one in explained] == [one.captions[0] for one in captioned]
    general = pipeline("image-text-to-text", model=model, processor=processor)
    found = general(images[0], text="", generate_kwargs={"num_beams": BEAMS, "rerank": reranker})
    assert found[0]["generated_text"].strip() == captioned[0].captions[0]


def test_patches_are_compared_by_the_pooled_embedding(clip, tmp_path, captioner, pixels):
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        clip,
        str(tmp_path / "gpt2"),
        prefix_length=4,
        vision_feature="patches",
        mapping_type="transformer",
        mapping_num_layers=1,
        mapping_num_heads=4,
    ).eval()
    model.generation_config.max_new_tokens = 8
    model.generation_config.pad_token_id = 0
    processor = captioner[1]
    texts, log_probs, cosines = candidates((model, processor), pixels)
    reranker = CaptionReranker.from_pretrained(model, processor, weight=3.0)
    found = model.generate(pixel_values=pixels, num_beams=BEAMS, num_return_sequences=BEAMS, rerank=reranker)
    assert decoded(processor, found, len(pixels)) == best_of(texts, log_probs + 3 * cosines)
    with pytest.raises(ValueError, match="are patches: pass"):
        model.generate(clip_embeds=model.get_clip_embeds(pixels), num_beams=BEAMS, rerank=reranker)


def test_siglip(tmp_path, text_config, tokenizer, make_tokenizer, captions):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {**TEXT, "max_position_embeddings": 16, "projection_size": 32}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    make_tokenizer(pad_token="<|endoftext|>").save_pretrained(tmp_path / "siglip")
    found = load_text_tower(tmp_path / "siglip")(captions)
    inputs = make_tokenizer(pad_token="<|endoftext|>")(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = siglip.get_text_features(input_ids=inputs["input_ids"]).pooler_output
    torch.testing.assert_close(found, expected)

    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "siglip"), str(tmp_path / "gpt2"), prefix_length=4
    ).eval()
    processor = ClipCapProcessor(None, tokenizer, prefix_length=4)
    reranker = CaptionReranker.from_pretrained(model, processor)
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "num_beams": 3}
    assert len(model.generate(pixel_values=torch.randn(2, 3, 32, 32), rerank=reranker, **settings)) == 2


def save_text_tower(folder, **kwargs):
    torch.manual_seed(1)
    config = CLIPTextConfig(**TEXT, projection_dim=16, initializer_factor=5.0, **kwargs)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_tower")


def test_a_saved_text_tower_shares_the_tokenizer_and_names_its_weight(model_folder, captions):
    save_text_tower(model_folder, rerank_weight=7.5)
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = ClipCapProcessor.from_pretrained(model_folder)
    reranker = CaptionReranker.from_pretrained(model, processor)
    assert reranker.weight == 7.5
    assert CaptionReranker.from_pretrained(model, processor, weight=1).weight == 1
    tower = CLIPTextModelWithProjection.from_pretrained(model_folder / "text_tower").eval()
    for caption, found in zip(captions, reranker.embed_texts(captions)):
        ids = processor.tokenizer([caption + processor.tokenizer.eos_token], return_tensors="pt")["input_ids"]
        torch.testing.assert_close(found, F.normalize(tower(input_ids=ids).text_embeds[0], dim=-1), atol=1e-5, rtol=0)
    # A captioner on the same vision tower may use it, too.
    other = ClipCapForConditionalGeneration(model.config, vision_tower=model.vision_tower)
    borrowed = CaptionReranker.from_pretrained(other, processor, model_folder)
    assert borrowed.record() == reranker.record()


def test_a_bag_of_tokens_counts_each_token_once(model_folder, captions):
    tower = BagOfTokensTextModel(BagOfTokensTextConfig(vocab_size=291, projection_dim=16, rerank_weight=3.0))
    tower.save_pretrained(model_folder / "text_tower")
    processor = ClipCapProcessor.from_pretrained(model_folder)
    model = ClipCapForConditionalGeneration.from_pretrained(model_folder).eval()
    reranker = CaptionReranker.from_pretrained(model, processor)
    assert reranker.weight == 3.0
    texts = [*captions, "a a red heart red", ""]
    for text, found in zip(texts, reranker.embed_texts(texts)):
        ids = sorted({*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id})
        expected = tower.vectors.weight[ids].sum(0)
        torch.testing.assert_close(found, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_a_penalty_on_captions_that_the_text_tower_has_seen(captioner, pixels, model_folder):
    model, processor = captioner
    texts, log_probs, cosines = candidates(captioner, pixels)
    seen = {row[0] for row in texts}
    save_text_tower(model_folder, rerank_seen_penalty=0.5)
    (model_folder / "text_tower/seen_captions.json").write_text(json.dumps(sorted(seen)))
    saved = CaptionReranker.from_pretrained(*captioner, model_folder)
    assert (saved.text_tower.seen_captions, saved.seen_penalty) == (seen, 0.5)

    tower = CaptionReranker.from_pretrained(*captioner).text_tower
    plain, strict = (CaptionReranker(replace(tower, seen_captions=seen), processor, 5, off) for off in (0, 0.5))
    is_seen = torch.tensor([[caption in seen for caption in row] for row in texts])
    assert 0 < is_seen.sum() < is_seen.numel()
    expected = best_of(texts, log_probs + 5 * (cosines - 0.5 * is_seen))
    found = model.generate(pixel_values=pixels, num_beams=BEAMS, num_return_sequences=BEAMS, rerank=strict)
    assert decoded(processor, found, len(pixels)) == expected != best_of(texts, log_probs + 5 * cosines)
    assert plain.record().keys() == {"text_tower_sha256", "weight"}
    fewer = CaptionReranker(replace(tower, seen_captions=frozenset(sorted(seen)[1:])), processor, 5, 0.5)
    assert strict.record() != fewer.record() != plain.record()
    with pytest.raises(ValueError, match="needs a list of them"):
        CaptionReranker(replace(tower, seen_captions=frozenset()), processor, 5, 0.5)


@pytest.mark.parametrize("content", ["", "{}", "[1]", pytest.param("[" * 100_000, id="deep"), None])
def test_a_damaged_list_of_seen_captions_is_refused(captioner, model_folder, content):
    save_text_tower(model_folder, rerank_seen_penalty=0.5)
    if content is not None:
        (model_folder / "text_tower/seen_captions.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="seen_captions.json"):
        CaptionReranker.from_pretrained(*captioner, model_folder)


def test_emoji_mini_names_more_drawings_with_its_text_tower():
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    reranker = CaptionReranker.from_pretrained(model, processor)
    assert (reranker.weight, reranker.seen_penalty) == (10, 0.04)
    assert reranker.text_tower.seen_captions == {names[0] for names in load_emoji("train")["captions"]}
    data = load_emoji("validation")
    right = []
    for rerank in (None, reranker):
        found = caption_images(model, processor, data["image"], progress=False, num_beams=10, rerank=rerank)
        right.append(sum(one.captions[0] == names[0] for one, names in zip(found, data["captions"])))
    assert right[0] >= 134 and right[1] - right[0] >= 6, right  # 145 and 158 of 190


def test_wrong_text_towers_are_refused(captioner, save_clip, tmp_path, make_model, processor, model_folder):
    model, own_processor = captioner
    with pytest.raises(ValueError, match="of width 24, but this captioner's image embeddings have width 16"):
        CaptionReranker.from_pretrained(model, own_processor, save_clip("wide", projection_dim=24))
    with pytest.raises(ValueError, match="has other weights than this captioner's"):
        CaptionReranker.from_pretrained(model, own_processor, save_clip("other", seed=1))
    with pytest.raises(ValueError, match="None is saved with .*pass that CLIP's name"):
        CaptionReranker.from_pretrained(make_model(), processor)
    with pytest.raises(ValueError, match="is a `gpt2`; the text tower must be a CLIP's"):
        CaptionReranker.from_pretrained(model, own_processor, str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="Could not load a text tower to re-rank with from .*nowhere"):
        CaptionReranker.from_pretrained(model, own_processor, str(tmp_path / "nowhere"))
    vision_only = tmp_path / "vision-only"
    model.vision_tower.save_pretrained(vision_only)
    with pytest.raises(ValueError, match="is a `clip_vision_model`"):
        CaptionReranker.from_pretrained(model, own_processor, str(vision_only))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, "2", None])
def test_weights_must_be_numbers_of_at_least_0(captioner, weight):
    model, processor = captioner
    reranker = CaptionReranker.from_pretrained(model, processor)
    with pytest.raises(ValueError, match="must be a number of at least 0"):
        CaptionReranker(reranker.text_tower, processor, weight)


def test_searches_without_candidates_are_refused(captioner, pixels):
    model, processor = captioner
    reranker = CaptionReranker.from_pretrained(model, processor)
    for settings, message in (
        ({}, "pass `num_beams=`"),
        ({"do_sample": True, "num_beams": 4}, "leave `do_sample` out"),
        ({"num_beams": 2, "num_return_sequences": 3}, "2 beams give no more than 2 captions"),
        ({"num_beams": 2, "rerank": True}, "must be a CaptionReranker, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(pixel_values=pixels, **{"rerank": reranker, **settings})
    with pytest.raises(ValueError, match="compares captions with the image"):
        model.generate(input_ids=torch.tensor([[1, 2]]), num_beams=2, rerank=reranker)


def test_commands(captioner, tmp_path, images, capsys):
    model, processor = captioner
    folder = str(tmp_path / "captioner")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (tmp_path / "images").mkdir()
    for place, image in enumerate(images):
        image.save(tmp_path / "images" / f"{place}.png")
    arguments = ["caption", "--model", folder, "--device", "cpu", str(tmp_path / "images")]
    reranker = CaptionReranker.from_pretrained(model, processor, weight=3)
    for options, settings in (
        (["--rerank", "--rerank-weight", "3"], {"num_beams": 10, "rerank": reranker}),
        (["--rerank", "--rerank-weight", "3", "--beams", "4"], {"num_beams": 4, "rerank": reranker}),
        (["--text-tower", str(tmp_path / "clip"), "--rerank-weight", "3"], {"num_beams": 10, "rerank": reranker}),
    ):
        assert main([*arguments, *options]) == 0
        printed = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
        expected = caption_images(model, processor, images, progress=False, **settings)
        assert printed == [escape(one.captions[0]) for one in expected], options
    for options, message in (
        (["--rerank", "--beams", "1"], "give --beams of 2 or more"),
        (["--rerank-weight", "3"], "goes with --rerank"),
    ):
        assert main([*arguments, *options]) != 0
        assert message in capsys.readouterr().err, options
    for weight in ("nan", "-1"):
        with pytest.raises(SystemExit):
            main([*arguments, "--rerank", "--rerank-weight", weight])
        assert "--rerank-weight: must be at least 0" in capsys.readouterr().err


def test_evaluation_records_the_reranker(captioner, images, tmp_path):
    model, processor = captioner
    data = EvaluationSet(list(range(4)), [["a"]] * 4, images=images[:4], source="x")
    digests = set()
    for weight in (None, 0, 5):
        rerank = {} if weight is None else {"rerank": CaptionReranker.from_pretrained(model, processor, weight=weight)}
        captions, record = caption_benchmark(
            model, processor, "name", data, tmp_path / "out", progress=False, num_beams=BEAMS, **rerank
        )
        digests.add(record["settings_sha256"])
        json.dumps(record)
        if weight is not None:
            assert record["decoding"]["rerank"]["weight"] == weight
            assert len(record["decoding"]["rerank"]["text_tower_sha256"]) == 64
    assert len(digests) == 3, "stored captions of one setting would be taken for another's"
