import base64
import functools
import http.server
import importlib.util
import threading

import numpy as np
import pytest
import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor, ImageCaptioningPipeline, official_beam_search
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset


@pytest.fixture
def captioner(model_folder):
    return pipeline("image-captioning", model=str(model_folder))


def texts(outputs):
    return [[record["generated_text"] for record in records] for records in outputs]


def expected_captions(captioner, images, **kwargs):
    """Caption with the model and the processor, without the pipeline."""
    inputs = captioner.processor(images=images, return_tensors="pt")
    ids = captioner.model.generate(**inputs, **kwargs)
    return [text.strip() for text in captioner.processor.batch_decode(ids, skip_special_tokens=True)]


def test_folder_becomes_a_captioner(captioner):
    assert type(captioner) is ImageCaptioningPipeline
    assert type(captioner.model) is ClipCapForConditionalGeneration
    assert type(captioner.processor) is ClipCapProcessor


def test_one_image(captioner, images):
    outputs = captioner(images[0])
    assert outputs == [{"generated_text": expected_captions(captioner, images[0])[0]}]
    assert outputs[0]["generated_text"]


def test_every_kind_of_input(tmp_path, captioner, images):
    expected = [[text] for text in expected_captions(captioner, images[:3])]
    assert len({text for (text,) in expected}) > 1
    for i, image in enumerate(images[:3]):
        image.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    dataset = Dataset.from_dict({"image": paths, "id": [0, 1, 2]}).cast_column("image", Image())

    assert texts(captioner(images[:3])) == expected
    assert texts(captioner(paths)) == expected
    assert texts([captioner(path) for path in paths]) == expected
    assert texts(captioner(KeyDataset(dataset, "image"))) == expected
    assert texts(captioner(image for image in images[:3])) == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_columns_data_sets_and_rows(tmp_path, captioner, images, batch_size):
    for i, image in enumerate(images[:3]):
        image.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    data = [open(path, "rb").read() for path in paths]
    dataset = Dataset.from_dict({"image": paths, "id": [0, 1, 2]}).cast_column("image", Image())
    undecoded = dataset.cast_column("image", Image(decode=False))
    same_size = [image.resize((32, 32)) for image in images[:3]]
    expected = texts(captioner(images[:3]))
    for given in (
        dataset["image"],
        dataset,
        undecoded["image"],
        undecoded,
        list(undecoded["image"]),
        [dataset[i] for i in range(3)],
        [{"bytes": one, "path": None} for one in data],
        data,
        [base64.b64encode(one).decode() for one in data],
        tuple(images[:3]),
        [[image] for image in images[:3]],
    ):
        outputs = captioner(given, batch_size=batch_size)
        assert isinstance(outputs, list) and texts(outputs) == expected
    assert texts(captioner(dataset.to_iterable_dataset(), batch_size=batch_size)) == expected
    arrays = np.stack([np.asarray(image) for image in same_size])
    assert captioner(arrays, batch_size=batch_size) == captioner(same_size)
    assert captioner([], batch_size=batch_size) == [] == captioner(dataset.select([])["image"])


def test_one_image_in_other_containers(tmp_path, captioner, images):
    grey = images[0].convert("L")
    images[0].save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for given in (data, base64.b64encode(data).decode(), {"bytes": data, "path": None}, tmp_path / "a.png"):
        assert captioner(given) == captioner(images[0])
    assert captioner(np.asarray(grey)) == captioner(torch.tensor(np.asarray(grey))) == captioner(grey)
    assert captioner(np.asarray(images[0]) / 255) == captioner(images[0])


