import struct
import zlib

import numpy as np
import pytest
import torch
from clipcap_hf import ClipCapProcessor
from clipcap_hf.model.processing_clipcap import load_image, to_rgb
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_colour(image, expected, tolerance=0):
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int).reshape(-1, 3) - np.asarray(expected))
    assert difference.max() <= tolerance, np.unique(np.asarray(image).reshape(-1, 3), axis=0)


# -- images of every mode


def test_transparency_becomes_white():
    assert_colour(to_rgb(Image.new("RGBA", (4, 3), (255, 0, 0, 0))), (255, 255, 255))
    assert_colour(to_rgb(Image.new("RGBA", (4, 3), (255, 0, 0, 255))), (255, 0, 0))
    assert_colour(to_rgb(Image.new("RGBA", (4, 3), (255, 0, 0, 51))), (255, 204, 204), 1)
    assert_colour(to_rgb(Image.new("LA", (4, 3), (10, 0))), (255, 255, 255))
    assert_colour(to_rgb(Image.new("LA", (4, 3), (10, 255))), (10, 10, 10))


def test_palettes(tmp_path):
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert_colour(to_rgb(palette), (10, 200, 30))
    palette.save(tmp_path / "opaque.png")
    assert_colour(load_image(tmp_path / "opaque.png"), (10, 200, 30))
    palette.save(tmp_path / "transparent.png", transparency=1)
    assert_colour(load_image(tmp_path / "transparent.png"), (255, 255, 255))
    palette.save(tmp_path / "transparent.gif", transparency=1)
    assert_colour(load_image(tmp_path / "transparent.gif"), (255, 255, 255))


def test_transparent_colour_of_an_rgb_png(tmp_path):
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert_colour(load_image(tmp_path / "key.png"), (255, 255, 255))


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert_colour(load_image(tmp_path / "red.jpg"), (255, 0, 0), 3)


def test_grey_and_bilevel():
    assert_colour(to_rgb(Image.new("L", (4, 3), 77)), (77, 77, 77))
    assert_colour(to_rgb(Image.new("1", (4, 3), 1)), (255, 255, 255))
    assert_colour(to_rgb(Image.new("1", (4, 3), 0)), (0, 0, 0))


@pytest.mark.parametrize("value", [0, 100, 25_700, 65_535])
def test_16_bit_grey(tmp_path, value):
    pixels = np.full((3, 4), value, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(pixels).save(tmp_path / "grey.tif")
    for name in ("grey.png", "grey.tif"):
        assert Image.open(tmp_path / name).mode.startswith("I;16")
        assert_colour(load_image(tmp_path / name), [round(value / 257)] * 3)


def test_32_bit_and_floating_point_grey():
    assert_colour(to_rgb(Image.fromarray(np.full((3, 4), 51_400, dtype=np.int32))), [200] * 3)
    assert_colour(to_rgb(Image.fromarray(np.full((3, 4), 200, dtype=np.int32))), [200] * 3)
    assert_colour(to_rgb(Image.fromarray(np.full((3, 4), 0.4, dtype=np.float32))), [102] * 3)
    assert_colour(to_rgb(Image.fromarray(np.full((3, 4), 102.0, dtype=np.float32))), [102] * 3)


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "LAB"])
def test_other_colour_spaces(mode):
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    if mode == "LAB":
        assert to_rgb(Image.new("LAB", (4, 3))).mode == "RGB"
    else:
        assert_colour(to_rgb(red.convert(mode)), (255, 0, 0), 2)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (32, 16), "white")
    image.paste("blue", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) == (0, 0, 255) and upright.getpixel((8, 28)) == (255, 255, 255)
    with Image.open(tmp_path / "turned.png") as opened:
        assert to_rgb(opened).size == (16, 32)


def test_processor_converts_before_resizing(processor):
    transparent = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    white = Image.new("RGB", (40, 40), "white")
    pixels = processor(images=[transparent, white], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])


# -- files that are not images


