"""`clipcap evaluate`"""

import os
import sys
from pathlib import Path

from .arguments import add_device_arguments, load_captioner, not_negative, positive


def add_parser(commands):
    evaluate = commands.add_parser(
        "evaluate",
        help="score a captioner, or a file of captions, by the field's benchmarks",
        description="Captions the images of a benchmark and scores the captions beside the paper's, or scores a results "
        "file. Writes results.json (for the leaderboards), scores.json (with all that made the numbers) and index.html "
        "(the worst, median and best images). Interrupted, it goes on where it was; torchrun spreads it over processes.",
    )
    what = evaluate.add_argument_group("what is scored")
    what.add_argument("--model", help="a captioner: a folder, a Hub id or emoji-mini")
    what.add_argument("--results", metavar="FILE", help='ready captions: [{"image_id": 42, "caption": "a cat"}, ...]')
    what.add_argument(
        "--benchmark",
        metavar="NAME",
        help="coco-karpathy, conceptual-captions, nocaps, flickr8k, flickr30k, stair, emoji or emoji-ja; its number of "
        "images, its ids and its tokenizer hold",
    )
    what.add_argument("--data", metavar="ROOT", help="folder with the benchmark's published files and images")
    what.add_argument(
        "--split", nargs="+", metavar="NAME", help="of the benchmark (default: those that papers report)"
    )
    what.add_argument("--references", metavar="FILE", help="references in COCO's annotation format")
    what.add_argument(
        "--allow-subset", action="store_true", help="score what is there where images or captions are missing"
    )
    what.add_argument("--limit", type=positive, metavar="N", help="caption the first N images only, for a quick look")

    decoding = evaluate.add_argument_group("captions of a model")
    decoding.add_argument("--beams", type=positive, default=5, metavar="N", help="beam search (default: %(default)s)")
    decoding.add_argument(
        "--official-beam-search", action="store_true", help="with the rule of the official ClipCap code"
    )
    decoding.add_argument("--prompt", help="a beginning that every caption continues")
    decoding.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest caption, in tokens")
    decoding.add_argument("--batch-size", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    decoding.add_argument("--workers", type=not_negative, metavar="N", help="processes that read images")
    add_device_arguments(decoding)

    scoring = evaluate.add_argument_group("scores")
    scoring.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="bleu, meteor, rouge_l, cider, spice, exact_match, diversity, clip_score (default: what the benchmark and "
        "this machine have)",
    )
    scoring.add_argument(
        "--tokenizer",
        choices=["ptb", "python", "ja", "characters", "none"],
        help="ptb, the standard for English, needs Java; python does not and is not exact (default: the benchmark's)",
    )
    scoring.add_argument(
        "--empty-references", choices=["error", "drop", "keep"], help="references without text (default: error)"
    )
    scoring.add_argument("--spice-home", metavar="DIR", help="folder with the jars of SPICE")
    scoring.add_argument("--clip-model", metavar="NAME", help="CLIP for clip_score (default: ViT-B/32, the paper's)")

    evaluate.add_argument(
        "--out", default="clipcap-evaluation", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    evaluate.add_argument(
        "--update-card",
        nargs="?",
        const="",
        metavar="DIR",
        help="write the scores into the model card in this folder (default: the model's)",
    )
    evaluate.set_defaults(run=run)


def run(arguments) -> int:
    from ..evaluation import get_benchmark
    from ..metrics import JavaError

    _check(arguments)
    benchmark = get_benchmark(arguments.benchmark) if arguments.benchmark else None
    splits = arguments.split or (benchmark.default_splits if benchmark else [None])
    if len(splits) > 1 and (arguments.results or arguments.references):
        raise ValueError(f"--results and --references are of one split: add --split and one of {', '.join(splits)}")
    card = _card_folder(arguments)
    try:
        captioner = _prepare(arguments, benchmark)
        for split in splits:
            folder = Path(arguments.out) / f"{benchmark.name}-{split}" if benchmark else Path(arguments.out)
            _evaluate(arguments, benchmark, split, captioner, folder, card)
    except JavaError as error:
        raise ValueError(error) from error
    return 0


def _check(arguments):
    if (arguments.model is None) == (arguments.results is None):
        raise ValueError("give --model, whose captions are scored, or --results, a file of captions")
    if arguments.benchmark is None and arguments.references is None:
        raise ValueError("give --benchmark, or --references for a results file")
    if arguments.model and arguments.benchmark is None:
        raise ValueError("--model captions the images of a --benchmark")
    if arguments.model and arguments.references:
        raise ValueError("--references goes with --results; a benchmark's images and references are in --data")
    if arguments.split and arguments.benchmark is None:
        raise ValueError("--split is one of a --benchmark's")
    if arguments.limit and arguments.results:
        raise ValueError("--limit is for captions of a --model; a results file with fewer takes --allow-subset")
    if arguments.official_beam_search and arguments.beams < 2:
        raise ValueError("--official-beam-search needs --beams of 2 or more")


def _card_folder(arguments) -> Path | None:
    if arguments.update_card is None:
        return None
    if arguments.benchmark is None:
        raise ValueError("--update-card needs a --benchmark: a model card names it")
    folder = Path(arguments.update_card or arguments.model or "").expanduser()
    if not (arguments.update_card or arguments.model) or not folder.is_dir():
        raise ValueError("--update-card writes into a folder: name it, --update-card DIR")
    return folder


def _prepare(arguments, benchmark):
    """Finds out what is missing before an hour is spent on captions, and loads the captioner."""
    from ..evaluation import default_metrics
    from ..metrics import METRICS, check_requirements

    tokenizer = arguments.tokenizer or (benchmark.tokenizer if benchmark else "ptb")
    arguments.metrics = arguments.metrics or default_metrics(benchmark, tokenizer, arguments.spice_home)
    if unknown := set(arguments.metrics) - set(METRICS):
        raise ValueError(f"unknown metrics {', '.join(sorted(unknown))}; choose from {', '.join(METRICS)}")
    check_requirements(arguments.metrics, tokenizer, arguments.spice_home)
    if arguments.model is None:
        return None
    return load_captioner(arguments.model, arguments.device, arguments.dtype)


def _evaluate(arguments, benchmark, split, captioner, folder: Path, card: Path | None):
    from ..evaluation import (
        evaluate_captions,
        load_evaluation_set,
        plain_summary,
        read_references,
        read_results,
        remove_progress,
        write_report,
    )
    from ..processes import process_state

    folder.mkdir(parents=True, exist_ok=True)
    if arguments.references:
        data = read_references(arguments.references)
    elif captioner is None and arguments.data is None and not benchmark.name.startswith("emoji"):
        raise ValueError(f"the references of {benchmark.title} are missing: --references FILE or --data ROOT")
    else:
        data = load_evaluation_set(benchmark, arguments.data, split)
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
    write_report(folder, report, data)
    if captioner is not None:
        remove_progress(folder, record["settings_sha256"])
    print(plain_summary(report))
    print(f"\nScores: {folder / 'scores.json'}\nPage: {folder / 'index.html'}\nCaptions: {folder / 'results.json'}")
    if card is not None:
        from ..evaluation.card import update_card

        changed = update_card(card, report)
        print(f"Model card: {', '.join(map(str, changed)) if changed else 'unchanged'}")
    print()


def _captions(arguments, captioner, data, folder: Path):
    from ..evaluation import caption_benchmark

    generate_kwargs = {"num_beams": arguments.beams}
    if arguments.official_beam_search:
        from .. import official_beam_search

        generate_kwargs["custom_generate"] = official_beam_search
    if arguments.max_new_tokens:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens
    workers = arguments.workers
    if workers is None:
        # Starting a process costs as much as reading some dozens of images.
        workers = 0 if len(data) < 64 else min(4, os.cpu_count() or 1)
    return caption_benchmark(
        *captioner,
        os.path.basename(os.path.normpath(arguments.model)) if os.path.isdir(arguments.model) else arguments.model,
        data,
        folder,
        prompt=arguments.prompt,
        batch_size=arguments.batch_size,
        num_workers=workers,
        progress=sys.stderr.isatty(),
        allow_subset=arguments.allow_subset,
        **generate_kwargs,
    )
