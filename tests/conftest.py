"""Tiny random models, tokenizers and images; nothing here is downloaded."""

import os
import sys
import sysconfig
from pathlib import Path


# Test the installed package: `python -m pytest` puts the clone before the standard library on the path. A clone
# that is installed editable comes after it, and stays.
_clone = Path(__file__).parents[1]
_installed = sys.path.index(sysconfig.get_path("stdlib"))
sys.path[:_installed] = [entry for entry in sys.path[:_installed] if Path(entry).resolve() != _clone]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models here are too small for threads, and threads of several processes wait for each other, at the price of all.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import clipcap_hf  # noqa: E402, F401, I001  (first: it lets transformers import torchvision)

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, GPT2Config, PreTrainedTokenizerFast  # noqa: E402

from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor, OpenClipVisionConfig  # noqa: E402


CAPTIONS = [
    "a red heart",
    "a blue dog",
    "woman running",
    "two green apples",
    "a yellow sun",
    "man in a black hat",
    "a small white cat",
    "purple rain",
]
COLOURS = ["red", "blue", "orange", "green", "yellow", "black", "white", "purple"]
END = "<|endoftext|>"


def build_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": END, "bos_token": END, **kwargs})


def pytest_configure(config):
    # Markers of transformers' own tests (transformers_suites/), which `--strict-markers` would refuse.
    for name in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "generate",
        "torch_compile_test",
        "torch_export_test",
    ):
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Work in an empty folder, where a process that a test starts imports the installed package and not the clone."""
    start = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(start)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def captions():
    return list(CAPTIONS)


@pytest.fixture(scope="session")
def images():
    """Draw eight pictures of different colours, sizes and shapes."""
    pictures = []
    for index, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (48 + 4 * index, 40), "grey")
        ImageDraw.Draw(picture).ellipse((4 + 4 * index, 4, 34 + 4 * index, 34), fill=colour)
        pictures.append(picture)
    return pictures


@pytest.fixture
def tokenizer():
    """Return a byte-level BPE whose padding token is its end token, as with GPT-2."""
    return build_tokenizer()


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def text_config():
    # A wide initialisation, so that captions of random models differ from image to image.
    return GPT2Config(
        vocab_size=290,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )


@pytest.fixture
def clip_config():
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )


@pytest.fixture
def open_clip_configs():
    vit = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    timm = {"image_size": 64, "timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
    return {
        "vit": OpenClipVisionConfig(embed_dim=16, vision_cfg=vit, quick_gelu=True),
        "resnet": OpenClipVisionConfig(embed_dim=16, vision_cfg=resnet),
        "timm": OpenClipVisionConfig(embed_dim=16, vision_cfg=timm),
    }


@pytest.fixture
def make_model(text_config, clip_config, open_clip_configs):
    """Return `make_model(vision, **config)`: a random captioner with a CLIP tower, an open_clip tower or none."""

    def make(vision="clip", **kwargs):
        torch.manual_seed(0)
        vision_config = {"clip": clip_config, None: None, **open_clip_configs}[vision]
        if vision_config is None:
            kwargs.setdefault("clip_embed_dim", 16)
        defaults = {"text_config": text_config, "prefix_length": 4, "mapping_num_layers": 2, "mapping_num_heads": 4}
        config = ClipCapConfig(vision_config=vision_config, **{**defaults, **kwargs})
        model = ClipCapForConditionalGeneration(config).eval()
        model.generation_config.max_new_tokens = 8
        model.generation_config.pad_token_id = 0
        return model

    return make


@pytest.fixture
def image_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def processor(image_processor, tokenizer):
    return ClipCapProcessor(image_processor, tokenizer, prefix_length=4)


@pytest.fixture
def embeds_processor(tokenizer):
    return ClipCapProcessor(None, tokenizer, prefix_length=4)


@pytest.fixture
def model_folder(tmp_path, make_model, processor):
    """Save a captioner with its processor."""
    make_model().save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    return tmp_path / "captioner"
