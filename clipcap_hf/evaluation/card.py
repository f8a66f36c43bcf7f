"""Write scores into a model's repository: `model-index` and a table in README.md, and `.eval_results/*.yaml`.

The rest of the card keeps every byte. Writing the same scores again changes nothing.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump

from ..files import write_text
from .paper import ENTIRE
from .report import difference_lines, diversity_line, parts, score_table
from .run import DIVERSITY, METRIC_TITLES


TASK = "image-to-text"
HEADING = "## Evaluation"
FRONT_MATTER = re.compile(r"\A(\ufeff?---[ \t]*\r?\n)(.*?)(^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)


def update_card(folder: str | Path, report: Mapping[str, Any]) -> list[Path]:
    """Write a report of `clipcap_hf.evaluation.evaluate_captions` into a model's folder.

    README.md, created if missing, gets the scores as `model-index` metadata and as a table. The file
    `.eval_results/clipcap-BENCHMARK-SPLIT.yaml` gets them in the Hub's newer format. An earlier report on the same
    benchmark and split is replaced; all other results are kept.

    Args:
        folder (`str` or `Path`): The model's folder, as `save_pretrained` writes it, or a clone of its repository.
        report (`Mapping`): The report of [`evaluate_captions`] on a benchmark.

    Returns:
        `list[Path]`: The files that changed; none if they had these scores already.

    Raises:
        ValueError: If the report names no benchmark, or the card's metadata cannot be read.
        FileNotFoundError: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to write a model card to.")
    if not report["benchmark"]:
        raise ValueError("A model card names the benchmark of a score: evaluate with --benchmark.")
    card = folder / "README.md"
    old = card.read_bytes().decode("utf-8") if card.exists() else None
    results = folder / ".eval_results" / f"clipcap-{report['benchmark']}-{report['split']}.yaml"
    entries = yaml_dump(eval_result_entries_to_yaml(_entries(report)), sort_keys=False)
    changed = []
    for path, text in ((card, _updated_card(old, report, folder)), (results, entries)):
        if not path.exists() or path.read_bytes() != text.encode("utf-8"):
            write_text(path, text)
            changed.append(path)
    return changed


def _values(report: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """List every score as (domain, metric, value in percent with two digits)."""
    return [
        (part, metric, round(value, 2))
        for part, scores in report["scores"].items()
        for metric, value in scores.items()
        if metric not in DIVERSITY
    ]


def _eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    complete = report["protocol"]["complete"]
    part_of_split = {} if complete else {"images": report["images"][ENTIRE]}
    title = report["title"] if complete else f"{report['title']} ({report['images'][ENTIRE]} images only)"
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image captioning",
            dataset_type=report["dataset_id"],
            dataset_name=title if part == ENTIRE else f"{title}, {part}",
            dataset_config=None if part == ENTIRE else part,
            dataset_split=report["split"],
            metric_type=metric,
            metric_name=METRIC_TITLES[metric],
            metric_value=value,
            metric_args={"tokenizer": report["protocol"]["tokenizer"], **part_of_split},
        )
        for part, metric, value in _values(report)
    ]


def _entries(report: Mapping[str, Any]) -> list[EvalResultEntry]:
    notes = f"clipcap evaluate; {_settings(report)}"
    if not report["protocol"]["complete"]:
        notes += f"; only a part of the split: {report['images'][ENTIRE]} images"
    return [
        EvalResultEntry(
            dataset_id=report["dataset_id"],
            task_id="_".join((report["split"], *(() if part == ENTIRE else (part,)), metric)),
            value=value,
            notes=notes,
        )
        for part, metric, value in _values(report)
    ]


def _settings(report: Mapping[str, Any]) -> str:
    protocol, decoding = report["protocol"], report.get("decoding", {})
    settings = [f"tokenizer {protocol['tokenizer']}"]
    if "clip_model" in protocol:
        settings.append(f"CLIPScore by {protocol['clip_model']} in {protocol['clip_dtype']}")
    shown = ", ".join(f"{name}={value}" for name, value in decoding.items() if not name.endswith("_token_id"))
    settings.append(f"decoding {shown}" if shown else "decoding not recorded")
    return "; ".join(settings)


