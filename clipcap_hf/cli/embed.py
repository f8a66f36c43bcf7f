"""Encode the images of a data set once: `clipcap embed`."""

from .arguments import add_data_arguments, load_captioner, load_data, not_negative, pick_device, positive


def add_parser(commands):
    embed = commands.add_parser(
        "embed",
        help="encode the images of a data set once, for training without the vision tower",
        description="Write the CLIP embeddings of captioned images to a folder that `datasets.load_from_disk` and "
        "`clipcap train` can read. After an interruption, run the same command again to continue. Under torchrun, the "
        "processes share the images. Images that cannot be read are listed in failed.jsonl.",
    )
    add_data_arguments(embed)
    embed.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    tower = embed.add_mutually_exclusive_group(required=True)
    tower.add_argument("--model", help="a captioner with a vision tower: a folder, a Hub id or emoji-mini")
    tower.add_argument(
        "--vision",
        metavar="NAME",
        help="a CLIP: a Hub id or folder of transformers, or of open_clip, as ViT-B-32/openai",
    )
    embed.add_argument(
        "--vision-feature",
        choices=["pooled", "patches"],
        help="kind of embedding to store for each image (default: the kind that the captioner reads, else pooled)",
    )
    embed.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: %(default)s)"
    )
    embed.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="processes that read images (default: by the number of cores)",
    )
    embed.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="data type in which the tower computes (default: 16 bits on GPUs and on CPUs with AMX)",
    )
    embed.add_argument(
        "--shard-size", type=positive, default=4096, metavar="N", help="images per file (default: %(default)s)"
    )
    embed.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
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
    )
    if process_state().is_main_process:
        splits = embedded if isinstance(embedded, dict) else {"": embedded}
        for name, split in splits.items():
            shape = " x ".join(map(str, embeddings_provenance(split)["shape"]))
            print(f"{arguments.out}{'/' * bool(name)}{name}: {len(split)} images, embeddings of {shape}")
    return 0
