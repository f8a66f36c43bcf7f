"""Encode the images of a data set once: `clipcap embed`."""

from .arguments import (
    add_data_arguments,
    add_reduce_jpeg_argument,
    add_speed_arguments,
    load_captioner,
    load_data,
    pick_device,
    positive,
)


def add_parser(commands):
    embed = commands.add_parser(
        "embed",
        usage="clipcap embed --data DATA --out DIR (--model NAME | --vision NAME) [OPTION ...]",
        help="encode the images of a data set once, for training without the vision tower",
        description="Write the CLIP embeddings of captioned images to a folder that `datasets.load_from_disk` and "
        "`clipcap train` can read. After an interruption, run the same command again to continue. Under torchrun, the "
        "processes share the images. Images that cannot be read are listed in failed.jsonl.",
    )
    embed.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    tower = embed.add_mutually_exclusive_group(required=True)
    tower.add_argument(
        "--model",
        metavar="NAME",
        help="a captioner with a vision tower: a folder, a Hub id, emoji-mini or photo-mini",
    )
    tower.add_argument(
        "--vision",
        metavar="NAME",
        help="a CLIP: a Hub id or folder of transformers, or of open_clip, as ViT-B-32/openai",
    )
    add_data_arguments(embed)
    embed.add_argument(
        "--vision-feature",
        choices=["pooled", "patches"],
        help="kind of embedding to store for each image (default: the kind that the captioner reads, else pooled)",
    )
    add_speed_arguments(embed, dtype="16 bits on GPUs and on CPUs with AMX")
    add_reduce_jpeg_argument(embed)
    embed.add_argument(
        "--shard-size", type=positive, default=4096, metavar="N", help="images per file (default: %(default)s)"
    )
    embed.set_defaults(run=run)


def run(arguments) -> int:
    import sys

    import torch

    from ..clip import load_tower
    from ..data.embed import embed
    from ..data.embeddings import embeddings_provenance
    from ..processes import keep_freed_memory, process_state

    keep_freed_memory()
    data = load_data(arguments)
    if arguments.model is not None:
        model, processor = load_captioner(arguments.model, arguments.device)
    else:
        model, processor = load_tower(arguments.vision, arguments.vision_feature or "pooled")
        model = model.to(pick_device(arguments.device)).eval()
    embedded = embed(
        model,
        data,
        arguments.out,
        processor,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        shard_size=arguments.shard_size,
        vision_feature=arguments.vision_feature,
        progress=sys.stderr.isatty(),
        reduce_jpeg=arguments.reduce_jpeg,
    )
    if process_state().is_main_process:
        splits = embedded if isinstance(embedded, dict) else {"": embedded}
        for name, split in splits.items():
            shape = " x ".join(map(str, (embeddings_provenance(split) or {})["shape"]))
            print(f"{arguments.out}{'/' * bool(name)}{name}: {len(split)} images, embeddings of {shape}")
    return 0