def _updated_card(text: str | None, report: Mapping[str, Any], folder: Path) -> str:
    if text is None:
        text = f"---\nlibrary_name: transformers\npipeline_tag: {TASK}\ntags:\n- clipcap\n- image-captioning\n---\n\n"
        text += f"# {folder.resolve().name}\n"
    line_break = "\r\n" if "\r\n" in text else "\n"
    if not FRONT_MATTER.match(text):
        text = f"---{line_break}---{line_break}{text}"
    return _with_section(_with_model_index(text, report, folder, line_break), _section(report), report, line_break)


def _with_model_index(text: str, report: Mapping[str, Any], folder: Path, line_break: str) -> str:
    """Replace the block `model-index:` of the metadata, or append one; other lines are unchanged."""
    front = FRONT_MATTER.match(text)
    assert front is not None, "the caller adds metadata where there is none"
    opening, metadata, closing = front.groups()
    try:
        known = yaml.safe_load(metadata) or {}
        index = known.get("model-index")
        own_name = report.get("model", {}).get("name") or folder.resolve().name
        name, results = model_index_to_eval_results(index) if index else (own_name, [])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The metadata of {folder / 'README.md'} cannot be read; fix it and try again: {error}"
        ) from error
    new = _eval_results(report)
    replaced = {(result.dataset_type, result.dataset_split) for result in new}
    # Keep results of others on the same data: they name a source, or a metric that is not ours.
    kept = [
        result
        for result in results
        if (result.dataset_type, result.dataset_split) not in replaced
        or result.source_url
        or result.verified
        or result.metric_name not in METRIC_TITLES.values()
    ]
    block = yaml_dump({"model-index": eval_results_to_model_index(name, kept + new)}, sort_keys=False)
    block = block.replace("\n", line_break)
    # Matches the key and the lines below it that are indented or begin a list.
    found = re.search(r"^model-index[ \t]*:.*?(?=^[^\s\-#]|\Z)", metadata, re.DOTALL | re.MULTILINE)
    if found:
        metadata = metadata[: found.start()] + block + metadata[found.end() :]
    else:
        metadata += block
    return opening + metadata + closing + text[front.end() :]


def _markers(report: Mapping[str, Any]) -> tuple[str, str]:
    name = f"clipcap evaluate: {report['benchmark']} {report['split']}"
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _section(report: Mapping[str, Any]) -> str:
    """Write the scores as Markdown between markers."""
    begin, end = _markers(report)
    lines = [begin, f"### {report['title']}, {report['split']}", ""]
    for part, title in parts(report):
        head, *rows = score_table(report, part)
        rule = "|---" + "|---:" * (len(head) - 1) + "|"
        lines += [_text(title), "", _markdown_row(head), rule, *map(_markdown_row, rows), ""]
    lines.append(_text(f"In percent; {_settings(report)}. {diversity_line(report)}"))
    if differences := difference_lines(report):
        lines += ["", *(f"- {_text(line)}" for line in differences), "", report["paper"]["unverified"]]
    for note in (*report["protocol"]["deviations"], *report["notes"]):
        lines += ["", f"Note: {_text(note)}"]
    return "\n".join([*lines, end])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in cells) + " |"


def _text(text: str) -> str:
    """Escape prompts, domains and file names, so that they cannot become HTML, a link or the end of our section."""
    return escape(" ".join(text.split()), quote=False).replace("[", "&#91;").replace("`", "&#96;")


def _with_section(text: str, section: str, report: Mapping[str, Any], line_break: str) -> str:
    begin, end = _markers(report)
    section = section.replace("\n", line_break)
    front = FRONT_MATTER.match(text)
    body = front.end() if front else 0  # skip the metadata, which may contain the same words
    start, stop = text.find(begin, body), text.find(end, body)
    if start >= 0 and stop > start:
        return text[:start] + section + text[stop + len(end) :]
    if start >= 0 or stop >= 0:
        raise ValueError(
            f"The model card has one of the lines {begin!r} and {end!r} without the other; fix it and try again."
        )
    lines = text.split(line_break)
    if HEADING in lines:  # under the heading, before the next one of its level
        place = lines.index(HEADING) + 1
        while place < len(lines) and not re.match(r"##? ", lines[place]):
            place += 1
        while not lines[place - 1].strip():
            place -= 1
        return line_break.join([*lines[:place], "", section, *lines[place:]])
    gap = next(count for count in (2, 1, 0) if text.endswith(line_break * count))
    return text + line_break * (2 - gap) + HEADING + line_break * 2 + section + line_break
