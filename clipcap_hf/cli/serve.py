"""Caption images in the browser: `clipcap serve`."""

import argparse
import re

from ..ranges import PORT, number
from .arguments import add_device_arguments, add_model_argument, load_captioner, positive


# What the packaged captioners were trained on; nothing is known about others.
_ABOUT = {
    "emoji-mini": "This captioner knows drawings of emoji only: captions of anything else are fluent and wrong.",
    "photo-mini": "This small captioner knows 80 kinds of things on photographs. It guesses what people do, and is "
    "often wrong.",
}
_ABOUT_OTHERS = "Captions can be wrong, above all for images unlike those that the captioner was trained on."
_MAX_EXAMPLES = 12


def add_parser(commands):
    serve = commands.add_parser(
        "serve",
        usage="clipcap serve [OPTION ...]",
        help="caption images in the browser",
        description="Serve a page on this machine that captions the images you drop on it. It shows captions, their "
        "probabilities and the tokens nearest to each prefix vector, and lets you choose how to decode. Press Ctrl-C "
        "to stop.",
    )
    add_model_argument(serve, default="photo-mini")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=number(int, PORT), help="port (default: the first free one from 7860)")
    serve.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name under which a proxy shows the page; may be repeated (IP addresses and this machine's name are "
        "always allowed)",
    )
    serve.add_argument(
        "--share", action="store_true", help="also serve the page at a public address that gradio provides"
    )
    serve.add_argument("--examples", metavar="DIR", help="folder of images to click (default: emoji, for emoji-mini)")
    serve.add_argument(
        "--max-file-size",
        type=_size,
        default="20mb",
        metavar="SIZE",
        help="largest upload (default: %(default)s)",
    )
    serve.add_argument(
        "--max-megapixels", type=positive, default=40, metavar="N", help="largest image (default: %(default)s)"
    )
    serve.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images per batch")
    add_device_arguments(serve)
    serve.set_defaults(run=run)


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,5}(kb|mb|gb)", text.lower()):
        raise argparse.ArgumentTypeError(f"must be like 500kb, 20mb or 1gb, but is {text[:40]!r}")
    return text.lower()


def run(arguments) -> int:
    from ..drawings import KINDS
    from ..serve import build_app, check_address, launch

    check_address(arguments.host, arguments.port)  # before the model is loaded
    examples = _examples(arguments)
    model, processor = load_captioner(arguments.model, arguments.device, arguments.dtype)
    app = build_app(
        model,
        processor,
        title=f"Captions by {arguments.model}",
        max_pixels=arguments.max_megapixels * 1_000_000,
        batch_size=arguments.batch_size,
        about=_ABOUT.get(arguments.model, _ABOUT_OTHERS),
        examples=examples,
        knows=KINDS.get(arguments.model),
    )
    _, url, shared = launch(
        app,
        arguments.host,
        arguments.port,
        arguments.share,
        arguments.max_file_size,
        tuple(arguments.allowed_host),
    )
    print(f"clipcap: serving {arguments.model} at {shared or url} (Ctrl-C ends it)", flush=True)
    try:
        app.block_thread()
    finally:
        app.close()
    return 0


def _examples(arguments) -> list:
    if arguments.examples is not None:
        from ..files import find_images

        paths, errors = find_images([arguments.examples])
        if errors:
            raise ValueError(f"--examples {errors[0]}")
        return paths[:_MAX_EXAMPLES]
    if arguments.model != "emoji-mini":
        return []
    from ..data import load_emoji

    # Emoji in a design that the captioner was not trained on.
    return list(load_emoji("new_design").select(range(5, 1600, 270))["image"])
