"""Videos: several frames in, one caption out."""

import numpy as np
import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.model.modeling_xclip import XCLIPVideoModel
from clipcap_hf.model.video_frames import list_videos, middle_frames, read_frames
from transformers import (
    CLIPImageProcessorPil,
    GPT2LMHeadModel,
    VideoMAEImageProcessorPil,
    XCLIPConfig,
    XCLIPModel,
    pipeline,
)


@pytest.fixture
def videos(images):
    """Two videos of different length and size."""
    return [images[:5], [image.resize((40, 36)) for image in images[2:]]]


@pytest.fixture
def xclip_folder(tmp_path):
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    mit = {f"mit_{name}": value for name, value in layers.items()} | {"mit_hidden_size": 16}
    vision = {**layers, **mit, "image_size": 32, "patch_size": 8, "num_frames": 4}
    config = XCLIPConfig(vision_config=vision, text_config={**layers, "vocab_size": 9}, projection_dim=16)
    XCLIPModel(config).save_pretrained(tmp_path / "xclip")
    VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "xclip"
    )
    return str(tmp_path / "xclip")


@pytest.fixture
def text_folder(tmp_path, text_config, tokenizer):
    GPT2LMHeadModel(text_config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


def read_evenly(video, num_frames):
    return read_frames(video, lambda metadata: middle_frames(metadata.total_num_frames, num_frames))[0]


def test_frames_are_spread_evenly():
    video = np.arange(10)[:, None, None, None] * np.ones((10, 4, 4, 3))
    assert [frame[0, 0, 0] for frame in read_evenly(video, 5)] == [1, 3, 5, 7, 9]
    assert [frame[0, 0, 0] for frame in read_evenly(video, 1)] == [5]
    assert [frame[0, 0, 0] for frame in read_evenly(video[:2], 4)] == [0, 0, 1, 1]
    assert [frame[0, 0, 0] for frame in read_evenly(video, 10)] == list(range(10))
    with pytest.raises(ValueError, match="no frames"):
        read_evenly([], 4)


def test_one_video_or_several(images):
    array = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    for one in (images, array, torch.tensor(array), list(array), "film.mp4"):
        assert len(list_videos(one)) == 1
    for two in ([images, images], np.stack([array, array]), [array, array], ["a.mp4", "b.mp4"]):
        assert len(list_videos(two)) == 2
    with pytest.raises(ValueError, match=r"\(frames, height, width, 3\), several are 5-D; got the shape \(8, 8, 3\)"):
        list_videos(array[0])


def test_animations(tmp_path, images):
    frames = [image.resize((32, 32)) for image in images[:4]]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    read = read_evenly(tmp_path / "a.webp", 4)
    assert all(np.array_equal(np.asarray(a.convert("RGB")), np.asarray(b)) for a, b in zip(read, frames))
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises((ValueError, ImportError), match="bad.mp4"):
        read_evenly(tmp_path / "bad.mp4", 4)
    with pytest.raises(ValueError, match="none.mp4: no such file"):
        read_evenly(tmp_path / "none.mp4", 4)


def test_video_files(tmp_path, images):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for image in images:
            picture = av.VideoFrame.from_image(image.resize((64, 64)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    frames = read_evenly(tmp_path / "film.mp4", 4)
    assert len(frames) == 4
    for frame, image in zip(frames, images[1::2]):
        assert np.abs(np.asarray(image.resize((64, 64))).astype(int) - frame).mean() < 12


def test_pixels_of_videos(processor, videos):
    inputs = processor(videos=videos, num_frames=3, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 3, 32, 32)
    assert inputs["input_ids"].shape == (2, 4)
    expected = processor(images=[videos[0][0], videos[0][2], videos[0][4]], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][0], expected)
    assert processor(videos=videos[0], return_tensors="pt")["pixel_values"].shape == (1, 8, 3, 32, 32)
    array = np.stack([np.asarray(image) for image in videos[1]])
    inputs = [processor(videos=video, return_tensors="pt")["pixel_values"] for video in (videos[1], array)]
    assert torch.equal(*inputs)
    with pytest.raises(ValueError, match="either `images` or `videos`, not both"):
        processor(images=videos[0], videos=videos)


def test_number_of_frames_is_saved(tmp_path, processor, videos):
    processor.num_frames = 3
    processor.save_pretrained(tmp_path)
    again = ClipCapProcessor.from_pretrained(tmp_path)
    assert again(videos=videos, return_tensors="pt")["pixel_values"].shape[1] == 3


@pytest.mark.parametrize("vision", ["clip", "vit", "resnet"])
@torch.no_grad()
def test_frames_of_an_image_tower_are_averaged(make_model, processor, videos, vision):
    model = make_model(vision)
    inputs = processor(videos=videos, num_frames=3, return_tensors="pt")
    embeds = model.get_clip_embeds(inputs["pixel_values"])
    frames = torch.stack([model.get_clip_embeds(pixels).mean(0) for pixels in inputs["pixel_values"]])
    torch.testing.assert_close(embeds, frames)
    captions = model.generate(**inputs, num_beams=2)
    assert captions.shape[0] == 2
    assert torch.equal(captions, model.generate(clip_embeds=embeds, num_beams=2))
    # A still video gives the embedding of its image.
    still = processor(videos=[[videos[0][0]]], return_tensors="pt")["pixel_values"]
    image = processor(images=videos[0][0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.get_clip_embeds(still), model.get_clip_embeds(image))


@torch.no_grad()
def test_patches_of_videos(make_model, processor, videos):
    model = make_model(vision_feature="patches", mapping_type="transformer", clip_length=4)
    pixels = processor(videos=videos, num_frames=3, return_tensors="pt")["pixel_values"]
    expected = torch.stack([model.get_clip_embeds(frames).mean(0) for frames in pixels])
    torch.testing.assert_close(model.get_clip_embeds(pixels), expected)
    assert model.generate(pixel_values=pixels).shape[0] == 2


@torch.no_grad()
def test_xclip(tmp_path, xclip_folder, text_folder, videos):
    donor = XCLIPModel.from_pretrained(xclip_folder).eval()
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(xclip_folder, text_folder).eval()
    assert type(model.vision_tower) is XCLIPVideoModel and model.config.clip_embed_dim == 16
    processor = ClipCapProcessor.from_vision_text_pretrained(xclip_folder, text_folder)
    assert processor.num_frames == 4
    inputs = processor(videos=videos, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 4, 3, 32, 32)
    frames = [videos[0][index] for index in (0, 1, 3, 4)]
    reference = processor.image_processor([frames], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:1], reference)

    embeds = model.get_clip_embeds(inputs["pixel_values"])
    torch.testing.assert_close(embeds, donor.get_video_features(inputs["pixel_values"]).pooler_output)
    # The order of the frames matters, unlike for an average.
    assert not torch.allclose(model.get_clip_embeds(inputs["pixel_values"].flip(1)), embeds)
    captions = model.generate(**inputs, max_new_tokens=5)
    model.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    torch.testing.assert_close(again.get_clip_embeds(inputs["pixel_values"]), embeds)
    inputs = ClipCapProcessor.from_pretrained(tmp_path / "captioner")(videos=videos, return_tensors="pt")
    assert torch.equal(again.generate(**inputs, max_new_tokens=5), captions)

    for shape in ((2, 3, 32, 32), (2, 5, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"X-CLIP takes videos of 4 frames.*`num_frames=4` to the processor"):
            model.generate(pixel_values=torch.randn(shape))


def test_processor_of_clip_for_xclip(tmp_path, xclip_folder, text_folder, videos):
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        xclip_folder
    )
    processor = ClipCapProcessor.from_vision_text_pretrained(xclip_folder, text_folder)
    assert processor(videos=videos, return_tensors="pt")["pixel_values"].shape == (2, 4, 3, 32, 32)


def test_pipeline(tmp_path, model_folder, processor, videos):
    captioner = pipeline("image-captioning", model=str(model_folder))
    inputs = processor(videos=videos, return_tensors="pt")
    expected = processor.batch_decode(captioner.model.generate(**inputs), skip_special_tokens=True)
    for batch_size in (1, 2):
        outputs = captioner([{"video": video} for video in videos], batch_size=batch_size)
        assert [records[0]["generated_text"] for records in outputs] == [text.strip() for text in expected]
    assert captioner({"video": videos[0]}) == outputs[0]
    frames = [image.resize((32, 32)) for image in videos[0]]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert captioner({"video": str(tmp_path / "a.webp")}) == captioner({"video": frames})


def test_collator(make_model, processor, videos, captions):
    rows = [{"video": video, "captions": caption} for video, caption in zip(videos, captions)]
    batch = CaptioningCollator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 8, 3, 32, 32)
    loss = make_model()(**batch).loss
    loss.backward()
    assert loss.isfinite()


def test_neither_image_nor_video(make_model):
    with pytest.raises(ValueError, match=r"images \(batch, 3, height, width\) or videos.*got the shape \(3, 32, 32\)"):
        make_model().get_clip_embeds(torch.randn(3, 32, 32))
