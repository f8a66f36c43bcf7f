"""The command `clipcap evaluate`."""

import os
import sys
from pathlib import Path

from .arguments import (
    add_beams_argument,
    add_model_argument,
    add_rerank_arguments,
    add_speed_arguments,
    check_rerank,
    load_captioner,
    load_reranker,
    positive,
)


def add_parser(commands):
    evaluate = commands.add_parser(
        "evaluate",
        help="score a captioner, or a file of captions, on your own images or a benchmark",
        usage="clipcap evaluate (--model NAME | --results FILE) (--data DATA | --benchmark NAME) [OPTION ...]",
        description="Captions the images of a benchmark, or your own, and scores the captions against what people "
        "wrote; or scores an existing results file. Writes results.json (for the leaderboards), scores.json (with "
        "everything that made the numbers) and index.html (the worst, median and best images). An interrupted run "
        "goes on where it stopped; torchrun spreads it over processes.",
    )
    _add_source_arguments(evaluate)
    _add_decoding_arguments(evaluate)
    _add_scoring_arguments(evaluate)
    output = evaluate.add_argument_group("output")
    output.add_argument(
        "--out", default="clipcap-evaluation", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    more = evaluate.add_more_arguments("more about the output")
    more.add_argument(
        "--overwrite",
        action="store_true",
        help="also replace files in --out that clipcap evaluate did not write (never those it reads)",
    )
    more.add_argument(
        "--update-card",
        nargs="?",
        const="",
        metavar="DIR",
        help="write the scores into the model card in this folder (default: the model's)",
    )
    evaluate.set_defaults(run=run, check=check)


def _add_source_arguments(evaluate):
    what = evaluate.add_argument_group("what is scored")
    add_model_argument(what)
    what.add_argument(
        "--results", metavar="FILE", help='existing captions: [{"image_id": 42, "caption": "a cat"}, ...]'
    )
    what.add_argument(
        "--benchmark",
        metavar="NAME",
        help="coco-karpathy, conceptual-captions, nocaps, flickr8k, flickr30k, stair, emoji or emoji-ja; missing or "
        "duplicate images, ids or captions are errors",
    )
    what.add_argument(
        "--data",
        metavar="DATA",
        help="with --benchmark the folder of its published files and images; without, your own images and captions: a "
        "folder, an annotation file, shards or a Hub id",
    )
    what.add_argument(
        "--split",
        nargs="+",
        metavar="NAME",
        help="of the benchmark (default: those that papers report), or of your own --data",
    )
    what.add_argument("--limit", type=positive, metavar="N", help="caption the first N images only, for a quick look")
    what = evaluate.add_more_arguments("more about what is scored")
    what.add_argument(
        "--data-format",
        metavar="FORMAT",
        help="form of your own --data: imagefolder, karpathy, coco, stair, nocaps, official, conceptual, webdataset "
        "or hub (default: imagefolder for a folder, else hub)",
    )
    what.add_argument("--images", metavar="DIR", help="folder of your own images (default: that of --data)")
    what.add_argument(
        "--missing", choices=["error", "skip"], help="what to do with your own images that are listed but missing"
    )
    for name, whose in (("image", "images"), ("caption", "captions"), ("id", "image ids")):
        what.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {whose} in your own --data")
    what.add_argument("--references", metavar="FILE", help="references in COCO's annotation format")
    what.add_argument(
        "--allow-subset", action="store_true", help="score a part where images or captions are missing, and say so"
    )


def _add_decoding_arguments(evaluate):
    decoding = evaluate.add_argument_group("captions of a model")
    add_beams_argument(decoding, default=5, reranks=True)
    more = evaluate.add_more_arguments("more about the captions")
    add_rerank_arguments(more)
    more.add_argument("--official-beam-search", action="store_true", help="use the rule of the official ClipCap code")
    decoding.add_argument("--prompt", help="text that every caption continues")
    more.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest caption, in tokens")
    add_speed_arguments(decoding)


def _add_scoring_arguments(evaluate):
    scoring = evaluate.add_argument_group("scores")
    scoring.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="bleu, meteor, rouge_l, cider, spice, exact_match, diversity, clip_score (default: what fits the "
        "benchmark and is installed)",
    )
    scoring.add_argument(
        "--tokenizer",
        choices=["ptb", "python", "ja", "characters", "none"],
        help="ptb, the standard for English, needs Java; python needs nothing and is not exact (default: the "
        "benchmark's; for your own images ptb if it is installed, else python)",
    )
    scoring = evaluate.add_more_arguments("more about the scores")
    scoring.add_argument(
        "--empty-references", choices=["error", "drop", "keep"], help="references without text (default: error)"
    )
    scoring.add_argument("--spice-home", metavar="DIR", help="folder with the jars of SPICE")
    scoring.add_argument("--clip-model", metavar="NAME", help="CLIP for clip_score (default: ViT-B/32, the paper's)")