def png_of_huge_size(path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def bad_file(path, kind):
    if kind == "truncated":
        noise(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "text":
        path.write_text("This is no image.")
    elif kind == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>')
    elif kind == "empty":
        path.touch()
    elif kind == "bomb":
        png_of_huge_size(path)
    elif kind == "folder":
        path.mkdir()
    return path


BAD_FILES = {
    "truncated": "not a readable image .*truncated",
    "text": "not a readable image",
    "svg": "not a readable image",
    "empty": "the file is empty",
    "bomb": "refused, the image is too large",
    "folder": "a folder, not an image",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, processor, kind):
    path = bad_file(tmp_path / "picture.png", kind)
    for call in (load_image, lambda path: load_image(str(path)), lambda path: processor(images=str(path))):
        with pytest.raises(ValueError, match=rf"{path}: {BAD_FILES[kind]}"):
            call(path)
    noise(8, 8).save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=rf"{path}: {BAD_FILES[kind]}"):
        processor(images=[tmp_path / "good.png", path])


def test_truncated_jpeg(tmp_path):
    noise(64, 64).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{tmp_path / 'a.jpg'}: not a readable image"):
        load_image(tmp_path / "a.jpg")


def test_paths_and_pictures_may_be_mixed(tmp_path, processor):
    image = noise(40, 50)
    image.save(tmp_path / "a.png")
    alone = processor(images=image, return_tensors="pt")["pixel_values"]
    mixed = processor(images=[image, str(tmp_path / "a.png"), tmp_path / "a.png"], return_tensors="pt")["pixel_values"]
    assert all(torch.equal(pixels, alone[0]) for pixels in mixed)


# -- texts


def test_images_alone(processor, images):
    inputs = processor(images=images[:2], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[processor.image_token_id] * 4] * 2
    assert inputs["attention_mask"].tolist() == [[1] * 4] * 2
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["input_ids"].dtype == torch.long


def test_unequal_prompts_are_padded_on_the_left(processor, images):
    inputs = processor(images=images[:3], text=["a red", "", "woman running"], return_tensors="pt")
    words = [processor.tokenizer(text)["input_ids"] for text in ("a red", "", "woman running")]
    length = inputs["input_ids"].shape[1]
    assert length == 4 + max(map(len, words))
    for row, mask, ids in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), words):
        padding = length - 4 - len(ids)
        assert row[padding:] == [processor.image_token_id] * 4 + ids
        assert mask == [0] * padding + [1] * (length - padding)
        assert row[:padding] == [processor.tokenizer.pad_token_id] * padding


