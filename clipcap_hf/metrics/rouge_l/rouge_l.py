"""ROUGE-L as an `evaluate` module; the formula is in `clipcap_hf.metrics.formulas`."""

from clipcap_hf.metrics import evaluate_module


class RougeL(evaluate_module.CaptionMetric):
    """ROUGE-L."""

    metric = "rouge_l"
    description_text = """
ROUGE-L: F-measure (beta 1.2) of the longest common subsequence of caption and reference, best over the references and
averaged over images, 0 to 1. It equals the ROUGE-L of the COCO caption evaluation.
"""
    citation_text = """
@inproceedings{lin2004rouge,
  title={{ROUGE}: A package for automatic evaluation of summaries},
  author={Lin, Chin-Yew},
  booktitle={Text summarization branches out},
  year={2004}
}
"""
    reference_urls_list = ("https://aclanthology.org/W04-1013",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
Returns:
    rouge_l (`float`), num_images (`int`), tokenizer (`str`)
"""
    )