def run(arguments) -> int:
    from ..assets import resolve
    from ..evaluation import alone_in, get_benchmark
    from ..metrics import JavaError
    from ..processes import keep_freed_memory

    keep_freed_memory()
    if arguments.clip_model is not None:
        arguments.clip_model = os.path.expanduser(resolve(arguments.clip_model))
    benchmark = get_benchmark(arguments.benchmark) if arguments.benchmark else None
    folders = _folders(arguments, benchmark)
    card = _card_folder(arguments)
    try:
        _check_before_work(arguments, benchmark, folders)
        captioner = None
        if arguments.model is not None:
            captioner = load_captioner(arguments.model, arguments.device, arguments.dtype)
        for split, folder in folders.items():
            with alone_in(folder):
                _evaluate(arguments, benchmark, split, captioner, folder, card)
    except JavaError as error:
        raise ValueError(error) from error
    return 0


def check(arguments):
    """Refuse options that do not go together, or that lack others."""
    if (arguments.model is None) == (arguments.results is None):
        raise ValueError("give --model, whose captions are scored, or --results, a file of captions")
    if arguments.model and arguments.references:
        raise ValueError("--references goes with --results; a model's images and references are in --data")
    if arguments.benchmark is None and arguments.data is None and arguments.references is None:
        if arguments.model:
            raise ValueError("give the images that --model captions: --data FOLDER for your own, or --benchmark")
        raise ValueError("give the references of the results file: --data FOLDER, --benchmark, or --references")
    if arguments.data is not None and arguments.references:
        raise ValueError("--references and --data both name references: give one of them")
    if arguments.split and arguments.benchmark is None and arguments.data is None:
        raise ValueError("--split goes with --benchmark or --data")
    if arguments.limit and arguments.results:
        raise ValueError("--limit is for captions of a --model; for a results file with fewer, use --allow-subset")
    if check_rerank(arguments) and arguments.results:
        raise ValueError("--rerank is for captions of a --model, not for a results file")
    if arguments.official_beam_search and arguments.beams == 1:
        raise ValueError("--official-beam-search needs --beams of 2 or more")
    own = [name for name in ("data_format", "images", "missing", *COLUMNS) if getattr(arguments, name) is not None]
    if own and (arguments.benchmark or arguments.data is None):
        option = own[0].replace("_", "-")
        raise ValueError(f"--{option} describes your own images: it goes with --data and without --benchmark")


COLUMNS = ("image_column", "caption_column", "id_column")


def _folders(arguments, benchmark) -> dict[str | None, Path]:
    """Choose the splits to score, each with the folder for its files."""
    splits = arguments.split or (benchmark.default_splits if benchmark else [None])
    if len(splits) > 1 and (arguments.results or arguments.references):
        raise ValueError(f"--results and --references are of one split: add --split and one of {', '.join(splits)}")
    out = Path(arguments.out)
    if benchmark:
        return {split: out / f"{benchmark.name}-{split}" for split in splits}
    return {split: out / split if len(splits) > 1 else out for split in splits}


def _card_folder(arguments) -> Path | None:
    if arguments.update_card is None:
        return None
    if arguments.benchmark is None:
        raise ValueError("--update-card needs a --benchmark: a model card names it")
    folder = Path(arguments.update_card or arguments.model or "").expanduser()
    if not (arguments.update_card or arguments.model) or not folder.is_dir():
        raise ValueError("--update-card writes into a folder: name it, --update-card DIR")
    return folder


def _check_before_work(arguments, benchmark, folders: dict[str | None, Path]):
    """Find out what is missing, or in the way, before an hour is spent on captions."""
    from ..evaluation import check_folder, default_metrics
    from ..metrics import check_metrics, check_requirements

    if arguments.metrics:
        check_metrics(arguments.metrics)
        if "clip_score" in arguments.metrics and (arguments.references or not _has_images(arguments, benchmark)):
            raise ValueError("clip_score needs the images: give --data, and no --references")
    for folder in folders.values():
        check_folder(folder, _inputs(arguments), arguments.overwrite)
    if arguments.tokenizer is None and benchmark is None and arguments.data is not None:
        arguments.tokenizer = _installed_tokenizer()
    tokenizer = arguments.tokenizer or (benchmark.tokenizer if benchmark else "ptb")
    arguments.metrics = arguments.metrics or default_metrics(benchmark, tokenizer, arguments.spice_home)
    check_requirements(arguments.metrics, tokenizer, arguments.spice_home, arguments.clip_model)


