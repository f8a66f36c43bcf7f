"""The processor: turns prompts with images, videos or embeddings into model inputs, placeholders among them."""

import operator
import os
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .chat_template_clipcap import default_chat_template
from .configuration_clipcap import IMAGE_TOKEN, check_sizes
from .damage_clipcap import check_transform, named, naming
from .image_processing_pillow import load_saved_image_processor, named_for_pillow
from .image_processors_clipcap import load_image_processor
from .images_clipcap import flat_list_of_images, load_image, to_rgb  # noqa: F401  (also imported from here)
from .packages_clipcap import donor_folder
from .tokenization_clipcap import captioning_tokenizer, encodable
from .video_frames import list_videos
from .video_processing_clipcap import ClipCapVideoProcessor, ClipCapVideoProcessorKwargs


class ClipCapImagesKwargs(ImagesKwargs, total=False):
    r"""Arguments for the images.

    timeout (`float`, *optional*):
        Seconds for the whole download of each URL; 30 by default.
    """

    timeout: int | float | None


class ClipCapProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: ClipCapImagesKwargs  # type: ignore[misc]  # transformers' own processors narrow it, too
    videos_kwargs: ClipCapVideoProcessorKwargs  # type: ignore[misc]
    # No begin or end tokens (Llama, OPT, BERT): generate() without a prompt has none, and prompts are to be continued.
    _defaults = {"text_kwargs": {"add_special_tokens": False}}  # type: ignore[misc]  # where transformers looks


