"""The video processor: as many frames as asked for, with the pixels of images."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
import torch
from clipcap_hf import EMOJI_MINI, ClipCapProcessor, ClipCapVideoProcessor, OpenClipImageProcessor, add_code
from hub_client import WITHOUT_PACKAGE, run_client
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoVideoProcessor,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    VideoMAEImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.video_utils import VideoMetadata


IMAGE_PROCESSORS = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "clip-torchvision": lambda: CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 48}, crop_pct=0.7),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "vit": lambda: ViTImageProcessorPil(size={"height": 40, "width": 32}, image_mean=[0.1, 0.2, 0.3]),
    "videomae": lambda: VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "open_clip": lambda: OpenClipImageProcessor(
        size={"height": 32, "width": 32}, resize_mode="longest", fill_color=90, do_normalize=False
    ),
}


def film(frames, seed=0, width=70, height=50):
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8), "RGB") for _ in range(frames)
    ]


def pixels_of_images(processor, frames, **kwargs):
    pixels = processor(images=frames, return_tensors="pt", **kwargs)["pixel_values"]
    return pixels.reshape(len(frames), *pixels.shape[-3:])  # VideoMAE's takes pictures for one video


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_frames_have_the_pixels_of_images(tmp_path, tokenizer, kind):
    processor = ClipCapProcessor(IMAGE_PROCESSORS[kind](), tokenizer, prefix_length=4)
    video = film(4)
    for arguments in ({}, {"do_normalize": True}, {"size": 40}, {"image_std": [0.1, 0.2, 0.3], "do_normalize": True}):
        found = processor(videos=video, num_frames=4, return_tensors="pt", **arguments)["pixel_values"]
        assert torch.equal(found[0], pixels_of_images(processor, video, **arguments)), arguments
    processor.save_pretrained(tmp_path / "processor")
    again = ClipCapProcessor.from_pretrained(tmp_path / "processor")
    expected = pixels_of_images(again, video)
    again.video_processor.save_pretrained(tmp_path / "alone")
    for video_processor in (
        again.video_processor,
        AutoVideoProcessor.from_pretrained(tmp_path / "processor"),
        AutoVideoProcessor.from_pretrained(tmp_path / "alone"),
        ClipCapVideoProcessor.from_pretrained(tmp_path / "alone"),
        AutoProcessor.from_pretrained(tmp_path / "processor").video_processor,
    ):
        assert type(video_processor) is ClipCapVideoProcessor
        assert torch.equal(video_processor(video, num_frames=4, return_tensors="pt")["pixel_values"][0], expected)
        assert video_processor.to_dict() == again.video_processor.to_dict()


def test_open_clips_own_arguments(tokenizer):
    processor = ClipCapProcessor(IMAGE_PROCESSORS["open_clip"](), tokenizer, prefix_length=4)
    video = film(2)
    expected = pixels_of_images(processor, video, resize_mode="squash")
    for arguments in ({"resize_mode": "squash"}, {"images_kwargs": {"resize_mode": "squash"}}):
        found = processor(videos=video, num_frames=2, return_tensors="pt", **arguments)["pixel_values"][0]
        assert torch.equal(found, expected) and not torch.equal(found, pixels_of_images(processor, video))


def test_what_is_set_on_the_video_processor_is_obeyed(processor):
    video = film(2)
    processor.video_processor.do_normalize = False
    found = processor(videos=video, num_frames=2, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, pixels_of_images(processor, video, do_normalize=False))
    assert pixels_of_images(processor, video).min() < 0, "images are normalised as before"


def test_saved_settings(tmp_path, processor):
    processor.num_frames = 3
    assert processor.video_processor.num_frames == 3
    processor.save_pretrained(tmp_path / "once")
    saved = json.loads((tmp_path / "once" / "processor_config.json").read_text())
    settings = saved["video_processor"]
    assert settings["video_processor_type"] == "ClipCapVideoProcessor" and settings["num_frames"] == 3
    assert "num_frames" not in saved and "image_processor_type" not in settings
    again = ClipCapProcessor.from_pretrained(tmp_path / "once")
    assert again.to_dict() == processor.to_dict() and again.num_frames == 3
    other = ClipCapProcessor.from_pretrained(tmp_path / "once", num_frames=5)
    assert other(videos=film(9), return_tensors="pt")["pixel_values"].shape[1] == 5


def test_what_earlier_versions_saved(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    del saved["video_processor"]
    file.write_text(json.dumps({**saved, "num_frames": 3}))
    again = ClipCapProcessor.from_pretrained(tmp_path)
    video = film(3)
    found = again(videos=video, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, pixels_of_images(processor, video))


def test_a_video_processor_of_its_own(tmp_path, image_processor, tokenizer):
    own = ClipCapVideoProcessor(IMAGE_PROCESSORS["siglip"](), num_frames=2)
    processor = ClipCapProcessor(image_processor, tokenizer, own)
    processor.save_pretrained(tmp_path)
    video = film(2)
    expected = own(video, return_tensors="pt")["pixel_values"]
    for one in (processor, ClipCapProcessor.from_pretrained(tmp_path)):
        assert torch.equal(one(videos=video, return_tensors="pt")["pixel_values"], expected)
        assert not torch.equal(expected[0], pixels_of_images(one, video))


def test_the_shipped_captioner():
    video = film(2)
    found = AutoVideoProcessor.from_pretrained(EMOJI_MINI)(video, num_frames=2, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, pixels_of_images(ClipCapProcessor.from_pretrained(EMOJI_MINI), video))


def test_an_image_processor_that_transformers_does_not_have():
    settings = {**ClipCapVideoProcessor().to_dict(), "towers_image_processor_type": "FutureImageProcessor"}
    with pytest.raises(ValueError, match="has no image processor FutureImageProcessor: update it, or pass"):
        ClipCapVideoProcessor(**settings)


def test_captioners_without_images(tmp_path, embeds_processor):
    embeds_processor.save_pretrained(tmp_path)
    again = ClipCapProcessor.from_pretrained(tmp_path)
    assert again.video_processor is None and again.num_frames is None
    with pytest.raises(ValueError, match="has no image processor"):
        again(videos=film(2))


# -- which frames


def test_number_of_frames():
    video_processor = ClipCapVideoProcessor(size=18, crop_size=18)

    def count(video=film(12), **kwargs):  # noqa: B008  (read only)
        return video_processor(video, return_tensors="pt", **kwargs)["pixel_values"].shape[1]

    metadata = [{"total_num_frames": 12, "fps": 4}]
    assert (count(), count(num_frames=3), count(do_sample_frames=False)) == (8, 3, 12)
    assert count(fps=2, video_metadata=metadata) == count(fps=2, video_metadata=[VideoMetadata(12, fps=4.0)]) == 6
    assert count(fps=0.001, video_metadata=metadata) == 1
    video_processor.fps = 2
    assert (count(video_metadata=metadata), count(num_frames=3)) == (6, 3)
    video_processor.do_sample_frames = False
    assert count() == 12
    with pytest.raises(ValueError, match=r"would have \[12, 5\] frames: pass `num_frames=`"):
        count([film(12), film(5)])


def test_refused_numbers_of_frames(processor):
    video = film(3)
    with pytest.raises(ValueError, match="`num_frames` and `fps` exclude each other"):
        processor(videos=video, num_frames=2, fps=1)
    with pytest.raises(ValueError, match="`fps` needs to know the frames in a second.*pass `num_frames`"):
        processor(videos=video, fps=1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="num_frames"):
            processor(videos=video, num_frames=wrong)
    with pytest.raises(ValueError, match="Pass at least one video"):
        processor(videos=[])
    with pytest.raises(ValueError, match="`num_frames` of a video must be a whole number above 0, got many"):
        ClipCapVideoProcessor(num_frames="many")
    with pytest.raises(ValueError, match="`image_std` must be positive numbers"):
        ClipCapVideoProcessor(image_std=[0.0, 1.0, 1.0])


def test_metadata_of_the_frames(processor):
    inputs = processor(videos=[film(10), film(4)], num_frames=2, return_metadata=True, return_tensors="pt")
    assert [one.frames_indices for one in inputs["video_metadata"]] == [[2, 7], [1, 3]]
    assert "video_metadata" not in processor(videos=film(4))


def test_frames_of_each_second_of_an_animation(tmp_path, processor):
    frames = film(8)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, duration=250)
    found = processor(videos=tmp_path / "a.webp", fps=2, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, pixels_of_images(processor, frames[1::2]))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx")])
def test_frames_of_each_second_of_a_film(tmp_path, processor, name, codec):
    """WebM and Matroska store no number of frames."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    greys = [20, 60, 100, 140, 180, 220]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for grey in greys:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), (grey,) * 3))))
        container.mux(stream.encode())
    for arguments in ({"num_frames": 3}, {"fps": 2}):
        found = processor(videos=str(tmp_path / name), do_normalize=False, return_tensors="pt", **arguments)
        values = found["pixel_values"][0].mean(dim=(1, 2, 3)) * 255
        assert values.tolist() == pytest.approx(greys[1::2], abs=8)


