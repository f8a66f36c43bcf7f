"""SPICE as an `evaluate` module; how it is computed is in `clipcap_hf.metrics.java_scores`."""

from clipcap_hf.metrics import evaluate_module


class Spice(evaluate_module.CaptionMetric):
    """SPICE 1.0, by its authors' Java program, whose jars the user supplies."""

    metric = "spice"
    description_text = """
SPICE for English: F-score of the scene-graph tuples of caption and references, 0 to 1. It needs Java and jars that are
not shipped: name their folder by `spice_home` or the environment variable CLIPCAP_SPICE_HOME.
"""
    citation_text = """
@inproceedings{anderson2016spice,
  title={{SPICE}: Semantic propositional image caption evaluation},
  author={Anderson, Peter and Fernando, Basura and Johnson, Mark and Gould, Stephen},
  booktitle={ECCV},
  year={2016}
}
"""
    reference_urls_list = ("https://arxiv.org/abs/1607.08822",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
    spice_home (`str`, *optional*): the folder with the jars; when loading the metric or when computing it.
Returns:
    spice (`float`), num_images (`int`), tokenizer (`str`)
"""
    )
    option_names = (*evaluate_module.CaptionMetric.option_names, "spice_home")
