"""Reading the prefix as vocabulary tokens."""

import json

import pytest
import torch
from clipcap_hf.cli import main


def test_nearest_tokens_are_those_of_a_plain_loop(make_model):
    model = make_model(None)
    embeds = torch.randn(3, 16)
    found = model.interpret_prefix(clip_embeds=embeds, k=4)
    assert found.token_ids.shape == found.cosines.shape == (3, 4, 4) and found.tokens is None
    prefix = model.get_image_features(clip_embeds=embeds, return_dict=True).pooler_output
    embedding = model.get_input_embeddings().weight
    for image in range(3):
        for position in range(4):
            cosines = torch.nn.functional.cosine_similarity(prefix[image, position], embedding)
            torch.testing.assert_close(found.cosines[image, position], cosines.topk(4).values)
            assert found.token_ids[image, position].tolist() == cosines.topk(4).indices.tolist()


def test_prefix_of_words_reads_as_these_words(make_model, embeds_processor):
    model = make_model(None)
    words = embeds_processor.tokenizer("a red heart")["input_ids"]
    prefix = model.get_input_embeddings().weight[words][None] * 3  # a vector's length does not matter
    found = model.interpret_prefix(prefix=prefix, k=2, tokenizer=embeds_processor)
    assert found.token_ids[0, :, 0].tolist() == words
    torch.testing.assert_close(found.cosines[0, :, 0], torch.ones(len(words)))
    assert "".join(nearest for nearest, _ in found.tokens[0]) == "a red heart"
    assert not found.cosines.requires_grad


def test_pixels_and_embeddings_read_alike_in_any_precision(make_model, processor, images):
    model = make_model()
    pixel_values = processor(images=images[:2], return_tensors="pt")["pixel_values"]
    found = model.interpret_prefix(pixel_values, k=3)
    same = model.interpret_prefix(clip_embeds=model.get_clip_embeds(pixel_values), k=3)
    torch.testing.assert_close(found.cosines, same.cosines)
    half = model.to(torch.bfloat16).interpret_prefix(pixel_values, k=3)
    assert half.cosines.dtype == torch.float32
    torch.testing.assert_close(half.cosines, found.cosines, rtol=0, atol=0.05)


def test_rows_that_no_token_uses(make_model):
    model = make_model(None)
    model.get_input_embeddings().weight.data[250:] = 0
    found = model.interpret_prefix(clip_embeds=torch.randn(1, 16), k=290)
    assert found.cosines.isfinite().all()
    assert (found.cosines[found.token_ids >= 250] == 0).all()


@pytest.mark.parametrize("k", [0, 291])
def test_impossible_k(make_model, k):
    with pytest.raises(ValueError, match="`k` must be between 1 and 290, the size of the vocabulary"):
        make_model(None).interpret_prefix(clip_embeds=torch.randn(1, 16), k=k)


def test_explain_on_the_command_line(model_folder, images, tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, path in zip(images, paths):
        image.save(path)

    def caption(*options):
        assert main(["caption", *paths, "--model", str(model_folder), "--device", "cpu", *options]) == 0
        return capsys.readouterr().out.splitlines()

    plain = caption("--beams", "2")
    explained = caption("--beams", "2", "--explain", "3")
    assert explained[::5] == plain and len(explained) == 3 * 5
    assert [line.split("\t")[0].strip() for line in explained[1:5]] == ["1", "2", "3", "4"]
    assert all(len(line.split("\t")) == 4 for line in explained[1:5])

    records = [json.loads(line) for line in caption("--beams", "2", "--explain", "--json")]
    assert [record["image"] for record in records] == paths
    prefixes = [record["prefix"] for record in records]
    assert all(len(prefix) == 4 and len(prefix[0]) == 1 for prefix in prefixes)
    assert prefixes[0] != prefixes[1]  # each image has its own
    shown = explained[1].split("\t")[1].rsplit(" ", 1)
    assert shown[0] == repr(prefixes[0][0][0]["token"])
    assert float(shown[1]) == pytest.approx(prefixes[0][0][0]["cosine"], abs=1e-3)
