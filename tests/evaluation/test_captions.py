"""Stored captions are reused only if everything that they depend on is unchanged."""

import numpy as np
import pytest
from clipcap_hf import ClipCapProcessor
from clipcap_hf.evaluation import EvaluationSet, caption_benchmark
from clipcap_hf.evaluation import captions as captioning
from PIL import Image


@pytest.fixture
def files(tmp_path, images):
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{place}.png" for place in range(6)]
    for path, image in zip(paths, images):
        image.save(path)
    return [str(path) for path in paths]


@pytest.fixture
def captioned(monkeypatch):
    """Record the number of images that each call captions."""
    counts = []
    original = captioning.caption_images

    def counting(model, processor, images, **kwargs):
        counts.append(len(images))
        return original(model, processor, images, **kwargs)

    monkeypatch.setattr(captioning, "caption_images", counting)
    return counts


def data_of(images):
    return EvaluationSet(list(range(len(images))), [["a"]] * len(images), images=images, source="x")


def run(model, processor, images, folder, **kwargs):
    return caption_benchmark(model, processor, "name", data_of(images), folder / "out", progress=False, **kwargs)


def test_the_same_settings_go_on_even_with_a_new_process_and_name(make_model, processor, files, tmp_path, captioned):
    first, record = run(make_model(), processor, files, tmp_path)
    processor.tokenizer(["some text", "more"], padding=True)  # a call changes no setting
    again, same = caption_benchmark(
        make_model(), processor, "moved", data_of(files), tmp_path / "out", progress=False, batch_size=2
    )
    assert captioned == [6, 0] and again == first and same["settings_sha256"] == record["settings_sha256"]


def other_transform(processor, make_tokenizer):
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return processor


def other_crop(processor, make_tokenizer):
    processor.image_processor.do_center_crop = False
    processor.image_processor.size = {"height": 32, "width": 32}
    return processor


def other_tokenizer(processor, make_tokenizer):
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return ClipCapProcessor(processor.image_processor, tokenizer, prefix_length=4)


def other_decoder(processor, make_tokenizer):
    from tokenizers import decoders

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    return ClipCapProcessor(processor.image_processor, tokenizer, prefix_length=4)


def other_template(processor, make_tokenizer):
    return ClipCapProcessor(
        processor.image_processor, make_tokenizer(), prefix_length=4, prompt_template="<image>a photo of"
    )


@pytest.mark.parametrize("change", [other_transform, other_crop, other_tokenizer, other_decoder, other_template])
def test_another_processor_is_another_key(change, make_model, processor, make_tokenizer, files, tmp_path, captioned):
    _, first = run(make_model(), processor, files, tmp_path)
    _, second = run(make_model(), change(processor, make_tokenizer), files, tmp_path)
    assert captioned == [6, 6] and first["settings_sha256"] != second["settings_sha256"]
    assert first["processor"] != second["processor"]


def test_another_configuration_is_another_key(make_model, processor, files, tmp_path, captioned):
    """Both have the same weights but different captions."""
    first, record = run(make_model(), processor, files, tmp_path)
    second, other = run(make_model(normalize_clip_embeds=True), processor, files, tmp_path)
    assert record["model"]["weights_sha256"] == other["model"]["weights_sha256"]
    assert captioned == [6, 6] and first != second
    run(make_model(), processor, files, tmp_path, num_beams=2)
    run(make_model(), processor, files, tmp_path, prompt="a")
    model = make_model()
    model.generation_config.repetition_penalty = 1.5
    run(model, processor, files, tmp_path)
    assert captioned == [6, 6, 6, 6, 6]


def test_an_image_that_was_replaced_is_captioned_again(make_model, processor, files, images, tmp_path, captioned):
    first, record = run(make_model(), processor, files, tmp_path)
    images[7].save(files[2])
    second, other = run(make_model(), processor, files, tmp_path)
    assert captioned == [6, 1] and record["images_sha256"] != other["images_sha256"]
    fresh, _ = run(make_model(), processor, files, tmp_path / "fresh")
    assert second == fresh and second[2] != first[2]


def test_images_in_memory_and_in_data_sets_have_digests_too(make_model, processor, files, images, tmp_path, captioned):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = Dataset.from_dict({"image": files}, features=Features({"image": ImageFeature()}))
    decoded = []
    monkeypatched = ImageFeature.decode_example
    try:
        ImageFeature.decode_example = lambda self, *a, **k: decoded.append(1) or monkeypatched(self, *a, **k)
        of_rows = data_of(rows["image"]).image_digests
    finally:
        ImageFeature.decode_example = monkeypatched
    assert of_rows == data_of(files).image_digests and len(set(of_rows)) == 6
    assert decoded == []  # digests are of files
    pictures = [Image.open(file).convert("RGB") for file in files]
    run(make_model(), processor, pictures, tmp_path)
    changed = np.array(pictures[0])
    changed[0, 0] ^= 255
    run(make_model(), processor, [Image.fromarray(changed), *pictures[1:]], tmp_path)
    assert captioned == [6, 1]
    taken = data_of(pictures).take([3, 1])
    assert taken.image_digests == [data_of(pictures).image_digests[place] for place in (3, 1)]
