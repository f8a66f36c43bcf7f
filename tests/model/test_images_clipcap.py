"""A picture gives the same pixels in every container; unreadable ones are named in a short line."""

import base64
import functools
import http.server
import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from clipcap_hf import EMOJI_MINI, PHOTO_MINI, ClipCapProcessor
from clipcap_hf.files import find_images
from clipcap_hf.model.images_clipcap import edge_that_is_enough, flat_list_of_images, load_image
from clipcap_hf.model.video_frames import read_frames
from PIL import Image


def noise(width=40, height=30, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# -- one picture, many containers


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_containers_of_one_picture(tmp_path, processor, channels):
    picture = noise(channels=channels)
    data = encoded(picture)
    (tmp_path / "a.png").write_bytes(data)
    array = np.asarray(picture)
    first = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    containers = {
        "path": str(tmp_path / "a.png"),
        "Path": tmp_path / "a.png",
        "PIL": picture,
        "bytes": data,
        "bytearray": bytearray(data),
        "file": io.BytesIO(data),
        "base64": base64.b64encode(data).decode(),
        "data URL": "data:image/png;base64," + base64.b64encode(data).decode(),
        "row": {"bytes": data, "path": None},
        "row with a path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "uint8": array,
        "channels first": first,
        "float64": array / 255,
        "float32": (array / 255).astype(np.float32),
        "uint16": array.astype(np.uint16) * 257,
        "int64": array.astype(np.int64),
        "tensor": torch.tensor(first),
        "float tensor": torch.tensor(first) / 255,
        "channels last tensor": torch.tensor(array),
    }
    expected = np.asarray(load_image(tmp_path / "a.png"))
    for name, container in containers.items():
        assert np.array_equal(np.asarray(load_image(container)), expected), name
    containers["file"].seek(0)
    pixels = processor(images=list(containers.values()), return_tensors="pt")["pixel_values"]
    assert all(torch.equal(one, pixels[0]) for one in pixels)


def test_the_dtype_decides_the_range():
    dark = np.full((4, 5, 3), 1)
    assert np.asarray(load_image(dark.astype(np.uint8))).max() == 1
    assert np.asarray(load_image(dark.astype(np.int64))).max() == 1
    assert np.asarray(load_image(dark.astype(np.float32))).min() == 255
    assert np.asarray(load_image(dark.astype(bool))).min() == 255
    assert np.asarray(load_image(np.full((4, 5), 25_700, np.uint16))).max() == 100
    assert np.asarray(load_image(np.full((4, 5, 3), 1.0005))).min() == 255, "a resized array is a hair above 1"
    assert np.asarray(load_image(torch.full((3, 4, 5), 0.4, dtype=torch.bfloat16))).max() == 102


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 5, 3), 200.0), r"float64 must lie in 0 to 1, these lie in 200 to 200 \(pass uint8"),
        (np.full((4, 5, 3), -0.5), "must lie in 0 to 1, these lie in -0.5"),
        (np.full((4, 5, 3), 300), "int64 must lie in 0 to 255, these lie in 300"),
        (np.full((4, 5, 3), np.nan), "NaN or infinite"),
        (torch.full((3, 4, 5), float("inf")), "NaN or infinite"),
        (np.zeros((9, 5, 6)), r"got the shape \(9, 5, 6\)"),
        (np.zeros(4), r"got the shape \(4,\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((1, 3000, 3), np.uint8), "too large or too narrow"),
        (np.zeros((4, 5, 3), complex), "integer or floating-point"),
        (Image.fromarray(np.full((4, 5), np.nan, np.float32)), "NaN or infinite"),
        (3, "int: not an image"),
        ({"bytes": None, "path": None}, "neither the bytes nor the path"),
    ],
)
def test_arrays_that_are_no_pictures(processor, array, says):
    with pytest.raises(ValueError, match=says):
        load_image(array)
    with pytest.raises(ValueError, match=says):
        processor(images=[array])


def test_nested_lists_and_batches_are_flat():
    batch = np.zeros((2, 4, 5, 3), np.uint8)
    assert len(flat_list_of_images(batch)) == 2
    assert flat_list_of_images([["a"], ["b", ["c"]]]) == ["a", "b", "c"]
    assert len(flat_list_of_images(batch[0])) == 1


# -- messages


@pytest.mark.parametrize(
    "image",
    [
        b"\0" * 300_000,
        base64.b64encode(b"\0" * 300_000).decode(),
        "data:image/png;base64," + "A" * 300_000,
        "x" * 300_000,
        "https://127.0.0.1:1/" + "x" * 300_000,
        {"bytes": b"\0" * 300_000, "path": "x" * 300_000},
    ],
    ids=["bytes", "base64", "data URL", "name", "URL", "row"],
)
def test_messages_are_short(image):
    with pytest.raises(ValueError) as error:
        load_image(image)
    assert len(str(error.value)) < 500


def test_truncated_pictures_are_named_however_they_come(tmp_path):
    data = encoded(noise(64, 64))[:3000]
    (tmp_path / "cut.png").write_bytes(data)
    for image, name in (
        (tmp_path / "cut.png", "cut.png"),
        ({"bytes": data, "path": "cut.png"}, "cut.png"),
        (Image.open(tmp_path / "cut.png"), "cut.png"),
        (data, "the bytes"),
    ):
        with pytest.raises(ValueError, match=f"{name}: not a readable image .*truncated"):
            load_image(image)


