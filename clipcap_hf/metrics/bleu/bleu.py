"""BLEU-1 to BLEU-4 as an `evaluate` module; the formula is in `clipcap_hf.metrics.formulas`."""

from clipcap_hf.metrics import evaluate_module


class Bleu(evaluate_module.CaptionMetric):
    """BLEU-1 to BLEU-4."""

    metric = "bleu"
    description_text = """
BLEU-1 to BLEU-4: n-gram precision of the captions over the whole corpus with a brevity penalty by the closest
reference length, 0 to 1. It equals the BLEU of the COCO caption evaluation.
"""
    citation_text = """
@inproceedings{papineni2002bleu,
  title={{BLEU}: a method for automatic evaluation of machine translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={ACL},
  year={2002}
}
"""
    reference_urls_list = ("https://aclanthology.org/P02-1040",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4 (`float`), num_images (`int`), tokenizer (`str`)
"""
    )
