"""The image-captioning pipeline: `pipeline("image-captioning", ...)`."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .generation_clipcap import mean_log_probs
from .hub_clipcap import add_code
from .images_clipcap import shorten, stored_images
from .model_card_clipcap import PushesModelCard, write_model_card
from .reranking_clipcap import as_reranker


class ImageCaptioningPipeline(PushesModelCard, Pipeline):
    r"""
    Caption images: `pipeline("image-captioning", model=...)`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import clipcap_hf

    >>> captioner = pipeline("image-captioning", model=clipcap_hf.EMOJI_MINI)
    >>> captions = captioner([Image.new("RGB", (64, 64), "red")] * 2, batch_size=2, num_beams=3)
    >>> len(captions), sorted(captions[0][0])
    (2, ['generated_text'])

    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _push_with_code = False

    def _sanitize_parameters(
        self,
        prompt=None,
        timeout=None,
        return_scores=None,
        rerank=None,
        max_new_tokens=None,
        generate_kwargs=None,
        **generation_parameters,
    ):
        # All other arguments go to generate(): `num_beams=3`, `num_return_sequences=5`, ...
        generate_kwargs = {**(generate_kwargs or {}), **generation_parameters}
        if max_new_tokens is not None:
            generate_kwargs["max_new_tokens"] = max_new_tokens
        preprocess = {"prompt": prompt, "timeout": timeout}
        preprocess = {name: value for name, value in preprocess.items() if value is not None}
        # Flat, so that a call's arguments add to those of the constructor.
        forward = generate_kwargs
        if return_scores is not None:
            forward["return_scores"] = return_scores
        if rerank is not None:
            forward["rerank"] = self._reranker(rerank)
        return preprocess, forward, {}

    def _reranker(self, rerank):
        """Load the text tower of each name once."""
        if not isinstance(rerank, (bool, str, os.PathLike)):
            return rerank
        loaded = self.__dict__.setdefault("_rerankers", {})
        if rerank not in loaded:
            loaded[rerank] = as_reranker(rerank, self.model, self.processor)
        return loaded[rerank]

    def __call__(self, images, **kwargs):
        r"""
        Caption one image or several.

        Args:
            images (path, URL, bytes, base64 text, array, `PIL.Image.Image`, a list of them, or a dataset): What to
                caption, see [`~clipcap_hf.model.images_clipcap.load_image`]. Pass several images as a list, an array
                (batch, height, width, channels), a column of `datasets` (`dataset["image"]`), a data set with a column
                `image`, or a generator; `batch_size=` batches them. Pass a video as `{"video": VIDEO}`, in any form
                that the processor accepts.
            kwargs: `prompt` (`str`), which every caption continues; `timeout` (`float`), seconds for the whole
                download of each URL; `return_scores` (`bool`), to add a `score`, the mean log-probability of the
                caption's tokens; `rerank` (`True`, the name of a CLIP, or a [`CaptionReranker`]), to choose among the
                captions of `num_beams=10` by the CLIP's text tower; `max_new_tokens`, `num_beams`,
                `num_return_sequences` and every other argument of `generate()`, also as `generate_kwargs`.

        Returns:
            For one image, a `list[dict]` with the `generated_text` of each caption, prompt included. For several, a
            list of such lists, or an iterator over them for a generator or a torch data set.
        """
        images, several = _as_pipeline_input(images)
        if several and len(images) == 0:
            return []
        outputs = super().__call__(images, **kwargs)
        return list(outputs) if several else outputs

    def preprocess(self, image, prompt=None, timeout=None):
        if isinstance(image, dict) and "video" in image:
            inputs = self.processor(videos=[image["video"]], text=prompt, return_tensors="pt")
        else:
            inputs = self.processor(images=[_of_row(image)], text=prompt, timeout=timeout, return_tensors="pt")
        if len(inputs["input_ids"]) != 1:
            raise ValueError(
                f"Expected one image or video, got {len(inputs['input_ids'])} in a nested list or array: pass them as "
                "one flat list."
            )
        return inputs.to(dtype=self.dtype)

    def _forward(self, model_inputs, return_scores=False, **generate_kwargs):
        if return_scores:
            generate_kwargs = {**generate_kwargs, "return_dict_in_generate": True, "output_logits": True}
        if generate_kwargs.get("stop_strings"):
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
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
        Save model, processor and, unless the folder has one, a model card.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            save_frozen (`bool`, *optional*): See [`ClipCapForConditionalGeneration.save_pretrained`].
            with_code (`bool`, *optional*): Also save the code next to the weights, for users without this package; see
                [`add_code`].
            kwargs: Arguments of the model's `save_pretrained` (`max_shard_size`, ...).
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "Use the pipeline's `push_to_hub(repo_id)`: it pushes model, processor and card in one commit."
            )
        # Pipeline's own method omits the processor, and copies only this file next to the weights.
        self.model.save_pretrained(save_directory, save_frozen=save_frozen, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)
        if self._push_with_code if with_code is None else with_code:
            add_code(save_directory)
        write_model_card(save_directory)

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **kwargs):
        r"""
        Push model, processor and model card to the Hub in one commit.

        Args:
            repo_id (`str`): The repository.
            with_code (`bool`): As in [`save_pretrained`](#save_pretrained).
            kwargs: As in transformers: `private`, `token`, `revision`, `max_shard_size`, `commit_message`, ...
        """
        self._push_with_code = with_code  # transformers' push_to_hub does not pass it on to save_pretrained
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._push_with_code = False


class _Rows(torch.utils.data.Dataset):
    """A column or data set, read lazily row by row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


def _as_pipeline_input(images: Any) -> tuple[Any, bool]:
    """Convert images to a form that `Pipeline` accepts, and tell whether their captions should be a list."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return (list(images), True) if images.ndim == 4 else (images, False)
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, dict, Image.Image)) or hasattr(
        images, "read"
    ):
        return images, False
    if isinstance(images, (list, tuple)):
        return list(images), True
    if isinstance(images, torch.utils.data.Dataset):
        return images, False
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return _Rows(stored_images(images)), True
    if isinstance(images, Iterable):
        return (image for image in images), False
    raise ValueError(f"{shorten(type(images).__name__)}: neither an image nor a collection of images")


def _of_row(image: Any) -> Any:
    """Return the image in a data set's row, or the image itself."""
    if not isinstance(image, dict) or "bytes" in image or "path" in image:
        return image
    if "image" not in image:
        found = shorten(", ".join(map(str, image)) or "nothing")
        raise ValueError(f'A row needs a column `image`, but this one has {found}: pass `dataset["COLUMN"]`.')
    return image["image"]


__all__ = ["ImageCaptioningPipeline"]
