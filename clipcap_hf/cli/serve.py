"""`clipcap serve`"""

from .arguments import add_device_arguments, load_captioner, positive


def add_parser(commands):
    serve = commands.add_parser(
        "serve",
        help="caption images in the browser",
        description="Serves a page on this machine: drop images, choose how to decode, see captions, their probabilities and "
        "the tokens nearest to each prefix vector. Ctrl-C ends it.",
    )
    serve.add_argument("--model", default="emoji-mini", help="a folder, a Hub id, emoji-mini or photo-mini")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=positive, help="port (default: the first free one from 7860)")
    serve.add_argument("--share", action="store_true", help="also through a public address that gradio provides")
    serve.add_argument("--max-file-size", default="20mb", metavar="SIZE", help="largest upload (default: %(default)s)")
    serve.add_argument(
        "--max-megapixels", type=positive, default=40, metavar="N", help="largest image (default: %(default)s)"
    )
    serve.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at once")
    add_device_arguments(serve)
    serve.set_defaults(run=run)


def run(arguments) -> int:
    from ..serve import build_app, launch

    model, processor = load_captioner(arguments.model, arguments.device, arguments.dtype)
    app = build_app(
        model,
        processor,
        title=f"Captions by {arguments.model}",
        max_pixels=arguments.max_megapixels * 1_000_000,
        batch_size=arguments.batch_size,
    )
    _, url, shared = launch(app, arguments.host, arguments.port, arguments.share, arguments.max_file_size)
    print(f"clipcap: serving {arguments.model} at {shared or url} (Ctrl-C ends it)", flush=True)
    try:
        app.block_thread()
    finally:
        app.close()
    return 0
