"""METEOR as an `evaluate` module; how it is computed is in `clipcap_hf.metrics.java_scores`."""

from clipcap_hf.metrics import evaluate_module


class Meteor(evaluate_module.CaptionMetric):
    """METEOR 1.5, by its authors' Java program."""

    metric = "meteor"
    description_text = """
METEOR 1.5 for English: alignment of caption and reference by words, stems, synonyms and paraphrases, 0 to 1. It equals
the METEOR of the COCO caption evaluation, and needs Java and the package pycocoevalcap.
"""
    citation_text = """
@inproceedings{denkowski2014meteor,
  title={Meteor Universal: Language specific translation evaluation for any target language},
  author={Denkowski, Michael and Lavie, Alon},
  booktitle={WMT},
  year={2014}
}
"""
    reference_urls_list = ("https://aclanthology.org/W14-3348",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
Returns:
    meteor (`float`), num_images (`int`), tokenizer (`str`)
"""
    )