def test_what_is_there_but_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: not a regular file"):
        load_image(tmp_path / "pipe.png")
    for name in ("file:///etc/passwd", "ftp://127.0.0.1/a.png"):
        with pytest.raises(ValueError, match="only http, https and data URLs"):
            load_image(name)
    with pytest.raises(ValueError, match="embedded null byte"):
        load_image("a\0b.png")


# -- no other programs


def test_postscript_starts_nothing(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "drawing.png", "EPS")
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
    script = """
import sys, io
from clipcap_hf.model.images_clipcap import load_image
from clipcap_hf.model.video_frames import read_frames
from PIL import Image
path = sys.argv[1]
for image in (path, open(path, "rb").read(), lambda: Image.open(path)):
    try:
        load_image(image() if callable(image) else image)
        sys.exit("read")
    except ValueError as error:
        assert "not a readable image" in str(error), error
try:
    read_frames(path, lambda metadata: [0])
except (ValueError, ImportError):
    pass
"""
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", script, str(tmp_path / "drawing.png")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "started").exists()


def test_folders_list_raster_images_alone(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp", "d.eps", "e.ps", "f.wmf", "g.pdf", "h.txt"):
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in find_images([tmp_path])[0]] == ["a.png", "b.jpg", "c.webp"]


def test_frames_of_an_animation_are_raster_images(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "film.gif", "EPS")
    with pytest.raises((ValueError, ImportError), match="film.gif"):
        read_frames(tmp_path / "film.gif", lambda metadata: [0])


# -- URLs


class Server(http.server.BaseHTTPRequestHandler):
    image = encoded(noise())

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/slow-header":
            for byte in b"HTTP/1.0 200 OK\r\n" + b"x" * 100:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.image)))
        self.end_headers()
        if self.path == "/cut":
            self.wfile.write(self.image[:-200])
            return
        for start in range(0, len(self.image), 1 if self.path == "/slow" else 1000):
            self.wfile.write(self.image[start : start + (1 if self.path == "/slow" else 1000)])
            time.sleep(0.2 if self.path == "/slow" else 0)

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:  # the client has gone
            pass


@pytest.fixture
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.block_on_close = False
        serve = functools.partial(server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_redirects_within_the_web_alone(tmp_path, web):
    assert np.array_equal(np.asarray(load_image(f"{web}/to/{web}/a.png")), np.asarray(noise()))
    noise().save(tmp_path / "a.png")
    for place in (f"file://{tmp_path}/a.png", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ValueError, match="could not be fetched"):
            load_image(f"{web}/to/{place}")


@pytest.mark.parametrize("page", ["slow", "slow-header"])
def test_a_server_that_sends_byte_by_byte(web, processor, page):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"{page}: could not be fetched .*not complete after 1 seconds"):
        processor(images=f"{web}/{page}", timeout=1.0)
    assert time.monotonic() - started < 4


def test_a_download_that_is_cut(web):
    with pytest.raises(ValueError, match="cut: could not be fetched .*200 bytes early"):
        load_image(f"{web}/cut")


def test_timeout_reaches_the_pipeline(web, make_model, processor):
    from transformers import pipeline

    captioner = pipeline("image-captioning", model=make_model(), processor=processor)
    assert captioner(f"{web}/a.png", timeout=20) == captioner(noise())
    with pytest.raises(ValueError, match="not complete after 0.5 seconds"):
        captioner(f"{web}/slow", timeout=0.5)


# -- large JPEG files at a smaller size


def lifelike(size):
    """Make soft patches of colour, as photographs have them."""
    return noise(12, 9, seed=3).resize(size, Image.BICUBIC)


@pytest.mark.parametrize(
    ("kind", "size", "enough", "expected"),
    [
        ("JPEG", (2000, 1500), None, (2000, 1500)),
        ("JPEG", (2000, 1500), 448, (1000, 750)),
        ("JPEG", (2000, 1500), 187, (250, 188)),
        ("JPEG", (2000, 1500), 751, (2000, 1500)),
        ("PNG", (2000, 1500), 448, (2000, 1500)),
    ],
)
def test_jpeg_files_are_read_at_a_size_that_is_enough(tmp_path, kind, size, enough, expected):
    data = encoded(lifelike(size), kind)
    (tmp_path / "large").write_bytes(data)
    for container in (data, tmp_path / "large", io.BytesIO(data), {"bytes": data, "path": None}):
        assert load_image(container, enough=enough).size == expected


def test_reduced_jpeg_files_stay_upright_and_look_the_same():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    lifelike((2000, 1500)).save(file, "JPEG", exif=exif)
    whole, reduced = load_image(file.getvalue()), load_image(file.getvalue(), enough=448)
    assert (whole.size, reduced.size) == ((1500, 2000), (750, 1000))
    small = [np.asarray(image.resize((60, 80)), dtype=int) for image in (whole, reduced)]
    assert np.abs(small[0] - small[1]).max() <= 6


@pytest.mark.parametrize("name", [EMOJI_MINI, PHOTO_MINI])
def test_what_is_enough_is_twice_what_the_tower_needs(name):
    image_processor = ClipCapProcessor.from_pretrained(name).image_processor
    pixels = image_processor(noise(), return_tensors="pt")["pixel_values"]
    assert edge_that_is_enough(image_processor) == 2 * pixels.shape[-1]
