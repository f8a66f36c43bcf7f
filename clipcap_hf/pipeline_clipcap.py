"""`pipeline("image-captioning", ...)`."""

import os

import torch
from transformers import Pipeline


class ImageCaptioningPipeline(Pipeline):
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
        outputs = self.model.generate(
            **model_inputs, **generate_kwargs, return_dict_in_generate=True, output_logits=return_scores
        )
        batch_size, prompt_length = model_inputs["input_ids"].shape
        results = {"sequences": outputs.sequences.unflatten(0, (batch_size, -1))}
        if return_scores:
            scores = self._scores(outputs, prompt_length, **generate_kwargs)
            results["scores"] = scores.unflatten(0, (batch_size, -1))
        return results

    def _scores(self, outputs, prompt_length, generation_config=None, **generate_kwargs):
        # Beam search keeps the scores; otherwise they are those of the tokens that were taken.
        logprobs = self.model.compute_transition_scores(
            outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
        )
        generated = outputs.sequences[:, prompt_length : prompt_length + logprobs.shape[1]]
        real = logprobs.isfinite()
        generation_config = generation_config or self.model.generation_config
        eos_token_id = generate_kwargs.get("eos_token_id", generation_config.eos_token_id)
        if eos_token_id is not None:
            ends = torch.isin(generated, torch.as_tensor(eos_token_id, device=generated.device)).long()
            real &= ends.cumsum(-1) - ends == 0  # the end token counts, what follows is padding
        return logprobs.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)

    def postprocess(self, model_outputs):
        texts = self.processor.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        records = [{"generated_text": text.strip()} for text in texts]
        if "scores" in model_outputs:
            for record, score in zip(records, model_outputs["scores"][0].tolist()):
                record["score"] = score
        return records

    def save_pretrained(self, save_directory: str | os.PathLike, save_frozen: bool | None = None, **kwargs):
        # Pipeline's own leaves the processor out, copies this file beside the weights, and thereby makes every reload ask
        # for `trust_remote_code`.
        self.model.save_pretrained(save_directory, save_frozen=save_frozen, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["ImageCaptioningPipeline"]