def test_inputs_that_are_refused_in_a_line(captioner, images):
    for given, says in (
        (3, "int: neither an image nor a collection of images"),
        ([3], "int: not an image"),
        ([{"picture": images[0]}], "needs a column `image`, but this one has picture"),
        ([[images[0], images[1]]], "Expected one image or video, got 2"),
        ([b"\0" * 200_000], "the bytes: not a readable image"),
        (["x" * 200_000], "no such file"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            captioner(given)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_change_nothing(captioner, images, batch_size):
    alone = captioner(images[:5], return_scores=True, prompt="a")
    batched = captioner(images[:5], return_scores=True, prompt="a", batch_size=batch_size)
    assert texts(batched) == texts(alone)
    for record, other in zip(sum(alone, []), sum(batched, [])):
        assert record["score"] == pytest.approx(other["score"], abs=1e-5)


def test_several_captions_an_image(captioner, images):
    outputs = captioner(images[:2], num_beams=4, num_return_sequences=3, return_scores=True, batch_size=2)
    assert [len(records) for records in outputs] == [3, 3]
    for records in outputs:
        scores = [record["score"] for record in records]
        assert scores == sorted(scores, reverse=True)
    torch.manual_seed(0)
    assert len(captioner(images[0], do_sample=True, num_return_sequences=4)) == 4


def mean_logprob(model, input_ids, pixel_values, prompt_length, eos_token_id):
    """Score a greedy caption with a separate forward pass over all of it."""
    logprobs = model(input_ids=input_ids[None], pixel_values=pixel_values).logits[0].log_softmax(-1)
    taken = []
    for place in range(prompt_length, len(input_ids)):
        taken.append(logprobs[place - 1, input_ids[place]].item())
        if input_ids[place] == eos_token_id:
            break
    return sum(taken) / len(taken)


@pytest.mark.parametrize("pad_token_id", [0, 1], ids=["pad is eos", "pad is not eos"])
@pytest.mark.parametrize("prompt", [None, "a red"])
def test_scores_are_mean_log_probabilities(captioner, images, prompt, pad_token_id):
    model = captioner.model
    inputs = captioner.processor(images=images[:4], text=prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, eos_token_id=None)
    # With this end token, captions differ in length.
    eos = int(free[0, length + 2])
    settings = {"eos_token_id": eos, "pad_token_id": pad_token_id}
    sequences = model.generate(**inputs, **settings)
    expected = [
        mean_logprob(model, row, pixels[None], length, eos) for row, pixels in zip(sequences, inputs["pixel_values"])
    ]
    outputs = captioner(images[:4], prompt=prompt, return_scores=True, batch_size=4, **settings)
    assert [records[0]["score"] for records in outputs] == pytest.approx(expected, abs=1e-4)


def test_scores_of_beams(captioner, images):
    model = captioner.model
    inputs = captioner.processor(images=images[0], return_tensors="pt")
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5}
    sequences = model.generate(**inputs, **settings)
    expected = [mean_logprob(model, row, inputs["pixel_values"], 4, 0) for row in sequences]
    outputs = captioner(images[0], return_scores=True, **settings)
    assert [record["score"] for record in outputs] == pytest.approx(expected, abs=1e-4)
    settings["custom_generate"] = official_beam_search
    expected = [mean_logprob(model, row, inputs["pixel_values"], 4, 0) for row in model.generate(**inputs, **settings)]
    outputs = captioner(images[0], return_scores=True, **settings)
    assert [record["score"] for record in outputs] == pytest.approx(expected, abs=1e-4)


def test_prompt_is_part_of_the_caption(captioner, images):
    outputs = captioner(images[:2], prompt="a red")
    assert all(records[0]["generated_text"].startswith("a red") for records in outputs)


def test_max_new_tokens_at_the_start_and_at_the_call(model_folder, images):
    captioner = pipeline("image-captioning", model=str(model_folder), eos_token_id=None)
    short = pipeline("image-captioning", model=str(model_folder), max_new_tokens=3)
    expected = {
        length: expected_captions(captioner, images[0], eos_token_id=None, max_new_tokens=length)[0]
        for length in (2, 3, 5, 8)
    }
    assert len(set(expected.values())) == 4

    def text(captioner, **kwargs):
        return captioner(images[0], **kwargs)[0]["generated_text"]

    assert text(captioner) == expected[8]  # as the model's generation config says
    assert text(captioner, max_new_tokens=5) == expected[5]
    assert text(captioner, generate_kwargs={"max_new_tokens": 2}) == expected[2]
    assert text(short, eos_token_id=None) == expected[3]
    assert text(short, eos_token_id=None, max_new_tokens=5) == expected[5]
    assert text(short, eos_token_id=None) == expected[3]  # the call before left no trace


def test_save_pretrained_saves_the_processor(tmp_path, captioner, images):
    captioner.save_pretrained(tmp_path / "saved")
    again = pipeline("image-captioning", model=str(tmp_path / "saved"))
    assert again.processor.prefix_length == 4
    assert again(images[:2]) == captioner(images[:2])


def test_loaded_parts(make_model, processor, images):
    captioner = pipeline("image-captioning", model=make_model(), processor=processor)
    assert captioner(images[0])[0]["generated_text"]


def test_half_precision(model_folder, images):
    captioner = pipeline("image-captioning", model=str(model_folder), dtype=torch.bfloat16)
    assert captioner.model.dtype == torch.bfloat16
    assert captioner(images[:2], batch_size=2)


def test_bad_image_is_named(tmp_path, captioner):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=f"{tmp_path / 'a.png'}: not a readable image"):
        captioner(str(tmp_path / "a.png"))


def test_image_text_to_text_of_transformers(model_folder, captioner, images):
    stock = pipeline("image-text-to-text", model=str(model_folder))
    plain = stock({"images": images[0], "text": ""})
    assert plain[0]["generated_text"].strip() == captioner(images[0])[0]["generated_text"]
    prompted = stock(images[:2], text=["a red", "a"], max_new_tokens=4)
    expected = [captioner(image, prompt=text, max_new_tokens=4)[0] for image, text in zip(images, ["a red", "a"])]
    assert [record["generated_text"].strip() for record in prompted] == [
        record["generated_text"] for record in expected
    ]