def _has_images(arguments, benchmark) -> bool:
    return arguments.data is not None or benchmark.name.startswith("emoji")


def _inputs(arguments) -> list[str]:
    files = [arguments.results, arguments.references, arguments.data]
    return [os.path.expanduser(file) for file in files if file is not None]


def _installed_tokenizer() -> str:
    from ..metrics import JavaError, check_requirements

    try:
        check_requirements(["bleu"], "ptb")
    except JavaError as error:
        print(
            f"clipcap: scored with --tokenizer python, which is not exact and leaves METEOR out: {error}",
            file=sys.stderr,
        )
        return "python"
    return "ptb"


def _evaluate(arguments, benchmark, split, captioner, folder: Path, card: Path | None):
    from ..evaluation import evaluate_captions, read_results, remove_progress, write_report
    from ..processes import process_state

    data = _load_data(arguments, benchmark, split)
    if captioner is None:
        captions = read_results(arguments.results)
        record = {"captions_file": os.path.basename(arguments.results)}
    else:
        if arguments.limit:
            data = data.take(range(min(arguments.limit, len(data))))
        captions, record = _captions(arguments, captioner, data, folder)
        if not process_state().is_main_process:
            return
    report, data = evaluate_captions(
        captions,
        data,
        benchmark,
        split,
        metrics=arguments.metrics,
        tokenizer=arguments.tokenizer,
        empty_references=arguments.empty_references,
        spice_home=arguments.spice_home,
        clip_model=arguments.clip_model,
        allow_subset=arguments.allow_subset or arguments.limit is not None,
        config=captioner[0].config if captioner else None,
    )
    report = {**record, **report}
    written = write_report(folder, report, data, _inputs(arguments), arguments.overwrite)
    if captioner is not None:
        remove_progress(folder, record["settings_sha256"])
    _print_report(report, written, card)


def _load_data(arguments, benchmark, split):
    from ..evaluation import load_evaluation_set, load_own_images, read_references

    if arguments.references:
        return read_references(arguments.references)
    if benchmark is None:
        columns = {name: getattr(arguments, name) for name in COLUMNS if getattr(arguments, name) is not None}
        if "caption_column" in columns:
            columns["caption_column"] = columns["caption_column"].split(",")
        return load_own_images(
            arguments.data, arguments.data_format, split, arguments.images, arguments.missing, **columns
        )
    if arguments.data is None and arguments.results and not benchmark.name.startswith("emoji"):
        raise ValueError(f"the references of {benchmark.title} are missing: --references FILE or --data ROOT")
    return load_evaluation_set(benchmark, arguments.data, split)


def _captions(arguments, captioner, data, folder: Path):
    from ..evaluation import caption_benchmark
    from ..model.reranking_clipcap import DEFAULT_BEAMS
    from .arguments import reading_workers

    model, processor = captioner
    reranks = check_rerank(arguments)
    generate_kwargs = {"num_beams": arguments.beams or (DEFAULT_BEAMS if reranks else 5)}
    if reranks:
        generate_kwargs["rerank"] = load_reranker(arguments, model, processor)
    if arguments.official_beam_search:
        from .. import official_beam_search

        generate_kwargs["custom_generate"] = official_beam_search
    if arguments.max_new_tokens:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens
    name = os.path.expanduser(arguments.model)
    return caption_benchmark(
        model,
        processor,
        os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        data,
        folder,
        prompt=arguments.prompt,
        batch_size=arguments.batch_size,
        num_workers=reading_workers(arguments.workers, len(data), model.device),
        progress=sys.stderr.isatty(),
        allow_subset=arguments.allow_subset,
        **generate_kwargs,
    )


def _print_report(report: dict, written: list[Path], card: Path | None):
    from ..evaluation import plain_summary

    titles = {"scores.json": "Scores", "index.html": "Page", "results.json": "Captions"}
    print(plain_summary(report) + "\n")
    for path in written:
        print(f"{titles[path.name]}: {path}")
    if card is not None:
        from ..evaluation.card import update_card

        changed = update_card(card, report)
        print(f"Model card: {', '.join(map(str, changed)) if changed else 'unchanged'}")
    print()
