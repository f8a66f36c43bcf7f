"""Convert files of the official ClipCap code: `clipcap convert`."""

from pathlib import Path


def add_parser(commands):
    convert = commands.add_parser("convert", help="convert files of the official ClipCap code")
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")

    official = kinds.add_parser(
        "official",
        help="a checkpoint (.pt) to a captioner",
        usage="clipcap convert official STATE.pt --out DIR [OPTION ...]",
    )
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
    official.set_defaults(run=_run_official)

    embeddings = kinds.add_parser(
        "embeddings",
        help="CLIP embeddings (.pkl) to a datasets folder",
        usage="clipcap convert embeddings EMBEDDINGS.pkl --out DIR",
    )
    embeddings.add_argument("pickle", metavar="EMBEDDINGS.pkl")
    embeddings.add_argument("--out", required=True, metavar="DIR", help="folder for the data set; must not exist")
    embeddings.set_defaults(run=_run_embeddings)


def _run_official(arguments) -> int:
    import os

    from .. import ClipCapProcessor
    from ..assets import resolve
    from ..convert import convert_official_checkpoint
    from ..files import check_file, whole_folder
    from ..model.packages_clipcap import donor_folder
    from ..sources import is_captioner, text_source

    check_file(arguments.checkpoint, "checkpoint")  # before anything is requested from the Hub
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    text = text_source(arguments.text)
    if not isinstance(text.model, str):
        raise ValueError(f"--text {arguments.text} is a captioner; give the language model of the official checkpoint")
    vision = None if arguments.vision is None else os.path.expanduser(resolve(arguments.vision))
    if vision is not None and is_captioner(vision):
        raise ValueError(f"--vision {arguments.vision} is a captioner; give the CLIP of the official checkpoint")
    processor = ClipCapProcessor.from_vision_text_pretrained(vision, text.tokenizer, text_kwargs=text.tokenizer_kwargs)
    model = convert_official_checkpoint(
        arguments.checkpoint,
        text_config=donor_folder(text.model),
        text_kwargs=text.model_kwargs,
        vision=vision,
        normalize_clip_embeds=arguments.normalize_clip_embeds,
        image_token_id=processor.image_token_id,
    )
    processor.prefix_length = model.config.prefix_length
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    config = model.config
    print(
        f"{out}: {config.mapping_type} mapping of {config.clip_embed_dim} dimensions to {config.prefix_length} vectors"
    )
    return 0


def _run_embeddings(arguments) -> int:
    from ..convert import convert_official_embeddings

    data = convert_official_embeddings(arguments.pickle, arguments.out)
    print(f"{arguments.out}: {len(data)} images with {sum(map(len, data['captions']))} captions")
    return 0
