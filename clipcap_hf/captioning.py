"""Caption many images: read files (threads or processes), run the model on batches, report unreadable files."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from .drawings import looks_drawn
from .model.generation_clipcap import mean_log_probs
from .model.images_clipcap import edge_that_is_enough, stored_images
from .model.modeling_clipcap import ClipCapForConditionalGeneration
from .model.modeling_vision import place_pixels
from .model.processing_clipcap import ClipCapProcessor, load_image
from .processes import in_threads, process_state


logger = logging.getLogger(__name__)

_ERRORS = (ValueError, OSError, MemoryError)  # of an image that cannot be read
_READ_ANEW = (str, os.PathLike, bytes, dict)  # whoever reads these opens them itself, so several threads may


@dataclass
class CaptionedImage:
    """Result for one image: its `captions`, best first, or an `error` that says why there are none.

    On request, `scores` holds the mean log-probability of each caption's tokens, `prefix_tokens` the texts and cosines
    of the tokens nearest to each prefix vector, and `drawn` says whether the image looks like a drawing.
    """

    path: str | None = None
    captions: list[str] = field(default_factory=list)
    error: str | None = None
    scores: list[float] | None = None
    prefix_tokens: list[list[tuple[str, float]]] | None = None
    drawn: bool | None = None


def check_takes_images(processor: ClipCapProcessor):
    """Refuse images for a captioner that has no image processor."""
    if processor.image_processor is None:
        raise ValueError(
            "This captioner has no image processor: it works on CLIP embeddings alone, or its processor_config.json "
            "has lost its `image_processor`."
        )


@dataclass
class _Batch:
    """A batch of images, read and preprocessed; those with an error are not among the pixels."""

    pixels: torch.Tensor  # (readable images, 3, height, width)
    drawn: list[bool | None]
    errors: list[str | None]


class _Read(NamedTuple):
    """An image, read and preprocessed, or an error."""

    pixels: torch.Tensor | None
    drawn: bool | None
    error: str | None


def _unreadable(error: Exception) -> _Read:
    return _Read(None, None, str(error) or type(error).__name__)


class _Images(Dataset):
    """Images that are read and preprocessed when indexed, many at once.

    Workers send a batch as one tensor, since each tensor on its way takes an open file.
    """

    def __init__(self, images: Sequence, processor: ClipCapProcessor, tell_drawings: bool, reduce_jpeg: bool):
        self.images = stored_images(images)
        self.image_processor = processor.image_processor
        self.tell_drawings = tell_drawings
        self.enough = edge_that_is_enough(self.image_processor) if reduce_jpeg else None

    def __getitem__(self, indices: range) -> _Batch:
        pixels, drawn, errors = zip(*in_threads(self._read, [self._fetch(index) for index in indices]))
        readable = [image for image in pixels if image is not None]
        # A worker's `default_collate` puts them together in memory that both processes share.
        return _Batch(default_collate(readable) if readable else torch.empty(0), list(drawn), list(errors))

    def _fetch(self, index: int) -> Any:
        """Return what a thread is to read, or, read already, what several threads must not read at the same time.

        That is an image or file which is open: it has one position, and the sequence may hold it twice.
        """
        try:
            image = self.images[index]
        except _ERRORS as error:
            return _unreadable(error)
        return image if isinstance(image, _READ_ANEW) else self._read(image)

    def _read(self, image: Any) -> _Read:
        if isinstance(image, _Read):
            return image
        try:
            image = load_image(image, enough=self.enough)
            pixels = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
            return _Read(pixels, looks_drawn(image) if self.tell_drawings else None, None)
        except _ERRORS as error:
            return _unreadable(error)


def caption_files(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    paths: list[str],
    batch_size: int = 32,
    num_workers: int = 0,
    prompt: str | None = None,
    progress: bool = True,
    explain: int = 0,
    tell_drawings: bool = False,
    reduce_jpeg: bool = False,
    **generate_kwargs,
) -> Iterator[CaptionedImage]:
    """Caption image files.

    Under `torchrun` or `accelerate launch` the processes divide the files, batch by batch. Each process must iterate
    over all results; each gets all of them, in the order of `paths`.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner, on the device to use.
        processor ([`ClipCapProcessor`]): Its processor.
        paths (`list[str]`): Image files.
        batch_size (`int`): Images that go through the model at once.
        num_workers (`int`): Processes that read and resize images. With 0, threads of this process read them between
            two batches.
        prompt (`str`, *optional*): A beginning that every caption continues.
        progress (`bool`): Show a progress bar on standard error.
        explain (`int`): How many nearest tokens to return for each prefix vector, see
            [`ClipCapForConditionalGeneration.interpret_prefix`].
        tell_drawings (`bool`): Also tell whether each image looks like a drawing.
        reduce_jpeg (`bool`): Read large JPEG files at a half, a quarter or an eighth of their size, which is faster,
            where that is still twice the size that the vision tower needs. Pixels then differ a little.
        generate_kwargs: For `generate()`: `num_beams`, `num_return_sequences`, `max_new_tokens`, `rerank`, ...

    Yields:
        [`CaptionedImage`]: One for each path, in order. A file that cannot be read gets an error and stops nothing.
    """
    process = process_state()
    stride = process.num_processes * batch_size
    own = [
        path
        for start in range(process.process_index * batch_size, len(paths), stride)
        for path in paths[start : start + batch_size]
    ]
    progress = progress and process.is_main_process
    captioned = caption_images(
        model,
        processor,
        own,
        batch_size,
        num_workers,
        prompt,
        progress,
        explain,
        tell_drawings,
        reduce_jpeg,
        **generate_kwargs,
    )
    results = (replace(result, path=path) for result, path in zip(captioned, own))
    if process.num_processes == 1:
        yield from results
        return
    for _ in range(0, len(paths), stride):
        yield from gather_object(list(islice(results, batch_size)))


def caption_images(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    images: Sequence,
    batch_size: int = 32,
    num_workers: int = 0,
    prompt: str | None = None,
    progress: bool = True,
    explain: int = 0,
    tell_drawings: bool = False,
    reduce_jpeg: bool = False,
    **generate_kwargs,
) -> Iterator[CaptionedImage]:
    """Caption the images of any sequence, such as a column of a data set. Each is fetched by its index when needed.

    The arguments are those of [`caption_files`], except that `images` may be PIL images, paths or URLs.

    Yields:
        [`CaptionedImage`]: One for each image, in order, without a path.
    """
    check_takes_images(processor)
    read = _Images(images, processor, tell_drawings, reduce_jpeg)
    first, *others = _growing_batches(len(images), batch_size) or [range(0)]
    loader = DataLoader(read, batch_size=None, sampler=others, num_workers=num_workers)
    # Read the first batch here, so that its captions need not wait for the workers to start.
    batches = chain([read[first]] if first else [], loader)
    fits = batch_size
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for batch in batches:
            captioned, fits = _caption_what_fits(
                batch.pixels,
                fits,
                lambda part: caption_pixels(model, processor, part, prompt, explain, **generate_kwargs),
            )
            of_readable = iter(captioned)
            for drawn, error in zip(batch.drawn, batch.errors):
                yield CaptionedImage(error=error) if error else replace(next(of_readable), drawn=drawn)
            bar.update(len(batch.errors))


def _growing_batches(images: int, batch_size: int) -> list[range]:
    """Return the indices of each batch. The first batches are small, so that the first captions come soon."""
    batches, start, size = [], 0, 1
    while start < images:
        batches.append(range(start, min(start + size, images)))
        start, size = start + size, min(4 * size, batch_size)
    return batches


def _caption_what_fits(pixels: torch.Tensor, fits: int, caption: Callable[[torch.Tensor], list]) -> tuple[list, int]:
    """Caption a batch, halving it until it fits into memory; return the captions and the size that fitted."""
    captioned: list[CaptionedImage] = []
    while len(captioned) < len(pixels):
        part = pixels[len(captioned) : len(captioned) + fits]
        try:
            captioned += caption(part)
        except RuntimeError as error:
            if len(part) == 1 or not should_reduce_batch_size(error):
                raise
            fits = len(part) // 2
        else:
            continue
        # Outside of `except`: the error no longer keeps the tensors that filled the memory alive.
        clear_device_cache(garbage_collection=True)
        logger.warning(f"{len(part)} images do not fit into memory at once; continuing with {fits}.")
    return captioned, fits


def caption_pixels(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    pixels: torch.Tensor | Sequence[torch.Tensor],
    prompt: str | None = None,
    explain: int = 0,
    scores: bool = False,
    **generate_kwargs,
) -> list[CaptionedImage]:
    """Caption one batch of preprocessed images.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        processor ([`ClipCapProcessor`]): Its processor.
        pixels (`torch.Tensor` of shape `(images, 3, height, width)`, or a sequence of images): From the image
            processor.
        prompt, explain, generate_kwargs: See [`caption_files`].
        scores (`bool`): Also give the mean log-probability of each caption's tokens.
    """
    if len(pixels) == 0:
        return []
    if not isinstance(pixels, torch.Tensor):
        pixels = torch.stack(list(pixels))
    inputs = processor.tokenize_prompts(prompt, len(pixels), return_tensors="pt").to(model.device)
    pixel_values = place_pixels(pixels, model.device)
    results = [CaptionedImage() for _ in pixels]
    images: dict[str, Any] = {"pixel_values": pixel_values}
    reranks = generate_kwargs.get("rerank") is not None  # needs the embedding itself, not only the prefix
    if explain or not reranks:
        with torch.no_grad():
            image_outputs = model.get_image_features(pixel_values, return_dict=True)
        if not reranks:
            images = {"mm_encoder_outputs": {"image": image_outputs}}
    if explain:  # first, since beam search repeats the prefix in place
        nearest: Any = model.interpret_prefix(prefix=image_outputs.pooler_output, k=explain, tokenizer=processor)
        for result, tokens, cosines in zip(results, nearest.tokens, nearest.cosines.tolist()):
            result.prefix_tokens = [list(zip(*vector)) for vector in zip(tokens, cosines)]
    if scores:
        generate_kwargs = {**generate_kwargs, "return_dict_in_generate": True, "output_logits": True}
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **images,
        **generate_kwargs,
    )
    captions = _texts_of_images(processor, outputs.sequences if scores else outputs, len(pixels))
    for result, of_image in zip(results, captions):
        result.captions = of_image
    if scores:
        means = mean_log_probs(model, outputs, inputs["input_ids"].shape[1], **generate_kwargs)
        for result, of_image in zip(results, means.unflatten(0, (len(pixels), -1)).tolist()):
            result.scores = of_image
    return results


def caption_embeds(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    clip_embeds: torch.Tensor,
    batch_size: int = 256,
    progress: bool = True,
    **generate_kwargs,
) -> list[str]:
    """Return the best caption of each CLIP embedding.

    Args:
        model ([`ClipCapForConditionalGeneration`]): The captioner.
        processor ([`ClipCapProcessor`]): Its processor.
        clip_embeds (`torch.Tensor` of shape `(images, clip_embed_dim)`): From `model.get_clip_embeds`; for patches
            of shape `(images, patches, clip_embed_dim)`.
        batch_size (`int`): Embeddings that go through the model at once.
        progress (`bool`): Show a progress bar on standard error.
        generate_kwargs: For `generate()`.
    """
    captions = []
    prompt = processor.tokenize_prompts(None, 1, return_tensors="pt").to(model.device)
    for start in tqdm(range(0, len(clip_embeds), batch_size), unit="batch", desc="Captioning", disable=not progress):
        batch = clip_embeds[start : start + batch_size].to(model.device)
        tokens = {name: value.expand(len(batch), -1) for name, value in prompt.items()}
        sequences = model.generate(clip_embeds=batch, **tokens, **generate_kwargs)
        captions += [best for best, *_ in _texts_of_images(processor, sequences, len(batch))]
    return captions


def _texts_of_images(processor, sequences: torch.Tensor, images: int) -> list[list[str]]:
    texts = [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    per_image = len(texts) // images
    return [texts[start : start + per_image] for start in range(0, len(texts), per_image)]


def embed_images(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    images: Sequence,
    batch_size: int = 16,
    progress: bool = True,
    desc: str = "Embedding",
) -> torch.Tensor:
    """Embed images with the vision tower, each once.

    Args:
        model ([`ClipCapForConditionalGeneration`]): A captioner with a vision tower.
        processor ([`ClipCapProcessor`]): Its processor.
        images (sequence): Images, paths or URLs, for example the `image` column of a data set.
        batch_size (`int`): Images that go through the tower at once. Small batches stay in a CPU's cache; use larger
            ones on an accelerator.
        progress (`bool`): Show a progress bar on standard error.
        desc (`str`): What the progress bar says.

    Returns:
        `torch.Tensor` of shape `(images, clip_embed_dim)`, or `(images, clip_length, clip_embed_dim)` for patches, on
        the CPU.
    """
    embeds = []
    images = stored_images(images)
    with torch.inference_mode(), tqdm(total=len(images), unit="image", desc=desc, disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            batch = [load_image(image) for image in images[start : start + batch_size]]
            pixel_values = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
            embeds.append(model.get_clip_embeds(place_pixels(pixel_values, model.device)).float().cpu())
            bar.update(len(batch))
    return torch.cat(embeds)
