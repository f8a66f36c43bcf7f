import datasets
import pytest
from clipcap_hf.data import to_caption_form, unusable_captions
from PIL import Image


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    features = datasets.Features(
        {"picture": datasets.Image(), "text": datasets.Value("string"), "captions": datasets.Value("string")}
    )
    row = {"picture": str(tmp_path / "a.png"), "text": "a red square", "captions": "another column"}
    return datasets.Dataset.from_list([row], features=features)


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_are_brought_to_one_form(data, streamed):
    data = data.to_iterable_dataset() if streamed else data
    found = to_caption_form({"train": data}, image="picture", captions="text")["train"]
    assert found.features == {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    row = next(iter(found))
    assert row["captions"] == ["a red square"]
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)


def test_data_in_the_form_is_given_back_as_it_is(data):
    form = to_caption_form(data, image="picture", captions="text")
    assert to_caption_form(form) is form
    embeds = datasets.Dataset.from_dict({"vectors": [[1.0]], "captions": [["a"]]})
    assert to_caption_form(embeds, clip_embeds="vectors").column_names == ["clip_embeds", "captions"]


def test_unusable_captions_are_named(tokenizer):
    long = "a dog " * 50
    captions = [["a dog"], ["a cat", "an <image> of"], [], [long]]
    data = datasets.Dataset.from_dict({"captions": captions, "image_id": [7, 8, 9, 10]})
    length = len(tokenizer(long, add_special_tokens=False)["input_ids"])
    placeholder, too_long = unusable_captions(data, tokenizer, length - 1)
    assert placeholder == "row 1 (image 8): the caption holds '<image>': 'an <image> of'"
    assert too_long.startswith(f"row 3 (image 10): the caption has {length} tokens, more than {length - 1}: 'a dog")
    assert unusable_captions(data.select([0, 3]), tokenizer, length) == []
    assert unusable_captions(data.select([3]).remove_columns("image_id"), tokenizer, None) == []
