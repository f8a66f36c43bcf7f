import datasets
import pytest
from clipcap_hf.data import to_caption_form
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