class ClipCapProcessor(ProcessorMixin):
    r"""
    Combine the image processor and the tokenizer of a [`ClipCapForConditionalGeneration`].

    Texts without `<image>` get `prefix_length` of these placeholders in front; the model replaces them by the prefix.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`], *optional*): The vision tower's own image processor.
            `None` for a captioner that takes embeddings only.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The language model's tokenizer. The processor uses
            a copy with the placeholder and a padding token (by default the end token), which pads on the left for
            generation; the training collator pads on the right.
        video_processor ([`ClipCapVideoProcessor`], *optional*): Takes frames of videos; by default, `num_frames` with
            the image processor's pixels.
        prefix_length (`int`): The model's `config.prefix_length`.
        prompt_template (`str`): The prompt that a frozen language model expects, with one `<image>`. It is put before
            each text without a placeholder, and removed from decoded captions.
        caption_start (`str`): Words that every caption starts with (`"a drawing of "`). The captioner does not write
            them: the training collator takes them off the captions, and decoding puts them in front.
        chat_template (`str`, *optional*): For [`~ProcessorMixin.apply_chat_template`]. By default, it joins the
            unchanged messages, with `prompt_template` in place of images and videos.
        kwargs: `num_frames` (`int`), the number of frames that the default video processor takes; 8 by default.
    """

    valid_processor_kwargs = ClipCapProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        prefix_length: int = 10,
        prompt_template: str = IMAGE_TOKEN,
        chat_template=None,
        caption_start: str = "",
        **kwargs,
    ):
        encodable([prompt_template, caption_start])
        if prompt_template.count(IMAGE_TOKEN) != 1:
            raise ValueError(f"`prompt_template` must hold exactly one {IMAGE_TOKEN}, got {prompt_template!r}.")
        if tokenizer is None:
            raise ValueError("ClipCapProcessor needs a tokenizer.")
        check_sizes("processor", {"prefix_length": prefix_length})
        if image_processor is not None:
            check_transform(image_processor)
        tokenizer = captioning_tokenizer(tokenizer)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id not in tokenizer(IMAGE_TOKEN)["input_ids"]:
            raise ValueError(f"The tokenizer does not read {IMAGE_TOKEN} as one token: tokenizer.json is damaged.")
        self.prefix_length = operator.index(prefix_length)  # lists and None are errors
        self.prompt_template = prompt_template
        self.caption_start = caption_start
        # Not an argument by name: transformers wants those that a call can override with the part that they belong to.
        num_frames = kwargs.pop("num_frames", ClipCapVideoProcessor.num_frames)
        if video_processor is None and image_processor is not None:
            video_processor = ClipCapVideoProcessor(image_processor, num_frames=num_frames)
        if chat_template is None:
            chat_template = default_chat_template(prompt_template)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos=None,
        clip_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Prepare the model's inputs.

        Args:
            images (anything that [`load_image`] reads, or a list, *optional*): One image per text, made upright RGB.
            text (`str` or `list[str]`, *optional*): Prompts to continue; a single one with one `<image>` is for all.
            videos (list of frames, array (frames, height, width, 3), path, or a list of them, *optional*): One video
                per text, in place of images, see [`~clipcap_hf.model.video_frames.read_frames`].
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Embeddings in place of images,
                or patch tokens `(batch, patches, clip_embed_dim)`.
            kwargs: `num_frames` (`int`), evenly spaced frames per video, by default the video processor's; `timeout`
                (`float`), seconds for each URL; and arguments of the tokenizer, the image processor and the video
                processor (`return_tensors`, `padding`, ...). Texts of unequal length are padded.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` (batch, sequence), with `clip_embeds` or
            `pixel_values`, (batch, 3, height, width) for images, (batch, frames, 3, height, width) for videos.

        Raises:
            ValueError: If nothing is given, the numbers of images and texts differ, or truncation cuts placeholders.
        """
        visual = (("images", images), ("videos", videos), ("clip_embeds", clip_embeds))
        given = [name for name, value in visual if value is not None]
        if not given and text is None:
            raise ValueError("Pass `images`, `videos`, `clip_embeds` or `text`.")
        if len(given) > 1:
            raise ValueError(f"Pass either `{given[0]}` or `{given[1]}`, not both.")
        merged = self._merge_kwargs(ClipCapProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if self.image_processor is None and (images is not None or videos is not None):
            raise ValueError("This captioner has no image processor: pass `clip_embeds` in place of `images`.")

        visual_inputs, count = {}, 0
        if images is not None:
            images, *_ = self.prepare_inputs_layout(
                images=images, timeout=merged["images_kwargs"].pop("timeout", None)
            )
            visual_inputs, count = self.image_processor(images, **merged["images_kwargs"]), len(images)
        elif videos is not None:
            if self.video_processor is None:  # the image processor was set later
                self.video_processor = ClipCapVideoProcessor(self.image_processor)
            videos = list_videos(videos, wanted=str(text).count(IMAGE_TOKEN))  # in a single text or a list of them
            # What is for images alone (open_clip's `resize_mode`) is for frames, too.
            visual_inputs = self.video_processor(videos, **{**merged["images_kwargs"], **merged["videos_kwargs"]})
            count = len(videos)
        elif clip_embeds is not None:
            visual_inputs = {"clip_embeds": _stack_embeds(clip_embeds)}
            count = len(visual_inputs["clip_embeds"])

        flags = ("return_mm_token_type_ids", "return_text_replacement_offsets")
        # Newer releases of transformers list these flags separately from the tokenizer's arguments.
        text_kwargs = {**{name: merged[name] for name in flags if name in merged}, **merged["text_kwargs"]}
        text_inputs = self.tokenize_prompts(text, count, **text_kwargs)
        return BatchFeature(
            {**text_inputs, **visual_inputs},
            tensor_type=text_kwargs.get("return_tensors"),
            skip_tensor_conversion=["text_replacement_offsets", "video_metadata"],
        )

    def tokenize_prompts(
        self,
        text: str | list[str] | None,
        num_images: int,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        **text_kwargs,
    ) -> BatchFeature:
        """Turn prompts into `input_ids` and `attention_mask` (batch, sequence), with placeholders for the images.

        Args:
            text (`str` or `list[str]`, *optional*): A prompt for all images, or one for each; none by default.
            num_images (`int`): Number of images.
            return_mm_token_type_ids (`bool`): Also return `mm_token_type_ids` (batch, sequence), 1 for placeholders.
            return_text_replacement_offsets (`bool`): Also return which characters of each text became placeholders.
            text_kwargs: For the tokenizer. Texts of unequal length are padded.

        Raises:
            ValueError: If the numbers of images and texts differ, or truncation would cut placeholders.
        """
        prompts = self._one_placeholder_per_image(text, num_images)
        replacements = [self.replace_image_token({}, index) for index in range(num_images)]
        prompts, offsets = self.get_text_with_replacements(prompts, replacements)
        if len(prompts) > 1:
            text_kwargs.setdefault("padding", True)
        text_kwargs.setdefault("add_special_tokens", False)
        inputs = self.tokenizer(prompts, **text_kwargs)
        if text_kwargs.get("truncation"):
            self._check_no_placeholder_is_cut(inputs["input_ids"], num_images, text_kwargs.get("max_length"))
        if return_text_replacement_offsets:
            inputs["text_replacement_offsets"] = offsets
        if return_mm_token_type_ids:
            token_types = self.create_mm_token_type_ids(inputs["input_ids"])
            as_tensors = isinstance(inputs["input_ids"], torch.Tensor)
            inputs["mm_token_type_ids"] = torch.tensor(token_types) if as_tensors else token_types
        return inputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, timeout=None, **kwargs):
        """Convert images to a flat list of upright RGB images, and text to a list."""
        if images is not None:
            images = [load_image(image, timeout) for image in flat_list_of_images(images)]
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        return images, text, videos, audio

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the placeholders of one image, which the model replaces by the prefix."""
        return IMAGE_TOKEN * self.prefix_length

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        """Decode token ids (batch, sequence) to captions: without `prompt_template`, and with `caption_start`.

        Negative ids (of labels) count as padding.
        """
        texts = self.tokenizer.batch_decode(self._without_ignored(sequences), *args, **kwargs)
        return [self._as_caption(text) for text in texts]

    def decode(self, token_ids, *args, **kwargs) -> str | list[str]:
        """Decode one sequence or several, as [`batch_decode`] does."""
        text = self.tokenizer.decode(self._without_ignored(token_ids), *args, **kwargs)
        return self._as_caption(text) if isinstance(text, str) else [self._as_caption(one) for one in text]

    def without_start(self, caption: str) -> str:
        """Return the part of a caption that the captioner writes itself, see `caption_start`."""
        return caption.removeprefix(self.caption_start) or caption

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """Decode the output of `generate()`, for transformers' pipelines."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    # `Seq2SeqTrainer` reads the padding token from its processing class.
    @property
    def pad_token(self) -> str:
        return self.tokenizer.pad_token

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def num_frames(self) -> int | None:
        """Number of frames taken from each video; the video processor's own setting."""
        return getattr(self.video_processor, "num_frames", None)

    @num_frames.setter
    def num_frames(self, num_frames: int):
        self.video_processor.num_frames = num_frames

    def _without_ignored(self, token_ids):
        if isinstance(token_ids, (int, np.integer)):
            return token_ids if token_ids >= 0 else self.pad_token_id
        if isinstance(token_ids, (list, tuple)):
            return [self._without_ignored(ids) for ids in token_ids]
        token_ids = torch.as_tensor(token_ids)
        return token_ids.masked_fill(token_ids < 0, self.pad_token_id)

    def _as_caption(self, text: str) -> str:
        text = text.removeprefix(self.prompt_template.replace(IMAGE_TOKEN, ""))
        return self.caption_start + text.lstrip() if self.caption_start else text

    def _one_placeholder_per_image(self, text: str | list[str] | None, num_images: int) -> list[str]:
        if text is None:
            text = [""] * num_images
        elif isinstance(text, str):
            text = [text] * (1 if text.count(IMAGE_TOKEN) > 1 else max(num_images, 1))  # all in one, or one for all
        elif not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("`text` must be a string or a list of strings.")
        if num_images and not any(IMAGE_TOKEN in prompt for prompt in text):
            text = [self.prompt_template + prompt for prompt in text]
        found = sum(prompt.count(IMAGE_TOKEN) for prompt in text)
        if found != num_images:
            raise ValueError(
                f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images: "
                f"{num_images} images need as many {IMAGE_TOKEN} placeholders, one in each of {num_images} texts; "
                f"found {found} in {len(text)} texts."
            )
        return encodable(list(text))

    def _check_no_placeholder_is_cut(self, input_ids, num_images: int, max_length: int | None):
        kept = sum(list(map(int, ids)).count(self.image_token_id) for ids in input_ids)
        if kept != num_images * self.prefix_length:
            raise ValueError(
                f"Truncation to {max_length} tokens would cut placeholders: each image takes {self.prefix_length} "
                "tokens. Raise `max_length` or shorten the prompt."
            )

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        # Serving engines call this before they see an image. The prefix length does not depend on the image size.
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.prefix_length] * count, num_image_patches=[1] * count)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is None and argument_name != "tokenizer":
            return None  # a captioner that takes embeddings only has no processor of images and videos
        if isinstance(argument, ClipCapVideoProcessor):
            return (
                ClipCapVideoProcessor  # where torchvision is missing, transformers has no base class to compare with
            )
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        # ProcessorMixin saves every part that the class can have.
        parts = [name for name in self.get_attributes() if getattr(self, name) is not None]
        self.get_attributes = lambda: parts  # type: ignore[method-assign]
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.get_attributes

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        if getattr(self.image_processor, "backend", None) == "pil":
            settings["image_processor"] = named_for_pillow(settings["image_processor"])
        return settings

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values" if self.image_processor is not None else "clip_embeds"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a processor as transformers does; errors of damaged files name the folder."""
        name = pretrained_model_name_or_path
        with named(name), naming(f"The files of the processor in {name}"):
            return super().from_pretrained(name, *args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # CLIP was trained with Pillow's resampling; torchvision's differs by up to 2/255.
        backend = kwargs.pop("backend", "pil")
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            raise OSError(
                f"{pretrained_model_name_or_path} has no processor, or none with a readable tokenizer: save one into "
                "the model's folder with `processor.save_pretrained(...)` or `processor.push_to_hub(...)`, or pass "
                "`processor=` to the pipeline."
            ) from error
        processor_dict = processor_dict or {}
        if (settings := processor_dict.get("image_processor", {})) is None:
            return [None, tokenizer, None]
        image_processor = load_saved_image_processor(pretrained_model_name_or_path, settings, backend, **kwargs)
        # Earlier versions saved the number of frames alone.
        settings = processor_dict.get("video_processor") or {"num_frames": processor_dict.get("num_frames", 8)}
        video_processor = ClipCapVideoProcessor.from_dict({"image_processor": image_processor, **settings}, **kwargs)
        return [image_processor, tokenizer, video_processor]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | None,
        text: str,
        prefix_length: int = 10,
        num_frames: int = 8,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
    ) -> "ClipCapProcessor":
        """
        Make the processor for [`ClipCapForConditionalGeneration.from_vision_text_pretrained`] with the same names.

        Args:
            vision (`str` or `None`): Hub id, folder or open_clip name of the vision tower.
            text (`str`): Hub id or folder of the language model.
            prefix_length (`int`): The model's `config.prefix_length`.
            num_frames (`int`): Number of frames taken from each video; a video encoder's own number overrides it.
            vision_kwargs (`dict`, *optional*): Arguments for loading the image processor (`revision`, `token`, ...).
            text_kwargs (`dict`, *optional*): Arguments for loading the tokenizer.
        """
        image_processor = None
        if vision is not None:
            image_processor, own_num_frames = load_image_processor(os.fspath(vision), **(vision_kwargs or {}))
            num_frames = own_num_frames or num_frames
        tokenizer = AutoTokenizer.from_pretrained(donor_folder(os.fspath(text)), **(text_kwargs or {}))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"{text} has no tokenizer: add the language model's tokenizer files to it.")
        return cls(image_processor, tokenizer, prefix_length=prefix_length, num_frames=num_frames)


def _stack_embeds(clip_embeds: Any) -> torch.Tensor:
    clip_embeds = torch.stack([torch.as_tensor(embeds) for embeds in clip_embeds])
    if clip_embeds.ndim not in (2, 3):
        raise ValueError(
            "`clip_embeds` must have the shape (batch, clip_embed_dim), or (batch, patches, clip_embed_dim) for "
            f"patches, got {tuple(clip_embeds.shape)}."
        )
    return clip_embeds


__all__ = ["ClipCapProcessor"]
