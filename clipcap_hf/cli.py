"""The `clipcap` command."""

import argparse
import json
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough of it (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        # What a user can mend; anything else is a fault of ours and keeps its traceback.
        print(f"clipcap: {error}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipcap", description="Image captioning with ClipCap.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_caption(commands)
    _add_convert(commands)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _add_demo(commands):
    demo = commands.add_parser(
        "demo",
        help="train a captioner of emoji from scratch, offline, in minutes",
        description="Encodes the embedded emoji drawings with the embedded image tower, trains a captioner from scratch, "
        "scores it on two held-out splits beside baselines, and saves it with a picture of its captions.",
    )
    demo.add_argument(
        "--out", default="clipcap-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    demo.add_argument("--language", choices=["en", "ja"], default="en", help="of the captions (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    demo.add_argument(
        "--epochs", type=_positive, help="passes over the training set (default: what fits into minutes)"
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments) -> int:
    from transformers.utils import logging

    from .demo import run_demo, summary

    logging.set_verbosity_error()
    kwargs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    report = run_demo(arguments.out, language=arguments.language, seed=arguments.seed, **kwargs)
    print(summary(Path(arguments.out), report))
    return 0


def _add_caption(commands):
    caption = commands.add_parser(
        "caption",
        help="caption image files",
        description="Prints a line for each image, in order: the path, a tab, the caption. Files that cannot be read are "
        "listed on standard error, and the exit status is then 1.",
    )
    caption.add_argument("paths", nargs="+", metavar="PATH", help="image files, folders or glob patterns")
    caption.add_argument(
        "--model",
        default="emoji-mini",
        help="a folder, a Hub id, or emoji-mini, the embedded captioner of emoji drawings (default: %(default)s)",
    )
    caption.add_argument(
        "--beams", type=_positive, default=1, metavar="N", help="beam search with N beams (default: greedy)"
    )
    caption.add_argument(
        "--captions", type=_positive, default=1, metavar="N", help="print the N best captions, tab-separated"
    )
    caption.add_argument("--prompt", help="a beginning that every caption continues")
    caption.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest caption, in tokens")
    caption.add_argument("--json", action="store_true", help='print {"image": ..., "captions": [...]} lines')
    caption.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="images at once (default: %(default)s)"
    )
    caption.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: by their number)"
    )
    caption.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    caption.set_defaults(run=_run_caption)


def _run_caption(arguments) -> int:
    from .captioning import caption_files, find_images

    paths, errors = find_images(arguments.paths)
    failed = bool(errors)
    for error in errors:
        print(f"clipcap: {error}", file=sys.stderr)
    if not paths:
        return 1
    model, processor = _load_captioner(arguments.model, arguments.device)
    workers = arguments.workers
    if workers is None:
        # Starting a process costs as much as reading some dozens of images.
        workers = 0 if len(paths) < 64 else min(4, os.cpu_count() or 1)
    generate_kwargs = {
        "num_beams": max(arguments.beams, arguments.captions),
        "num_return_sequences": arguments.captions,
    }
    if arguments.max_new_tokens:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens
    results = caption_files(
        model,
        processor,
        paths,
        batch_size=arguments.batch_size,
        num_workers=workers,
        prompt=arguments.prompt,
        progress=sys.stderr.isatty() and len(paths) > arguments.batch_size,
        **generate_kwargs,
    )
    for result in results:
        if result.error:
            failed = True
            print(f"clipcap: {result.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"image": result.path, "captions": result.captions}, ensure_ascii=False), flush=True)
        else:
            print(result.path, *result.captions, sep="\t", flush=True)
    return int(failed)


def _load_captioner(name: str, device: str | None):
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from . import EMOJI_MINI, ClipCapForConditionalGeneration, ClipCapProcessor

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name == "emoji-mini":
        print("clipcap: emoji-mini knows drawings of emoji only; --model takes other captioners", file=sys.stderr)
        name = EMOJI_MINI
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {device} here: {str(error).splitlines()[0]}") from error
    name = os.path.expanduser(name)
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"{name}: no such folder; --model takes a folder, a Hub id or emoji-mini")
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "clipcap":
        raise ValueError(f"{name} is a {config.model_type} model, not a ClipCap captioner")
    model = ClipCapForConditionalGeneration.from_pretrained(name).to(device).eval()
    return model, ClipCapProcessor.from_pretrained(name)


def _add_convert(commands):
    convert = commands.add_parser("convert", help="convert files of the official ClipCap code")
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")

    official = kinds.add_parser("official", help="a checkpoint (.pt) to a captioner")
    official.add_argument("checkpoint", metavar="STATE.pt")
    official.add_argument("--out", required=True, metavar="DIR", help="folder for the captioner; must not exist")
    official.add_argument("--vision", help="the CLIP it was trained with, by Hub id, folder or open_clip name")
    official.add_argument(
        "--text",
        default="openai-community/gpt2",
        help="Hub id or folder with configuration and tokenizer of its language model (default: %(default)s)",
    )
    official.add_argument(
        "--normalize-clip-embeds", action="store_true", help="it was trained with --normalize_prefix"
    )
    official.set_defaults(run=_run_convert_official)

    embeddings = kinds.add_parser("embeddings", help="CLIP embeddings (.pkl) to a datasets folder")
    embeddings.add_argument("pickle", metavar="EMBEDDINGS.pkl")
    embeddings.add_argument("--out", required=True, metavar="DIR", help="folder for the data set; must not exist")
    embeddings.set_defaults(run=_run_convert_embeddings)


def _run_convert_official(arguments) -> int:
    import tempfile

    from . import ClipCapProcessor
    from .convert import convert_official_checkpoint

    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    processor = ClipCapProcessor.from_vision_text_pretrained(arguments.vision, arguments.text)
    model = convert_official_checkpoint(
        arguments.checkpoint,
        text_config=arguments.text,
        vision=arguments.vision,
        normalize_clip_embeds=arguments.normalize_clip_embeds,
        image_token_id=processor.image_token_id,
    )
    processor.prefix_length = model.config.prefix_length
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.save_pretrained(Path(folder) / "captioner")
        processor.save_pretrained(Path(folder) / "captioner")
        (Path(folder) / "captioner").rename(out)
    config = model.config
    print(
        f"{out}: {config.mapping_type} mapping of {config.clip_embed_dim} dimensions to {config.prefix_length} vectors"
    )
    return 0


def _run_convert_embeddings(arguments) -> int:
    from .convert import convert_official_embeddings

    data = convert_official_embeddings(arguments.pickle, arguments.out)
    print(f"{arguments.out}: {len(data)} images with {sum(map(len, data['captions']))} captions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
