"""Images and prompts to model inputs."""

import base64
import io
import os
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from PIL import Image
from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_clipcap import IMAGE_TOKEN
from .donors_clipcap import donor_folder
from .image_processing_open_clip import OpenClipImageProcessor, image_processor_from_open_clip, to_rgb
from .modeling_open_clip import is_open_clip_name, load_open_clip_checkpoint
from .modeling_vision import load_vision_config
from .video_frames import list_videos, read_frames


_URL_TIMEOUT = 30  # seconds without a byte
_MAX_ASPECT_RATIO = 200  # most transforms make the shorter edge 224 pixels, and then the longer one takes all memory
_MAX_URL_BYTES = 100 << 20


def load_image(image: str | Path | Image.Image) -> Image.Image:
    """Read an image from a path or URL as upright RGB.

    Raises:
        ValueError: If there is no such file, or it is not a complete image that Pillow can read within its limit on
            decompressed size. The message names the file.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if str(image).startswith(("http://", "https://", "data:image/")):
        shown = str(image)[:100]
        return _decode_image(shown, io.BytesIO(_fetch(str(image), shown)))
    path = Path(image)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not an image")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return _decode_image(str(path), path)


def _decode_image(name: str, file: Path | io.BytesIO) -> Image.Image:
    try:
        with Image.open(file) as opened:
            if max(opened.size) > _MAX_ASPECT_RATIO * min(opened.size):
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels")
            return to_rgb(opened)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused, the image is too large or too narrow ({error})") from error
    # Pillow's decoders raise whatever they stumble over in a damaged file.
    except Exception as error:
        raise ValueError(f"{name}: not a readable image ({error})") from error


def _fetch(url: str, shown: str) -> bytes:
    """The bytes behind a URL. load_image of transformers would put transparency on black."""
    if url.startswith("data:"):
        try:
            return base64.b64decode(url.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"{shown}: not a readable image (base64: {error})") from error
    # Not by the session of huggingface_hub, which goes nowhere where `HF_HUB_OFFLINE` is set.
    request = Request(url, headers={"User-Agent": "clipcap_hf"})
    try:
        with urlopen(request, timeout=_URL_TIMEOUT) as response:
            data = response.read(_MAX_URL_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise ValueError(f"{shown}: could not be fetched ({type(error).__name__}: {error})") from error
    if len(data) > _MAX_URL_BYTES:
        raise ValueError(f"{shown}: refused, the file has more than {_MAX_URL_BYTES >> 20} MB")
    return data


class ClipCapProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {}


class ClipCapProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a [`ClipCapForConditionalGeneration`]. It puts `prefix_length` placeholders
    `<image>` in front of each text that has none, in whose place the model puts the prefix.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`], *optional*): The transform that the vision tower was
            trained with. `None` for a captioner that is fed with embeddings alone.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The language model's. It gets a padding token (its end
            token) if it has none, and pads on the left, as generation needs; the collator for training pads on the
            right.
        prefix_length (`int`): The model's `config.prefix_length`.
        num_frames (`int`): Frames that are taken of each video.
        prompt_template (`str`): Text around the placeholder, with one `<image>`, that a frozen language model was trained to
            be prompted with; put around each text that has no placeholder, and taken off decoded captions.
        chat_template (`str`, *optional*): For chat-style input.
    """

    valid_processor_kwargs = ClipCapProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        prefix_length: int = 10,
        num_frames: int = 8,
        prompt_template: str = IMAGE_TOKEN,
        chat_template=None,
        **kwargs,
    ):
        if prompt_template.count(IMAGE_TOKEN) != 1:
            raise ValueError(f"`prompt_template` must hold one {IMAGE_TOKEN}, got {prompt_template!r}.")
        if tokenizer is None:
            raise ValueError("ClipCapProcessor needs a tokenizer.")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    "The tokenizer has neither a padding nor an end token: set `tokenizer.pad_token`, or better "
                    "`tokenizer.eos_token`, at which captions end, and save the tokenizer beside its language model."
                )
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.prefix_length = prefix_length
        self.num_frames = num_frames
        self.prompt_template = prompt_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos=None,
        clip_embeds: torch.Tensor | None = None,
        num_frames: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            images (image, path, URL, or a list of them, *optional*): One image for each text. Images of any mode are
                made upright RGB first, see [`to_rgb`].
            text (`str` or `list[str]`, *optional*): Prompts to continue; one prompt serves all images. None by default.
            videos (list of frames, array (frames, height, width, 3), path, or a list of them, *optional*): One video for
                each text, in place of images, see [`~clipcap_hf.model.video_frames.read_frames`].
            clip_embeds (`torch.Tensor` of shape `(batch, clip_embed_dim)`, *optional*): Embeddings in place of images; or
                patch tokens, `(batch, patches, clip_embed_dim)`.
            num_frames (`int`, *optional*): Frames to take of each video, evenly spread; the processor's own by default.
            kwargs: Arguments of the tokenizer and the image processor (`return_tensors`, `padding`, ...). Texts of
                unequal length are padded.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` (batch, sequence), and `pixel_values`
            (batch, 3, height, width), of videos (batch, frames, 3, height, width), or `clip_embeds`.

        Raises:
            ValueError: If there is nothing to process, or the numbers of images and texts differ.
        """
        given = [
            name
            for name, value in (("images", images), ("videos", videos), ("clip_embeds", clip_embeds))
            if value is not None
        ]
        if not given and text is None:
            raise ValueError("Pass `images`, `videos`, `clip_embeds` or `text`.")
        if len(given) > 1:
            raise ValueError(f"Pass either `{given[0]}` or `{given[1]}`, not both.")
        merged = self._merge_kwargs(ClipCapProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)

        image_inputs, num_images = {}, 0
        if images is not None:
            image_inputs, num_images = self._process(images, **merged["images_kwargs"])
        elif videos is not None:
            image_inputs, num_images = self._videos_to_pixels(videos, num_frames, **merged["images_kwargs"])
        elif clip_embeds is not None:
            clip_embeds = torch.stack([torch.as_tensor(embeds) for embeds in clip_embeds])
            if clip_embeds.ndim not in (2, 3):
                raise ValueError(
                    "`clip_embeds` must have the shape (batch, clip_embed_dim), or (batch, patches, clip_embed_dim) of "
                    f"patches, got {tuple(clip_embeds.shape)}."
                )
            image_inputs, num_images = {"clip_embeds": clip_embeds}, len(clip_embeds)

        return_tensors = merged["text_kwargs"].get("return_tensors")
        text_inputs = self.tokenize_prompts(text, num_images, **merged["text_kwargs"])
        return BatchFeature({**text_inputs, **image_inputs}, tensor_type=return_tensors)

    def tokenize_prompts(self, text: str | list[str] | None, num_images: int, **text_kwargs) -> BatchFeature:
        """`input_ids` and `attention_mask` (batch, sequence) of prompts, with the placeholders of so many images.

        Args:
            text (`str` or `list[str]`, *optional*): A prompt for all images, or one for each; none by default.
            num_images (`int`): Number of images.
            text_kwargs: For the tokenizer. Texts of unequal length are padded.
        """
        text = self._with_placeholders(text, num_images)
        if len(text) > 1:
            text_kwargs.setdefault("padding", True)
        # A tokenizer's own begin and end tokens (Llama, OPT, BERT) belong neither before the prefix, where generate()
        # without a prompt has none, nor after a prompt that is to be continued.
        text_kwargs.setdefault("add_special_tokens", False)
        return self.tokenizer(text, **text_kwargs)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """As the tokenizer's, without the text of `prompt_template`."""
        texts = super().batch_decode(*args, **kwargs)
        template = self.prompt_template.replace(IMAGE_TOKEN, "")
        return [text.removeprefix(template) for text in texts] if template else texts

    def _process(self, images, **images_kwargs) -> tuple[dict, int]:
        if self.image_processor is None:
            raise ValueError("This captioner has no image processor: pass `clip_embeds` in place of `images`.")
        if isinstance(images, (str, Path)):
            images = [images]
        if isinstance(images, (list, tuple)):
            images = [load_image(image) if isinstance(image, (str, Path)) else image for image in images]
        images = [
            to_rgb(image) if isinstance(image, Image.Image) else image for image in make_flat_list_of_images(images)
        ]
        return self.image_processor(images, **images_kwargs), len(images)

    def _videos_to_pixels(self, videos, num_frames: int | None, **images_kwargs) -> tuple[dict, int]:
        num_frames = num_frames or self.num_frames
        videos = [read_frames(video, num_frames) for video in list_videos(videos)]
        frames = [frame for video in videos for frame in video]
        inputs, _ = self._process(frames, **{**images_kwargs, "return_tensors": "np"})
        pixel_values = inputs["pixel_values"]
        # Image processors of video models (VideoMAE's) take all frames for one video.
        return {"pixel_values": pixel_values.reshape(len(videos), num_frames, *pixel_values.shape[-3:])}, len(videos)

    def _with_placeholders(self, text: str | list[str] | None, num_images: int) -> list[str]:
        if text is None:
            text = [""] * num_images
        elif isinstance(text, str):
            text = [text] * max(num_images, 1)
        if num_images and not any(IMAGE_TOKEN in prompt for prompt in text):
            text = [self.prompt_template + prompt for prompt in text]
        found = sum(prompt.count(IMAGE_TOKEN) for prompt in text)
        if found != num_images:
            raise ValueError(
                f"{num_images} images need as many {IMAGE_TOKEN} placeholders, one in each of {num_images} texts; "
                f"found {found} in {len(text)} texts."
            )
        return [prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.prefix_length) for prompt in text]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        # What serving engines ask before they see an image: a prefix is as long for every size.
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.prefix_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def check_argument_for_proper_class(self, argument_name, argument):
        # A captioner that is fed with embeddings has no image processor.
        if argument is not None or argument_name != "image_processor":
            return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if self.image_processor is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.get_attributes = lambda: ["tokenizer"]  # ProcessorMixin saves every part that the class may have
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.get_attributes

    @property
    def model_input_names(self) -> list[str]:
        image_names = ["pixel_values"] if self.image_processor is not None else ["clip_embeds"]
        return ["input_ids", "attention_mask", *image_names]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # Pillow's resampling is what CLIP was trained with; torchvision's, the default, is off by up to 2/255.
        backend = kwargs.pop("backend", "pil")
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            raise OSError(
                f"{pretrained_model_name_or_path} has no processor, at least no tokenizer that can be read: "
                "save one beside the model by `processor.save_pretrained(...)`, or by `processor.push_to_hub(...)`, or pass "
                "`processor=` to the pipeline."
            ) from error
        image_processor = None
        image_processor_dict = (processor_dict or {}).get("image_processor", {})
        if (
            image_processor_dict is not None
            and image_processor_dict.get("image_processor_type") == "OpenClipImageProcessor"
        ):
            # By its class, which need not be registered where this file is remote code.
            image_processor = OpenClipImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        elif image_processor_dict is not None:
            image_processor = AutoImageProcessor.from_pretrained(
                pretrained_model_name_or_path, backend=backend, **kwargs
            )
        return [image_processor, tokenizer]

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
        The processor that goes with [`ClipCapForConditionalGeneration.from_vision_text_pretrained`] of the same names.

        Args:
            vision (`str` or `None`): Hub id, folder or open_clip name of the vision tower.
            text (`str`): Hub id or folder of the language model.
            prefix_length (`int`): The model's `config.prefix_length`.
            num_frames (`int`): Frames that are taken of each video; a video encoder's own where it has one.
            vision_kwargs (`dict`, *optional*): For loading the image processor (`revision`, `token`, ...).
            text_kwargs (`dict`, *optional*): For loading the tokenizer.
        """
        image_processor = None
        vision, text = (os.fspath(name) if isinstance(name, os.PathLike) else name for name in (vision, text))
        if vision is not None:
            image_processor, own_num_frames = load_image_processor(vision, **(vision_kwargs or {}))
            num_frames = own_num_frames or num_frames
        tokenizer = AutoTokenizer.from_pretrained(donor_folder(text), **(text_kwargs or {}))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"{text} has no tokenizer: put the files of the language model's tokenizer beside it.")
        return cls(image_processor, tokenizer, prefix_length=prefix_length, num_frames=num_frames)


def load_image_processor(vision: str, **kwargs) -> tuple:
    """The transform of a vision tower by its name, and the number of frames of a video encoder or `None`."""
    if is_open_clip_name(vision):
        _, preprocess_cfg, _ = load_open_clip_checkpoint(vision, with_weights=False, **kwargs)
        return image_processor_from_open_clip(preprocess_cfg), None
    try:
        image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil", **kwargs)
    except (OSError, ValueError):
        load_vision_config(vision, **kwargs)  # says so if there is no such tower
        raise
    try:
        return image_processor, getattr(load_vision_config(vision, **kwargs), "num_frames", None)
    except ValueError:  # a folder may hold the processor alone
        return image_processor, None


__all__ = ["ClipCapProcessor"]