def test_videos_by_url(tmp_path, processor):
    frames = film(4)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "bad.webp").write_bytes(b"RIFF")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        found = processor(videos=f"{url}/a.webp", num_frames=4, return_tensors="pt")["pixel_values"][0]
        chat = [{"role": "user", "content": [{"type": "video", "url": f"{url}/a.webp"}]}]
        arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        answer = processor.apply_chat_template(chat, processor_kwargs={"num_frames": 4}, **arguments)
        for name, message in (("bad.webp", "not a readable"), ("none.webp", "could not be fetched")):
            with pytest.raises((ValueError, ImportError), match=f"{url}/{name}.*{message}"):
                processor(videos=f"{url}/{name}")
        server.shutdown()
    assert torch.equal(found, pixels_of_images(processor, frames))
    assert torch.equal(answer["pixel_values"][0], found)


def test_several_videos_in_a_chat(tmp_path, processor):
    """A list of paths in a list may be a chat's videos or one video's frames; the number of placeholders tells."""
    films = [film(4, seed) for seed in range(3)]
    paths = []
    for seed, frames in enumerate(films):
        paths.append(str(tmp_path / f"{seed}.webp"))
        frames[0].save(paths[-1], save_all=True, append_images=frames[1:], lossless=True)
    arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in films]
    expected = torch.stack([pixels_of_images(processor, frames) for frames in films])
    tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"num_frames": 4}}
    for form in (films, paths, arrays):
        blocks = [{"type": "video", "video": video} for video in form]
        for chats in ([blocks], [blocks[:1], blocks[1:]], [blocks[:2], blocks[2:]]):
            chats = [[{"role": "user", "content": content}] for content in chats]
            found = processor.apply_chat_template(chats, **tensors)
            assert torch.equal(found["pixel_values"], expected)
        alone = processor.apply_chat_template([{"role": "user", "content": blocks}], **tensors)
        assert torch.equal(alone["pixel_values"], expected)
    pictures = []
    for place, frame in enumerate(films[0]):
        pictures.append(str(tmp_path / f"{place}.png"))
        frame.save(pictures[-1])
    for videos in ([pictures], [[pictures]]):
        assert torch.equal(processor(videos=videos, num_frames=4, return_tensors="pt")["pixel_values"], expected[:1])


