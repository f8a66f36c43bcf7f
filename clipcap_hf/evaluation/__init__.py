"""Score captions by published benchmarks: their protocols, the paper's table, result files and a page.

    from clipcap_hf.evaluation import BENCHMARKS, evaluate_captions, read_references, read_results, write_report

    captions, data = read_results("results.json"), read_references("captions_val2014.json")
    report, data = evaluate_captions(captions, data, BENCHMARKS["coco-karpathy"], "test")
    write_report("evaluation", report, data)

`clipcap evaluate` does this on the command line, with a model's captions or a results file.
"""

from .captions import caption_benchmark, caption_evaluation_set, remove_progress
from .coco_files import read_references, read_results, write_results
from .evaluation_set import EvaluationSet
from .folder import alone_in, check_folder, only_process
from .paper import PAPER_ROWS, PaperRow, paper_rows, rows_to_compare
from .protocol import BENCHMARKS, Benchmark, get_benchmark
from .record import decoding_record, model_record
from .report import difference_lines, plain_summary, score_table, write_report
from .run import default_metrics, evaluate_captions
from .sets import load_evaluation_set, load_own_images


__all__ = [
    "BENCHMARKS",
    "PAPER_ROWS",
    "Benchmark",
    "EvaluationSet",
    "PaperRow",
    "caption_benchmark",
    "caption_evaluation_set",
    "check_folder",
    "decoding_record",
    "default_metrics",
    "difference_lines",
    "evaluate_captions",
    "get_benchmark",
    "load_evaluation_set",
    "load_own_images",
    "model_record",
    "alone_in",
    "only_process",
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
