"""Serve a page in the browser that captions images: `clipcap serve`."""

import errno
import ipaddress
import math
import os
import socket
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from .captioning import CaptionedImage, caption_pixels, check_takes_images
from .drawings import looks_drawn
from .extras import install_hint
from .model.images_clipcap import load_image
from .serve_page import STYLE, results_page, thumbnail


logger = logging.get_logger(__name__)

MAX_IMAGES = 16
# The formats that browsers show; more decoders would give strangers' files more to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXPLAINED_TOKENS = 3
DECODING = ("greedy", "beam search", "sampling")


@dataclass(frozen=True)
class Settings:
    """How to decode. Requests with the same settings go through the model together."""

    decoding: str = "greedy"
    beams: int = 5
    captions: int = 1
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 30
    prompt: str = ""

    def generate_kwargs(self) -> dict[str, Any]:
        common = {"max_new_tokens": int(self.max_new_tokens), "num_return_sequences": int(self.captions)}
        if self.decoding == "beam search":
            return {**common, "num_beams": max(int(self.beams), int(self.captions)), "do_sample": False}
        if self.decoding == "sampling":
            sampling = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": 0}
            return {**common, **sampling, "num_beams": 1, "do_sample": True}
        if self.decoding == "greedy":
            return {**common, "num_beams": 1, "num_return_sequences": 1, "do_sample": False}
        raise ValueError(f"decoding must be one of {', '.join(DECODING)}, got {self.decoding!r}")


class BatchedCaptioner:
    """
    Caption the images of several requests at once.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        processor ([`ClipCapProcessor`]): Its processor.
        max_pixels (`int`): Larger images are refused before they are decoded.
        batch_size (`int`): Images per batch.
    """

    def __init__(self, model, processor, max_pixels: int = 40_000_000, batch_size: int = 16):
        check_takes_images(processor)
        self.model = model
        self.processor = processor
        self.max_pixels = max_pixels
        self.batch_size = batch_size
        self._waiting: list[tuple[list[str], Settings, Future]] = []
        self._list = threading.Lock()
        self._turn = threading.Lock()

    def caption(self, paths: list[str], settings: Settings) -> list[tuple[CaptionedImage, str | None]]:
        """Caption the images of one request, together with those of other waiting threads."""
        # gradio's own batching does not help: one request with a bad value makes its whole batch fail.
        answer: Future = Future()
        with self._list:
            self._waiting.append((paths, settings, answer))
        with self._turn:
            if not answer.done():  # no earlier request has handled this one
                self._serve_waiting()
        return answer.result()

    def _serve_waiting(self):
        with self._list:
            taken, self._waiting = self._waiting, []
        try:
            for (_, _, answer), results in zip(taken, self([request[:2] for request in taken])):
                answer.set_result(results)
        except BaseException as error:
            for _, _, answer in taken:  # otherwise they would wait forever
                answer.set_exception(error)

    def __call__(self, requests: list[tuple[list[str], Settings]]) -> list[list[tuple[CaptionedImage, str | None]]]:
        """Caption requests of files and settings; return each one's images, with a thumbnail as a data URL."""
        answers = [[self._read(path) for path in paths] for paths, _ in requests]
        waiting: dict[Settings, list] = {}
        for answer, (_, settings) in zip(answers, requests):
            waiting.setdefault(settings, []).extend(item for item in answer if item[2] is not None)
        for settings, items in waiting.items():
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                try:
                    self._caption(batch, settings)
                except Exception as error:  # other requests, with other settings, keep their captions
                    if not isinstance(error, ValueError):
                        logger.exception("Captioning failed")
                        error = ValueError("captioning failed; the server's log says why")
                    for result, _, _ in batch:
                        result.error = str(error)
        return [[(result, thumbnail) for result, thumbnail, _ in answer] for answer in answers]

    def _read(self, path: str):
        name = Path(path).name
        try:
            image = self._open(path)
            pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            # Visitors know the file by its name, and must not learn its path on this machine.
            return CaptionedImage(path=name, error=str(error).replace(str(path), name)), None, None
        return CaptionedImage(path=name, drawn=looks_drawn(image)), thumbnail(image), pixels

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(path, formats=FORMATS) as opened:  # the header alone
                width, height = opened.size
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path}: refused, the image is too large") from error
        except Exception as error:  # decoders raise many kinds of errors
            raise ValueError(f"{path}: not an image that can be read (is it JPEG, PNG, WebP, GIF or BMP?)") from error
        if width * height > self.max_pixels:
            raise ValueError(
                f"{path}: refused, {width} x {height} pixels are more than the {self.max_pixels / 1e6:.0f} million "
                "that are allowed here; make it smaller"
            )
        return load_image(path)

    def _caption(self, items: list, settings: Settings):
        found = caption_pixels(
            self.model,
            self.processor,
            [pixels for _, _, pixels in items],
            prompt=settings.prompt.strip() or None,
            explain=EXPLAINED_TOKENS,
            scores=True,
            **settings.generate_kwargs(),
        )
        for (result, _, _), captioned in zip(items, found):
            result.captions, result.scores = captioned.captions, captioned.scores
            result.prefix_tokens = captioned.prefix_tokens