# -- elsewhere


REMOTE = """
from PIL import Image
from transformers import AutoProcessor, AutoVideoProcessor
folder = os.environ["FOLDER"]
video = [Image.new("RGB", (40, 32), color) for color in ("red", "green", "blue")]
for place in (folder, folder + "-again"):
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    alone = AutoVideoProcessor.from_pretrained(place, trust_remote_code=True)
    report[place] = [
        type(alone).__name__,
        type(alone).__module__.partition(".")[0],
        alone.num_frames,
        *(one(videos=video, return_tensors="pt")["pixel_values"].double().sum().item() for one in (alone, processor)),
    ]
    processor.save_pretrained(folder + "-again")
"""


def test_without_the_package(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "captioner")
    processor = ClipCapProcessor(IMAGE_PROCESSORS["open_clip"](), tokenizer, prefix_length=4, num_frames=2)
    processor.save_pretrained(tmp_path / "captioner")
    add_code(tmp_path / "captioner")
    video = [Image.new("RGB", (40, 32), color) for color in ("red", "green", "blue")]
    total = processor(videos=video, return_tensors="pt")["pixel_values"].double().sum().item()
    report = run_client(WITHOUT_PACKAGE + REMOTE, tmp_path / "home", FOLDER=str(tmp_path / "captioner"))
    assert len(report) == 2
    for found in report.values():
        assert found == ["ClipCapVideoProcessor", "transformers_modules", 2, *[pytest.approx(total)] * 2]


WITHOUT_TORCHVISION = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("torchvision") else find_spec(name, *args)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("torchvision is blocked")

sys.meta_path.insert(0, Block())
from clipcap_hf import ClipCapProcessor
from PIL import Image
processor = ClipCapProcessor.from_pretrained(os.environ["FOLDER"])
video = [Image.new("RGB", (40, 32), color) for color in ("red", "green", "blue")]
for name in ("images", "videos"):
    report[name] = processor(**{name: video}, num_frames=3, return_tensors="pt")["pixel_values"].double().sum().item()
assert "torchvision" not in sys.modules
"""


def test_without_torchvision(tmp_path, model_folder, processor):
    """Neither images nor videos need it, although the base class of video processors does for its own pixels."""
    report = run_client(WITHOUT_TORCHVISION, tmp_path / "home", FOLDER=str(model_folder))
    video = [Image.new("RGB", (40, 32), color) for color in ("red", "green", "blue")]
    expected = processor(images=video, return_tensors="pt")["pixel_values"].double().sum().item()
    assert report == {"images": pytest.approx(expected), "videos": pytest.approx(expected)}


def test_an_image_processor_that_is_set_later(make_tokenizer, tmp_path):
    processor = ClipCapProcessor(None, make_tokenizer())
    processor.image_processor = CLIPImageProcessorPil()
    processor.save_pretrained(tmp_path)
    video = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 3), dtype=np.uint8)
    expected = ClipCapProcessor.from_pretrained(tmp_path)(videos=[video], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(videos=[video], return_tensors="pt")["pixel_values"], expected)
