"""CIDEr-D as an `evaluate` module; the formula is in `clipcap_hf.metrics.formulas`."""

from clipcap_hf.metrics import evaluate_module


class Cider(evaluate_module.CaptionMetric):
    """CIDEr-D, which the field reports as "CIDEr"."""

    metric = "cider"
    description_text = """
CIDEr-D: how much a caption agrees with its references in n-grams of 1 to 4 words weighted by tf-idf, 0 to 10. It
equals the "CIDEr" of the COCO caption evaluation. The document frequencies come from all references scored, or from
`document_frequencies`; with a single image and without them, CIDEr is 0 by definition.
"""
    citation_text = """
@inproceedings{vedantam2015cider,
  title={{CIDEr}: Consensus-based image description evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""
    reference_urls_list = ("https://arxiv.org/abs/1411.5726",)
    inputs_text = (
        evaluate_module.INPUTS
        + """
    document_frequencies (`dict` or path of a JSON file, *optional*): what
        `clipcap_hf.metrics.document_frequencies` makes of the references of another corpus.
Returns:
    cider (`float`), num_images (`int`), tokenizer (`str`)
"""
    )
    option_names = (*evaluate_module.CaptionMetric.option_names, "document_frequencies")