# -- the page


def build_app(
    model,
    processor,
    title: str = "ClipCap",
    max_pixels: int = 40_000_000,
    batch_size: int = 16,
    about: str = "",
    examples: list | None = None,
    knows: str | None = None,
):
    """
    Build the page as a `gradio.Blocks`.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner, on the device to use.
        processor ([`ClipCapProcessor`]): Its processor.
        title (`str`): Heading of the page.
        max_pixels (`int`): Larger images are refused before they are decoded.
        batch_size (`int`): Images per batch, from any visitors.
        about (`str`): One sentence on what the captioner was trained on.
        examples (`list`, *optional*): Example images to click, in any form that [`load_image`] reads.
        knows (`str`, *optional*): What the captioner knows, `"drawing"` or `"photograph"`; the page marks images that
            look like the other.

    Raises:
        ImportError: If gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f"The page needs gradio: {install_hint('serve')}") from error

    caption = _caption_function(gr, BatchedCaptioner(model, processor, max_pixels, batch_size), knows)
    # Use the visitor's system fonts, so that nothing is fetched from other sites.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"# {title}\nDrop images, choose how to decode, and read their captions. {about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(label=f"Images (up to {MAX_IMAGES})", file_count="multiple", type="filepath")
                gallery = _example_gallery(gr, app, examples or [])
                settings = _settings_inputs(gr)
                button = gr.Button("Caption", variant="primary")
            with gr.Column(scale=2, min_width=300):
                page = gr.HTML("<p>The captions will be here.</p>", label="Captions")
                record = gr.JSON(visible=False)
        inputs = [files, *settings]
        # Run many at a time, so that waiting requests can be captioned together.
        button.click(caption, inputs, [page, record], api_name="caption", concurrency_limit=32)
        if gallery is not None:
            chosen = gallery.select(_chosen_example(gr, app), None, files, api_visibility="private")
            chosen.then(caption, inputs, [page, record], api_visibility="private", concurrency_limit=32)
    app.clipcap_launch = {"theme": theme, "css": STYLE}
    return app


def _caption_function(gr, captioner: BatchedCaptioner, knows: str | None):
    # These names are also the API's parameters.
    def caption(files, decoding, beams, captions, temperature, top_p, max_new_tokens, prompt):
        files = files or []
        if len(files) > MAX_IMAGES:
            raise gr.Error(f"At most {MAX_IMAGES} images at once; these are {len(files)}.", print_exception=False)
        settings = Settings(decoding, beams, captions, temperature, top_p, max_new_tokens, prompt)
        results = captioner.caption(files, settings)
        records = [_record(result) for result, _ in results]
        return results_page(results, knows) if results else "<p>Drop an image first.</p>", records

    return caption


def _settings_inputs(gr) -> list:
    """Make the inputs for the fields of `Settings`, of which those for the chosen decoding are shown."""
    decoding = gr.Radio(DECODING, value="greedy", label="Decoding")
    beams = gr.Slider(2, 10, 5, step=1, label="Beams", visible=False)
    temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature", visible=False)
    top_p = gr.Slider(0.05, 1.0, 0.9, step=0.05, label="Top-p", visible=False)
    captions = gr.Slider(1, 10, 1, step=1, label="Captions per image", visible=False)
    max_new_tokens = gr.Slider(1, 60, 30, step=1, label="Longest caption, in tokens")
    prompt = gr.Textbox(label="Prompt (a beginning that captions continue)", max_length=200)
    decoding.change(
        lambda way: (
            [gr.update(visible=way == "beam search")]
            + [gr.update(visible=way == "sampling")] * 2
            + [gr.update(visible=way != "greedy")]
        ),
        decoding,
        [beams, temperature, top_p, captions],
        api_visibility="private",
    )
    return [decoding, beams, captions, temperature, top_p, max_new_tokens, prompt]


def _record(result: CaptionedImage) -> dict[str, Any]:
    probabilities = [math.exp(score) for score in result.scores or []]
    return {
        "file": result.path,
        "error": result.error,
        "captions": result.captions,
        "probabilities": probabilities,
    }


def _example_gallery(gr, app, examples: list):
    if not examples:
        return None
    # Serve copies, so that no other file of their folder can be requested.
    app.clipcap_examples = tempfile.TemporaryDirectory(prefix="clipcap-examples-")
    for number, example in enumerate(examples, start=1):
        load_image(example).save(Path(app.clipcap_examples.name) / f"example-{number:02d}.png")
    return gr.Gallery(
        _example_paths(app),
        label="Examples (click one)",
        columns=6,
        height=120,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
    )


def _example_paths(app) -> list[str]:
    return sorted(map(str, Path(app.clipcap_examples.name).iterdir()))


def _chosen_example(gr, app):
    def chosen(event: gr.SelectData):  # type: ignore[name-defined]  # gradio reads the annotation
        return [_example_paths(app)[event.index]]

    return chosen


# -- the server


def check_address(host: str, port: int | None):
    """Refuse an address that the server cannot listen on, and name the option.

    Raises:
        ValueError: If `host` is not an address of this machine, or `port` is taken or not a port.
    """
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"--port {port}: a port is a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: no such address") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"--port {port}: another program listens there; choose another --port, or leave it out"
            elif error.errno == errno.EACCES:
                reason = f"--port {port}: not allowed for you; choose one from 1024"
            else:
                reason = f"--host {host}: not an address of this machine"
            raise ValueError(reason) from error


class _KnownHosts:
    """Refuse requests for a host name that is not this server's.

    Otherwise another site could point its own name at this machine (DNS rebinding) and read all answers.
    """

    def __init__(self, app, names: tuple[str, ...]):
        self.app = app
        self.names = {name.lower() for name in names}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or self._knows(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"Unknown host name: see `clipcap serve --allowed-host`.\n"})

    def _knows(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
            return True  # an IP address is not another site's name
        except ValueError:
            return name in self.names or ("*.gradio.live" in self.names and name.endswith(".gradio.live"))


def launch(
    app,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    max_file_size: str = "20mb",
    allowed_hosts: tuple[str, ...] = (),
):
    """Serve the page until Ctrl-C. The only files that it gives out are visitors' own uploads and the examples."""
    from starlette.middleware import Middleware

    names = ("localhost", socket.gethostname(), host, *allowed_hosts, *(["*.gradio.live"] if share else []))
    return app.queue(max_size=256).launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=max_file_size,
        allowed_paths=[],
        show_error=True,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(_KnownHosts, names=names)]},
        **app.clipcap_launch,
    )