def test_chats_by_url(tmp_path, model_folder, captioner, images, web):
    images[0].save(tmp_path / "a.png")
    stock = pipeline("image-text-to-text", model=str(model_folder))

    def chat(image):
        return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "a red"}]}]

    expected = captioner(images[0], prompt="a red", max_new_tokens=4)[0]["generated_text"].removeprefix("a red")
    for image in ({"url": f"{web}/a.png"}, {"path": str(tmp_path / "a.png")}, {"image": images[0]}):
        (answer,) = stock(text=chat(image), max_new_tokens=4, return_full_text=False)
        assert answer["generated_text"].strip() == expected.strip()
    both = stock(text=[chat({"url": f"{web}/a.png"})] * 2, max_new_tokens=4, return_full_text=False)
    assert [answer[0]["generated_text"].strip() for answer in both] == [expected.strip()] * 2


@pytest.fixture
def web(tmp_path):
    """Serve a folder's files on loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_urls_are_treated_like_files(tmp_path, captioner, web):
    # Transparency goes on white, whatever the source; transformers' own loader makes it black.
    see_through = PILImage.new("RGBA", (40, 40), (0, 0, 0, 0))
    see_through.paste((255, 0, 0, 255), (10, 10, 30, 30))
    see_through.save(tmp_path / "a.png")
    data_url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    places = [str(tmp_path / "a.png"), f"{web}/a.png", data_url]
    pixels = [captioner.processor(images=place, return_tensors="pt")["pixel_values"] for place in places]
    assert pixels[0].equal(pixels[1]) and pixels[0].equal(pixels[2])
    alone = captioner(places[0])
    assert captioner(places, batch_size=2) == [alone] * 3
    assert captioner(places[1]) == alone


def test_bad_urls_are_named(tmp_path, captioner, web):
    (tmp_path / "page.png").write_text("<!doctype html><html><body>no image</body></html>")
    with pytest.raises(ValueError, match="page.png: not a readable image"):
        captioner(f"{web}/page.png")
    with pytest.raises(ValueError, match="gone.png: could not be fetched .*404"):
        captioner(f"{web}/gone.png")
    with pytest.raises(ValueError, match="127.0.0.1:1/a.png: could not be fetched"):
        captioner("http://127.0.0.1:1/a.png")
    with pytest.raises(ValueError, match="data:image/png;base64,%%%: not a readable image"):
        captioner("data:image/png;base64,%%%")


@pytest.mark.parametrize(
    "text",
    ["<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "<!doctype html><p>no"],
    ids=["svg", "html"],
)
def test_no_pixels_behind_an_image_name(tmp_path, captioner, text):
    (tmp_path / "a.png").write_text(text)
    with pytest.raises(ValueError, match="a.png: not a readable image"):
        captioner(str(tmp_path / "a.png"))


def test_fifty_megapixels(tmp_path, captioner):
    PILImage.new("L", (8000, 6250), 128).save(tmp_path / "large.png", compress_level=1)
    assert captioner(str(tmp_path / "large.png")) == captioner(PILImage.new("L", (80, 62), 128))


def test_a_stream_is_read_as_it_is_captioned(captioner, images):
    taken = []

    def stream():
        for index in range(1000):
            taken.append(index)
            yield images[index % 8]

    outputs = iter(captioner(stream(), batch_size=2))
    first = [next(outputs) for _ in range(3)]
    assert texts(first) == texts([captioner(image) for image in images[:3]])
    assert len(taken) < 20


@pytest.mark.parametrize(
    "placement", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device": "cpu"}, {"device": -1}]
)
def test_devices(model_folder, captioner, images, placement):
    placed = pipeline("image-captioning", model=str(model_folder), **placement)
    assert placed(images[:2]) == captioner(images[:2])


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_quantised(model_folder, images, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(load_in_8bit=True)
    kwargs = {"quantization_config": settings}
    quantised = pipeline("image-captioning", model=str(model_folder), model_kwargs=kwargs, device_map="cpu")
    layers = [
        module for module in quantised.model.mapping_network.modules() if "weight" in dict(module.named_parameters())
    ]
    assert any(
        "8bit" in type(layer).__name__ or type(layer.weight).__name__ not in ("Parameter", "Tensor")
        for layer in layers
    )
    plain = pipeline("image-captioning", model=str(model_folder))
    inputs = plain.processor(images=images, return_tensors="pt")
    prefix = [one.model.get_image_features(inputs["pixel_values"]).pooler_output.float() for one in (plain, quantised)]
    assert torch.cosine_similarity(*prefix, dim=-1).min() > 0.99
    assert len(quantised(images[:2], batch_size=2)) == 2
