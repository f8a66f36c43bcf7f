"""Load the captioner that a run starts from: an existing one, or a new one with the paper's default sizes."""

import logging
import os

from huggingface_hub.errors import StrictDataclassError

from ..assets import resolve
from ..model.damage_clipcap import load_config
from ..model.lora_clipcap import add_lora
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..sources import check_folder, text_source, vision_source
from .arguments import DataArguments, ModelArguments


logger = logging.getLogger(__name__)

DEFAULT_CAPTIONER = "emoji-mini"
OF_NEW_CAPTIONERS = (
    "vision_feature",
    "mapping_type",
    "prefix_length",
    "clip_length",
    "clip_embed_dim",
    "normalize_clip_embeds",
    "save_frozen",
    "config_overrides",
)


def load_captioner(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[ClipCapForConditionalGeneration, ClipCapProcessor]:
    """Return the captioner that the arguments ask for, and its processor."""
    if model_args.text is not None:
        return _new_captioner(model_args, data_args)
    if model_args.model is None:
        logger.info(
            f"Starting from {DEFAULT_CAPTIONER}, which was trained on drawings of emoji: pass `model`, or `vision` "
            "and `text`, for another captioner."
        )
    return _existing_captioner(model_args)


def check_names(model_args: ModelArguments, data_args: DataArguments):
    """Refuse names of files and folders that do not exist, before anything is loaded."""
    for values, names in ((model_args, ("model", "vision", "text")), (data_args, ("data", "eval_data", "images"))):
        for name in names:
            check_folder(getattr(values, name), f"`{name}`")


def _existing_captioner(model_args: ModelArguments):
    given = [name for name in OF_NEW_CAPTIONERS if getattr(model_args, name) != getattr(ModelArguments(), name)]
    if given:
        raise ValueError(
            f"An existing captioner keeps its own {', '.join(f'`{name}`' for name in given)}: leave that out, or pass "
            "`text` for a new captioner."
        )
    name = os.path.expanduser(resolve(model_args.model or DEFAULT_CAPTIONER))
    config = load_config(name)
    if config.model_type != "clipcap":
        raise ValueError(
            f"`model`: {name} is a {config.model_type} model, not a captioner. Pass it as `text` or `vision` of a "
            "new one."
        )
    model = ClipCapForConditionalGeneration.from_pretrained(name)
    _choose_what_is_trained(model, model_args)
    return model, ClipCapProcessor.from_pretrained(name)


def _choose_what_is_trained(model: ClipCapForConditionalGeneration, model_args: ModelArguments):
    """Freeze the parts of an existing captioner, or add LoRA adapters to it, as the arguments say."""
    config = model.config
    if not model_args.freeze_vision and model.vision_tower is not None:
        config.freeze_vision = False
        model.vision_tower.requires_grad_(True)
    if model_args.lora_r is not None:
        if config.lora is not None:
            model.merge_lora()
        config.lora = {"r": model_args.lora_r}
        add_lora(model.language_model, config.lora)
    elif model_args.freeze_language_model is not None:
        config.freeze_language_model = model_args.freeze_language_model
        model.language_model.requires_grad_(True)
        model._freeze()


def _new_captioner(model_args: ModelArguments, data_args: DataArguments):
    prefix_length = model_args.prefix_length or (40 if model_args.mapping_type == "transformer" else 10)
    vision, image_processor = (None, None) if model_args.vision is None else vision_source(model_args.vision)
    text = text_source(model_args.text)
    try:
        model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
            vision, text.model, text_kwargs=text.model_kwargs, **_config(model_args, data_args, prefix_length)
        )
    except (StrictDataclassError, TypeError) as error:
        if not model_args.overrides():
            raise
        raise ValueError(f"`config_overrides`: {error}") from error
    vision_name = vision if isinstance(vision, str) else None
    processor = ClipCapProcessor.from_vision_text_pretrained(
        vision_name, text.tokenizer, prefix_length, text_kwargs=text.tokenizer_kwargs
    )
    if image_processor is not None:
        processor.image_processor = image_processor
    return model, processor


def _config(model_args: ModelArguments, data_args: DataArguments, prefix_length: int) -> dict:
    freeze, normalize = model_args.freeze_language_model, model_args.normalize_clip_embeds
    return {
        "vision_feature": model_args.vision_feature,
        "mapping_type": model_args.mapping_type,
        "prefix_length": prefix_length,
        "clip_length": model_args.clip_length,
        "clip_embed_dim": model_args.clip_embed_dim,
        "normalize_clip_embeds": data_args.text_only if normalize is None else normalize,
        "freeze_language_model": model_args.mapping_type == "transformer" if freeze is None else freeze,
        "freeze_vision": model_args.freeze_vision,
        "lora": None if model_args.lora_r is None else {"r": model_args.lora_r},
        "save_frozen": model_args.save_frozen,
        **model_args.overrides(),
    }
