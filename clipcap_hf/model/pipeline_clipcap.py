"""`pipeline("image-captioning", ...)`."""

import os

import torch
from transformers import Pipeline

from .generation_clipcap import mean_log_probs
from .hub_clipcap import add_code
from .model_card_clipcap import PushesModelCard, write_model_card


class ImageCaptioningPipeline(PushesModelCard, Pipeline):
    r"""
    Captions for images: `pipeline("image-captioning", model=...)`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import clipcap_hf

    >>> captioner = pipeline("image-captioning", model=clipcap_hf.EMOJI_MINI)
    >>> captions = captioner([Image.new("RGB", (64, 64), "red")] * 2, batch_size=2, num_beams=3)
    >>> len(captions), sorted(captions[0][0])
    (2, ['generated_text'])

    ```"""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _push_with_code = False

    def _sanitize_parameters(
        self, prompt=None, return_scores=None, max_new_tokens=None, generate_kwargs=None, **generation_parameters
    ):
        # Anything that is not the pipeline's own is for generate(): `num_beams=3`, `num_return_sequences=5`, ...
        generate_kwargs = {**(generate_kwargs or {}), **generation_parameters}
        if max_new_tokens is not None:
            generate_kwargs["max_new_tokens"] = max_new_tokens
        preprocess = {} if prompt is None else {"prompt": prompt}
        # Flat, so that what is given at a call is added to what was given at the start.
        forward = generate_kwargs
        if return_scores is not None:
            forward["return_scores"] = return_scores
        return preprocess, forward, {}

    def __call__(self, images, **kwargs):
        r"""
        Args:
            images (path, URL, `PIL.Image.Image`, a list of them, or a dataset): What to caption. A list may be batched
                with `batch_size=`. A video is given as `{"video": VIDEO}`, with anything that the processor takes as one.
            kwargs: `prompt` (`str`), a beginning that every caption continues; `return_scores` (`bool`), adds the
                `score`, the mean log-probability of the caption's tokens; `max_new_tokens`, `num_beams`,
                `num_return_sequences` and every other argument of `generate()`, also as `generate_kwargs`.

        Returns:
            `list[dict]` for one image, a list of them for several: `generated_text`, prompt included, of each caption.
        """
        return super().__call__(images, **kwargs)

    def preprocess(self, image, prompt=None):
        is_video = isinstance(image, dict) and "video" in image
        visual = {"videos": [image["video"]]} if is_video else {"images": [image]}
        inputs = self.processor(**visual, text=prompt, return_tensors="pt")
        return inputs.to(dtype=self.dtype)

    def _forward(self, model_inputs, return_scores=False, **generate_kwargs):
        if return_scores:
            generate_kwargs = {**generate_kwargs, "return_dict_in_generate": True, "output_logits": True}
        outputs = self.model.generate(**model_inputs, **generate_kwargs)
        batch_size, prompt_length = model_inputs["input_ids"].shape
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        results = {"sequences": sequences.unflatten(0, (batch_size, -1))}
        if return_scores:
            scores = mean_log_probs(self.model, outputs, prompt_length, **generate_kwargs)
            results["scores"] = scores.unflatten(0, (batch_size, -1))
        return results

    def postprocess(self, model_outputs):
        texts = self.processor.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        records = [{"generated_text": text.strip()} for text in texts]
        if "scores" in model_outputs:
            for record, score in zip(records, model_outputs["scores"][0].tolist()):
                record["score"] = score
        return records

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        save_frozen: bool | None = None,
        with_code: bool | None = None,
        **kwargs,
    ):
        r"""
        Save model, processor and, where there is none, a model card.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            save_frozen (`bool`, *optional*): See [`ClipCapForConditionalGeneration.save_pretrained`].
            with_code (`bool`, *optional*): Put the code beside the weights, too, for people without this package; see
                [`add_code`].
            kwargs: For `save_pretrained` of model and processor (`max_shard_size`, ...).
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "Use `push_to_hub(repo_id)` of the pipeline: it pushes model, processor and card in one commit."
            )
        # Pipeline's own leaves the processor out, and copies this file alone beside the weights.
        self.model.save_pretrained(save_directory, save_frozen=save_frozen, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self._push_with_code if with_code is None else with_code:
            add_code(save_directory)
        write_model_card(save_directory)

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **kwargs):
        r"""
        Push model, processor and model card to the Hub, in one commit.

        Args:
            repo_id (`str`): The repository.
            with_code (`bool`): As in [`save_pretrained`](#save_pretrained).
            kwargs: As in transformers: `private`, `token`, `revision`, `max_shard_size`, `commit_message`, ...
        """
        self._push_with_code = with_code  # push_to_hub of transformers hands no such thing to save_pretrained
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._push_with_code = False


__all__ = ["ImageCaptioningPipeline"]