def test_one_prompt_serves_all_images(processor, images):
    inputs = processor(images=images[:2], text="a red", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == inputs["input_ids"][1].tolist()
    assert inputs["input_ids"].shape[0] == 2


def test_placeholder_may_be_written_out(processor, images):
    given = processor(images=images[0], text="<image>a red", return_tensors="pt")
    implied = processor(images=images[0], text="a red", return_tensors="pt")
    assert given["input_ids"].tolist() == implied["input_ids"].tolist()
    behind = processor(images=images[0], text="a red<image>", return_tensors="pt")["input_ids"][0].tolist()
    assert behind[-4:] == [processor.image_token_id] * 4


@pytest.mark.parametrize("text", [["a"], ["a", "b", "c"], ["<image>a", "b"], "<image><image><image>"], ids=str)
def test_numbers_of_images_and_texts_differ(processor, images, text):
    with pytest.raises(ValueError, match="2 images need as many <image> placeholders, one in each of 2 texts"):
        processor(images=images[:2], text=text)


@pytest.mark.parametrize("text", ["a\udcff", ["\ud83d"]])
def test_prompts_that_are_not_unicode(processor, images, text):
    with pytest.raises(ValueError, match="A prompt must be text in UTF-8, but one is '<image>"):
        processor(images=images[:1], text=text)


def test_text_alone(processor):
    inputs = processor(text=["a red heart", "x"], return_tensors="pt")
    assert processor.image_token_id not in inputs["input_ids"]
    assert "pixel_values" not in inputs
    with pytest.raises(ValueError, match="0 images need as many <image> placeholders"):
        processor(text="<image>a")


def test_nothing_and_too_much(processor, images):
    with pytest.raises(ValueError, match="Pass `images`, `videos`, `clip_embeds` or `text`"):
        processor()
    with pytest.raises(ValueError, match="either `images` or `clip_embeds`, not both"):
        processor(images=images[0], clip_embeds=torch.randn(1, 16))


def test_embeddings(processor, embeds_processor):
    embeds = torch.randn(2, 16)
    for which in (processor, embeds_processor):
        inputs = which(clip_embeds=embeds, text="a", return_tensors="pt")
        assert torch.equal(inputs["clip_embeds"], embeds) and "pixel_values" not in inputs
        assert (inputs["input_ids"][:, :4] == which.image_token_id).all() and inputs["input_ids"].shape[0] == 2
    assert torch.equal(processor(clip_embeds=embeds.tolist(), return_tensors="pt")["clip_embeds"], embeds)
    assert torch.equal(processor(clip_embeds=list(embeds), return_tensors="pt")["clip_embeds"], embeds)
    with pytest.raises(
        ValueError, match=r"`clip_embeds` must have the shape \(batch, clip_embed_dim\).*, got \(16,\)"
    ):
        processor(clip_embeds=torch.randn(16))
    with pytest.raises(ValueError, match="no image processor: pass `clip_embeds`"):
        embeds_processor(images=Image.new("RGB", (8, 8)))


def test_captions_are_decoded_without_placeholders(processor):
    ids = [processor.image_token_id] * 4 + processor.tokenizer("a red heart")["input_ids"] + [0, 0]
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["a red heart"]


# -- the tokenizer


def test_padding_token_is_set(make_tokenizer):
    assert ClipCapProcessor(None, make_tokenizer()).tokenizer.pad_token == "<|endoftext|>"
    assert ClipCapProcessor(None, make_tokenizer(pad_token="!")).tokenizer.pad_token == "!"
    unknown = make_tokenizer()
    unknown.pad_token = ""  # as in a damaged file: not in the vocabulary
    assert ClipCapProcessor(None, unknown).pad_token_id == 0
    with pytest.raises(ValueError, match="neither a padding nor an end token: set `tokenizer.pad_token`"):
        ClipCapProcessor(None, make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        ClipCapProcessor(None)


def test_placeholder_is_the_first_id_beyond_the_vocabulary(make_tokenizer):
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    processor = ClipCapProcessor(None, tokenizer)
    assert processor.image_token_id == vocabulary == len(processor.tokenizer) - 1
    # A second processor with the same tokenizer adds nothing.
    assert ClipCapProcessor(None, processor.tokenizer).image_token_id == vocabulary


def test_tokenizers_that_add_tokens_of_their_own(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    # As BERT's and some sentencepiece tokenizers do: begin and end.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer("a")["input_ids"][-1] == 0
    processor = ClipCapProcessor(None, tokenizer, prefix_length=2)
    ids = processor(text="a red", clip_embeds=torch.randn(1, 4))["input_ids"][0]
    assert ids == [processor.image_token_id] * 2 + tokenizer("a red", add_special_tokens=False)["input_ids"]
    wanted = processor(text="a red", clip_embeds=torch.randn(1, 4), add_special_tokens=True)["input_ids"][0]
    assert wanted == [0, *ids, 0]


# -- saving and loading


@pytest.mark.parametrize("padding_side", [None, "right"])
def test_round_trip(tmp_path, image_processor, make_tokenizer, images, padding_side):
    tokenizer = make_tokenizer(**({} if padding_side is None else {"padding_side": padding_side}))
    processor = ClipCapProcessor(image_processor, tokenizer, prefix_length=6)
    processor.save_pretrained(tmp_path)
    again = ClipCapProcessor.from_pretrained(tmp_path)
    assert (again.prefix_length, again.image_token_id) == (6, processor.image_token_id)
    assert type(again.image_processor) is CLIPImageProcessorPil
    assert again.image_processor.to_dict() == image_processor.to_dict()
    assert again.tokenizer.padding_side == processor.tokenizer.padding_side == "left"
    assert again.tokenizer.pad_token == "<|endoftext|>"
    assert len(again.tokenizer) == len(processor.tokenizer) == len(tokenizer) + 1
    batch = {"images": images[:3], "text": ["a red", "", "woman"], "return_tensors": "pt"}
    expected, found = processor(**batch), again(**batch)
    assert expected["attention_mask"][1, 0] == 0 and expected["attention_mask"][1, -1] == 1
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_auto_processor(model_folder):
    assert type(AutoProcessor.from_pretrained(model_folder)) is ClipCapProcessor
    assert "<image>" in AutoTokenizer.from_pretrained(model_folder).get_vocab()


def test_round_trip_without_an_image_processor(tmp_path, embeds_processor):
    embeds_processor.save_pretrained(tmp_path)
    again = ClipCapProcessor.from_pretrained(tmp_path)
    assert again.image_processor is None and again.prefix_length == 4
    assert again.model_input_names == ["input_ids", "attention_mask", "clip_embeds"]
    inputs = again(clip_embeds=torch.zeros(1, 16), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[embeds_processor.image_token_id] * 4]
    again.save_pretrained(tmp_path / "again")
    assert ClipCapProcessor.from_pretrained(tmp_path / "again").image_processor is None


def test_torchvision_backend_on_request(model_folder, images):
    default = ClipCapProcessor.from_pretrained(model_folder)
    other = ClipCapProcessor.from_pretrained(model_folder, backend="torchvision")
    assert type(other.image_processor).__name__ == "CLIPImageProcessor"
    assert type(default.image_processor).__name__ == "CLIPImageProcessorPil"
    pixels = [processor(images=images[3], return_tensors="pt")["pixel_values"] for processor in (default, other)]
    torch.testing.assert_close(*pixels, rtol=0, atol=3 / 255 / min(CLIPImageProcessorPil.image_std))


# -- from pretrained parts


def test_from_vision_text_pretrained(tmp_path, image_processor, make_tokenizer, images):
    image_processor.save_pretrained(tmp_path / "clip")
    make_tokenizer(padding_side="right").save_pretrained(tmp_path / "gpt2")
    names = str(tmp_path / "clip"), str(tmp_path / "gpt2")
    processor = ClipCapProcessor.from_vision_text_pretrained(*names, prefix_length=3)
    assert processor.prefix_length == 3
    assert type(processor.image_processor) is CLIPImageProcessorPil
    expected = image_processor(images[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=images[0], return_tensors="pt")["pixel_values"], expected)
    assert ClipCapProcessor.from_vision_text_pretrained(None, names[1]).image_processor is None


def test_from_a_language_model_without_a_tokenizer(tmp_path, text_config):
    text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no tokenizer"):
        ClipCapProcessor.from_vision_text_pretrained(None, str(tmp_path))


# -- what else transformers' processors return


def test_token_types_and_offsets(processor, images):
    inputs = processor(
        images=images[:2],
        text=["a red", "a"],
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == processor.image_token_id)
    ((offset,), _) = inputs["text_replacement_offsets"]
    assert (offset["type"], offset["span"], offset["new_span"]) == ("image", (0, 7), (0, 28))


def test_truncation_may_not_cut_placeholders(processor, images):
    with pytest.raises(ValueError, match="Truncation to 3 tokens would cut placeholders: each image takes 4 tokens"):
        processor(images=images[:2], text="a red heart", truncation=True, max_length=3)
    assert len(processor(images=images[0], text="a red heart", truncation=True, max_length=5)["input_ids"][0]) == 5


# -- decoding, as trainers and pipelines call it


def test_every_way_of_decoding_is_the_same(image_processor, make_tokenizer, images):
    processor = ClipCapProcessor(image_processor, make_tokenizer(), prefix_length=3, prompt_template="Q: <image> A:")
    ids = processor(images=images[:2], text=["a red heart", "a dog"], return_tensors="pt")["input_ids"]
    wanted = ["a red heart", "a dog"]
    for given in (ids, ids.numpy(), ids.tolist()):
        assert processor.batch_decode(given, skip_special_tokens=True) == wanted
        assert processor.decode(given, skip_special_tokens=True) == wanted
        assert processor.post_process_image_text_to_text(given) == wanted
        assert processor.decode(given[0], skip_special_tokens=True) == wanted[0]


def test_ignored_ids_decode_as_padding(processor):
    ids = np.array([[5, 6, -100, -100], [7, 8, 9, -100]])
    wanted = [processor.tokenizer.decode(row[row >= 0].tolist()) for row in ids]
    for given in (ids, torch.tensor(ids), ids.tolist()):
        assert processor.batch_decode(given, skip_special_tokens=True) == wanted


def test_the_tokenizer_that_is_passed_stays_as_it_was(make_tokenizer):
    tokenizer = make_tokenizer(padding_side="right")
    processor = ClipCapProcessor(None, tokenizer)
    assert "<image>" not in tokenizer.get_vocab() and tokenizer.padding_side == "right" and tokenizer.pad_token is None
    assert (processor.pad_token, processor.pad_token_id) == ("<|endoftext|>", 0)


def test_seq2seq_trainer_pads_captions_that_end_early(tmp_path, make_model, processor, images):
    from clipcap_hf import CaptioningCollator
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    rows = [{"image": image, "captions": ["a red heart" if place % 2 else "a"]} for place, image in enumerate(images)]
    decoded = []

    def compute_metrics(prediction):
        for ids in (prediction.predictions, prediction.label_ids):
            decoded.append(processor.batch_decode(ids, skip_special_tokens=True))
        assert (prediction.label_ids == -100).any()
        return {}

    model = make_model()
    model.generation_config.eos_token_id = list(range(0, 290, 3))  # captions of unequal length
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=3,
        remove_unused_columns=False,
        predict_with_generate=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Seq2SeqTrainer(
        model=model,
        args=arguments,
        eval_dataset=rows,
        data_collator=CaptioningCollator(processor),
        processing_class=processor,
        compute_metrics=compute_metrics,
    ).evaluate()
    predictions, labels = decoded
    assert len(predictions) == len(images) and labels == [row["captions"][0] for row in rows]
