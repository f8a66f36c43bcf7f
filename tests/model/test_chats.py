"""Chats with images and videos."""

import base64

import pytest
import torch
from clipcap_hf import ClipCapProcessor


def chat(image, answer="red heart"):
    question = {"role": "user", "content": [image, {"type": "text", "text": "a "}]}
    answers = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []
    return [question, *answers]


TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def test_chats_with_images_of_every_kind(tmp_path, processor, images):
    images[0].save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    expected = processor(images=images[0], text="a red heart", return_tensors="pt")
    for block in (
        {"image": images[0]},
        {"path": str(tmp_path / "a.png")},
        {"base64": text},
        {"url": f"data:image/png;base64,{text}"},
    ):
        block = {"type": "image", **block}
        alone = processor.apply_chat_template(chat(block), **TENSORS)
        assert alone.keys() == expected.keys()
        assert all(torch.equal(alone[name], expected[name]) for name in expected)
        batch = processor.apply_chat_template([chat(block), chat(block, answer=None)], **TENSORS)
        assert batch["input_ids"].shape[0] == 2 and torch.equal(*batch["pixel_values"])
        assert (batch["attention_mask"][1] == 0).any(), "the shorter chat is padded"


def test_several_images_in_a_chat(processor, images):
    blocks = [{"type": "image", "image": image} for image in images[:3]]
    content = [*blocks[:2], {"type": "text", "text": "a red"}, blocks[2], {"type": "text", "text": "heart"}]
    message = {"role": "user", "content": content}
    text = "<image><image>a red<image>heart"
    expected = processor(images=images[:3], text=[text], return_tensors="pt")
    assert expected["input_ids"].shape[0] == 1 and expected["pixel_values"].shape[0] == 3
    alone = processor(images=images[:3], text=text, return_tensors="pt")
    for found in (alone, *(processor.apply_chat_template(chats, **TENSORS) for chats in ([message], [[message]]))):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="2 images need as many <image> placeholders.*found 3 in 1 texts"):
        processor(images=images[:2], text=text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_mark_what_the_assistant_said(processor, images, side):
    processor.tokenizer.padding_side = side
    chats = [chat({"type": "image", "image": image}, answer) for image, answer in zip(images, ("red heart", "dog"))]
    inputs = processor.apply_chat_template(chats, return_assistant_tokens_mask=True, **TENSORS)
    for ids, mask, answer in zip(inputs["input_ids"], inputs["assistant_masks"], ("red heart", "dog")):
        assert processor.tokenizer.decode(ids[mask.bool()]).strip() == answer


def test_a_chat_about_a_video(processor, images):
    block = {"type": "video", "video": images[:5]}
    inputs = processor.apply_chat_template(chat(block), processor_kwargs={"num_frames": 3}, **TENSORS)
    expected = processor(videos=[images[:5]], num_frames=3, text="a red heart", return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in ("input_ids", "pixel_values"))


def test_default_chat_template(tmp_path, image_processor, make_tokenizer, images):
    template = 'Question: <image> "Answer": '
    processor = ClipCapProcessor(image_processor, make_tokenizer(), prefix_length=3, prompt_template=template)
    processor.save_pretrained(tmp_path)
    again = ClipCapProcessor.from_pretrained(tmp_path)
    found = again.apply_chat_template(chat({"type": "image", "image": images[0]}), **TENSORS)
    expected = processor(images=images[0], text="a red heart", return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert again.apply_chat_template([{"role": "user", "content": "a red"}]) == "a red"
    own = ClipCapProcessor(image_processor, make_tokenizer(), chat_template="{{ messages[0]['content'] }}!")
    assert own.apply_chat_template([{"role": "user", "content": "a red"}]) == "a red!"
