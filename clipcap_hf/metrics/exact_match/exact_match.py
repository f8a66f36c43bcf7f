"""Exact match as an `evaluate` module; the formula is in `clipcap_hf.metrics.formulas`."""

from clipcap_hf.metrics import evaluate_module


class ExactMatch(evaluate_module.CaptionMetric):
    """Exact match."""

    metric = "exact_match"
    description_text = """
Exact match: the share of images whose caption equals one of the references, 0 to 1, when case, width of letters,
punctuation and white space are ignored. It works on the text itself and needs no tokenizer.
"""
    citation_text = ""
    inputs_text = (
        evaluate_module.INPUTS
        + """
Returns:
    exact_match (`float`), num_images (`int`)
"""
    )
