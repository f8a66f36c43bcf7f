"""Scoring captions by the field's benchmarks: protocol, paper's table, files, page.

    from clipcap_hf.evaluation import BENCHMARKS, evaluate_captions, read_references, read_results, write_report

    captions, data = read_results("results.json"), read_references("captions_val2014.json")
    report, data = evaluate_captions(captions, data, BENCHMARKS["coco-karpathy"], "test")
    write_report("evaluation", report, data)

`clipcap evaluate` is this on the command line, with captions of a model.
"""

from .captions import caption_benchmark, caption_evaluation_set, remove_progress
from .coco_files import read_references, read_results, write_results
from .paper import PAPER_ROWS, PaperRow, paper_rows, rows_to_compare
from .protocol import BENCHMARKS, Benchmark, EvaluationSet, get_benchmark
from .record import decoding_record, model_record
from .report import difference_lines, plain_summary, score_table, write_report
from .run import default_metrics, evaluate_captions
from .sets import load_evaluation_set


__all__ = [
    "BENCHMARKS",
    "PAPER_ROWS",
    "Benchmark",
    "EvaluationSet",
    "PaperRow",
    "caption_benchmark",
    "caption_evaluation_set",
    "decoding_record",
    "default_metrics",
    "difference_lines",
    "evaluate_captions",
    "get_benchmark",
    "load_evaluation_set",
    "model_record",
    "paper_rows",
    "plain_summary",
    "read_references",
    "read_results",
    "remove_progress",
    "rows_to_compare",
    "score_table",
    "write_report",
    "write_results",
]
