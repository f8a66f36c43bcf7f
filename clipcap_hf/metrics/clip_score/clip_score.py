"""CLIPScore and RefCLIPScore as an `evaluate` module; the formulas are in `clipcap_hf.metrics.clip`."""

import datasets
from clipcap_hf.metrics import clip, evaluate_module


class ClipScore(evaluate_module.CaptionMetric):
    """CLIPScore, and RefCLIPScore where there are references."""

    metric = "clip_score"
    description_text = """
CLIPScore: 2.5 times the cosine of caption and image in CLIP's space, at least 0. RefCLIPScore: its harmonic mean with
the largest cosine of caption and references. Comparable only between runs with the same CLIP model.
"""
    citation_text = """
@inproceedings{hessel2021clipscore,
  title={{CLIPScore}: A reference-free evaluation metric for image captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={EMNLP},
  year={2021}
}
"""
    reference_urls_list = ("https://arxiv.org/abs/2104.08718",)
    inputs_text = """
Args:
    predictions (`list[str]`): one caption per image; an empty one is legal and scores 0.
    images (`list`): the images: paths, PIL images or bytes.
    references (`list[list[str]]`, *optional*): for RefCLIPScore, the reference captions of all images, or of none.
    clip_model (`str`, defaults to "openai/clip-vit-base-patch32"): a CLIP by Hub id, folder or open_clip name; when
        loading the metric or when computing it.
    per_image (`bool`, defaults to `False`): also return `NAME_per_image`, an array with the score of each image.
Returns:
    clip_score, ref_clip_score (`float`), clip_model, clip_dtype (`str`), num_images (`int`)
"""
    option_names = (*evaluate_module.CaptionMetric.option_names, "clip_model")

    def _features(self):
        # Images stay encoded, and are opened a batch at a time: thousands of decoded ones would fill the memory.
        return datasets.Features({**super()._features(), "images": datasets.Image(decode=False)})

    def _check(self, batch):
        predictions = evaluate_module.check_predictions(batch["predictions"])
        images = clip.check_images(batch.get("images"), len(predictions))
        if batch["references"] is None:
            return {"predictions": predictions, "references": [[] for _ in predictions], "images": images}
        return {**super()._check(batch), "images": images}

    def add(self, *, prediction=None, reference=None, images=None, **kwargs):
        """Add one caption, its image (as `images`) and perhaps its references."""
        references = None if reference is None else [reference]
        self.add_batch(predictions=[prediction], references=references, images=[images], **kwargs)

    def _compute(self, *, predictions, references, images, **options):
        references = references if any(references) else None
        return super()._compute(predictions=predictions, references=references, images=images, **options)
