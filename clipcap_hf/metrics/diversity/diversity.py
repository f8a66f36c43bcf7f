"""Diversity of captions as an `evaluate` module; the formulas are in `clipcap_hf.metrics.formulas`."""

import datasets
from clipcap_hf.metrics import evaluate_module


class Diversity(evaluate_module.CaptionMetric):
    """distinct-1, distinct-2, vocabulary size and mean length; takes captions only."""

    metric = "diversity"
    description_text = """
How varied captions are: distinct-1 and distinct-2 (different words and word pairs over the number of all words), the
number of different words, and the mean number of words a caption.
"""
    citation_text = """
@inproceedings{li2016diversity,
  title={A diversity-promoting objective function for neural conversation models},
  author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle={NAACL},
  year={2016}
}
"""
    reference_urls_list = ("https://aclanthology.org/N16-1014",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
Returns:
    distinct_1, distinct_2, vocabulary_size, mean_length (`float`), num_images (`int`), tokenizer (`str`)
"""
    )

    def _features(self):
        return datasets.Features({"predictions": datasets.Value("string")})

    def _check(self, batch):
        return {"predictions": evaluate_module.check_predictions(batch["predictions"])}
