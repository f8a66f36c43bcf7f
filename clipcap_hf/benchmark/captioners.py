"""Make captioners of real sizes with random weights, and JPEG files to caption."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from ..model.configuration_clipcap import ClipCapConfig
from ..model.modeling_clipcap import ClipCapForConditionalGeneration
from ..model.processing_clipcap import ClipCapProcessor
from ..prepacking import prepack_where_it_fits


def _tiny() -> tuple[PreTrainedConfig, PreTrainedConfig]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16
    )
    return vision, GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)


# By the name of the language model; "tiny" is for tests.
SHAPES = {
    "gpt2": lambda: (CLIPVisionConfig(), GPT2Config()),
    "smollm2": lambda: (
        CLIPVisionConfig(),
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "tiny": _tiny,
}


def make_captioner(
    shape: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    language_model=None,
    prepack: bool = True,
    **config,
) -> tuple[ClipCapForConditionalGeneration, ClipCapProcessor]:
    """
    Make a random captioner from ViT-B/32 and a language model of this shape; its captions have no end token.

    On a CPU its weights are prepacked, as those of the commands are.
    """
    vision_config, text_config = SHAPES[shape]()
    torch.manual_seed(0)
    model = ClipCapForConditionalGeneration(
        ClipCapConfig(vision_config=vision_config, text_config=text_config, **{"prefix_length": 10, **config}),
        language_model=language_model,
    )
    model = model.to(device, dtype).eval()
    if prepack and torch.device(device).type == "cpu":
        prepack_where_it_fits(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # One word ("w0", "w1", ...) for each token, so that every caption can be decoded.
    vocabulary = {f"w{index}": index for index in range(model.config.text_config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
    return model, ClipCapProcessor(CLIPImageProcessorPil(), tokenizer, prefix_length=model.config.prefix_length)


def write_jpegs(folder: Path, number: int) -> list[str]:
    """Write JPEG files of 640 x 480 pixels and about 90 kB, like those of COCO."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for _ in range(min(number, 8)):  # a few, since files with the same bytes take as long to read
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 12, (480, 640, 1))
        pictures.append(Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)))
    paths = []
    for index in range(number):
        paths.append(str(folder / f"{index:05d}.jpg"))
        pictures[index % len(pictures)].save(paths[-1], quality=85)
    return paths
