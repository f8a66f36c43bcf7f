"""Whole files of every format that the commands read, and the command lines that read them: see damages.py."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from conftest import CAPTIONS, COLOURS, build_tokenizer
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
)


PICTURES = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tif"}
IMAGES = 4  # in every data set


@dataclass
class Case:
    """One command on one folder of samples, a file of which is to be damaged.

    Attributes:
        kind: The format of the damaged file.
        command: `caption`, `embed`, `train`, `evaluate` or `convert`.
        sample: The folder of samples.
        file: The file to damage in it.
        argv: Makes the command line from the folder and from one for the output.
    """

    kind: str
    command: str
    sample: str
    file: str
    argv: Callable[[Path, Path], list]

    @property
    def name(self) -> str:
        return f"{self.command} {self.kind} {self.sample}/{self.file}"


# -- samples


def build(root: Path):
    """Write the samples, each in a folder of its own."""
    torch.manual_seed(0)
    _models(root)
    for kind, suffix in PICTURES.items():
        _pictures(root / kind, kind, suffix)
        _jsonl(root / kind, suffix)
    _pictures(root / "csv")
    rows = [f'{number}.jpg,"{caption}, indeed"' for number, caption in enumerate(CAPTIONS[:IMAGES])]
    (root / "csv" / "metadata.csv").write_text("file_name,caption\n" + "\n".join(rows) + "\n")
    _pictures(root / "coco")
    (root / "coco" / "captions.json").write_text(json.dumps(_coco()))
    (root / "coco" / "results.json").write_text(
        json.dumps([{"image_id": number, "caption": caption} for number, caption in enumerate(CAPTIONS[:IMAGES])])
    )
    _pictures(root / "karpathy")
    (root / "karpathy" / "dataset.json").write_text(json.dumps(_karpathy()))
    _shards(root / "tar")
    _official(root / "official")
    _open_clip(root / "open_clip")


def _models(root: Path):
    tower, gpt2, captioner = (root / "models" / name for name in ("tower", "gpt2", "captioner"))
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=8,
        )
    ).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tower)
    sizes = dict(vocab_size=290, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(gpt2)
    build_tokenizer().save_pretrained(gpt2)
    parts = str(tower), str(gpt2)
    ClipCapForConditionalGeneration.from_vision_text_pretrained(*parts, prefix_length=2).save_pretrained(captioner)
    ClipCapProcessor.from_vision_text_pretrained(*parts, prefix_length=2).save_pretrained(captioner)


def picture(number: int, kind: str = "jpeg") -> bytes:
    image = Image.effect_noise((40, 36), 60 + number).convert("RGB")
    ImageDraw.Draw(image).ellipse((4, 4, 20 + 4 * number, 30), fill=COLOURS[number])
    options = {"tiff": {"compression": "tiff_lzw"}, "webp": {"quality": 60}}.get(kind, {})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pictures(folder: Path, kind: str = "jpeg", suffix: str = "jpg"):
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        (folder / f"{number}.{suffix}").write_bytes(picture(number, kind))


def _jsonl(folder: Path, suffix: str):
    rows = [
        {"file_name": f"{number}.{suffix}", "captions": [caption, f"{caption} again"]}
        for number, caption in enumerate(CAPTIONS[:IMAGES])
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _coco() -> dict:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(IMAGES)]
    texts = [
        {"image_id": number, "id": 2 * number + turn, "caption": caption}
        for number, caption in enumerate(CAPTIONS[:IMAGES])
        for turn in range(2)
    ]
    return {"info": {}, "images": images, "annotations": texts}


def _karpathy() -> dict:
    images = [
        {"filename": f"{number}.jpg", "imgid": number, "split": "train", "sentences": [{"raw": caption}]}
        for number, caption in enumerate(CAPTIONS[:IMAGES])
    ]
    return {"images": images, "dataset": "tiny"}


def _shards(folder: Path):
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard * IMAGES // 2, (shard + 1) * IMAGES // 2):
                for suffix, content in (("jpg", picture(number)), ("txt", CAPTIONS[number].encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _official(folder: Path):
    """Write a checkpoint and embeddings of the official code, for the language model of the samples."""
    folder.mkdir()
    text = GPT2LMHeadModel.from_pretrained(folder.parent / "models" / "gpt2").state_dict()
    state = {f"gpt.{name}": value for name, value in text.items()}
    for name, width, length in (("0", 8, 16), ("2", 16, 32)):
        state[f"clip_project.model.{name}.weight"] = torch.randn(length, width)
        state[f"clip_project.model.{name}.bias"] = torch.randn(length)
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    records = [
        {"image_id": number, "caption": caption, "clip_embedding": number}
        for number, caption in enumerate(CAPTIONS[:IMAGES])
    ]
    with open(folder / "embeddings.pkl", "wb") as file:
        pickle.dump({"clip_embedding": torch.randn(IMAGES, 8), "captions": records}, file)


def _open_clip(folder: Path):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    folder.mkdir()
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 2, "layers": 1}
    model = CLIP(8, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


# -- command lines


def cases(root: Path) -> list[Case]:
    """List what to damage: each format, in each command that reads it."""
    captioner, tower, gpt2 = (root / "models" / name for name in ("captioner", "tower", "gpt2"))
    whole = root / "jpeg"

    def caption(model=None):
        return lambda folder, out: [
            *("caption", "--json", "--max-new-tokens", 3, "--model", folder / model if model else captioner),
            *sorted(path for path in (whole if model else folder).iterdir() if path.stem.isdecimal()),
        ]

    def embed(data, data_format, vision=None):
        return lambda folder, out: [
            *("embed", folder / data if vision is None else whole, "--data-format", data_format, "--workers", 0),
            *("--vision", tower if vision is None else folder / vision, "--out", out),
        ]

    def train(data, data_format, *more):
        return lambda folder, out: [
            *("train", "--vision", tower, "--text", gpt2, "--prefix_length", 2, "--output_dir", out),
            *("--data", folder / data, "--data_format", data_format, "--eval_split", "none", "--report_to", "none"),
            *("--max_steps", 2, "--per_device_train_batch_size", 4, "--save_strategy", "no", "--use_cpu", *more),
        ]

    def evaluate(data, data_format, *what):
        return lambda folder, out: [
            *("evaluate", "--beams", 1, "--max-new-tokens", 3, "--metrics", "bleu", "--tokenizer", "python"),
            *("--out", out, "--data", folder / data, "--data-format", data_format),
            *(what or ("--model", captioner)),
        ]

    found = []
    for kind, suffix in PICTURES.items():
        found += [Case(kind, "caption", kind, f"1.{suffix}", caption())]
        for command in (embed, train, evaluate):
            found += [Case(kind, command.__name__, kind, f"1.{suffix}", command(".", "imagefolder"))]
    for sample, file, kind, data, data_format in (
        ("jpeg", "metadata.jsonl", "jsonl", ".", "imagefolder"),
        ("csv", "metadata.csv", "csv", ".", "imagefolder"),
        ("coco", "captions.json", "json", "captions.json", "coco"),
        ("karpathy", "dataset.json", "json", "dataset.json", "karpathy"),
        ("tar", "0.tar", "tar", ".", "webdataset"),
    ):
        for command in (embed, train, evaluate):
            more = ("--streaming", "--dataloader_num_workers", 0) if command is train and kind == "tar" else ()
            found += [Case(kind, command.__name__, sample, file, command(data, data_format, *more))]
    results = lambda folder, out: evaluate("captions.json", "coco", "--results", folder / "results.json")(folder, out)  # noqa: E731
    found += [Case("json", "evaluate", "coco", "results.json", results)]
    for file in ("config.json", "tokenizer.json", "processor_config.json", "generation_config.json"):
        found += [Case("json", "caption", "models", f"captioner/{file}", caption("captioner"))]
    found += [Case("safetensors", "caption", "models", "captioner/model.safetensors", caption("captioner"))]
    for name in ("tower/model.safetensors", "tower/config.json", "tower/preprocessor_config.json"):
        kind = "safetensors" if name.endswith(".safetensors") else "json"
        found += [Case(kind, "embed", "models", name, embed(None, "imagefolder", "tower"))]
    found += [Case("pt", "embed", "open_clip", "open_clip_pytorch_model.bin", embed(None, "imagefolder", "."))]
    found += [Case("json", "embed", "open_clip", "open_clip_config.json", embed(None, "imagefolder", "."))]
    for file in ("state.pt", "legacy.pt"):
        found += [
            Case("pt", "convert", "official", file, lambda folder, out, file=file: [
                "convert", "official", folder / file, "--text", gpt2, "--out", out
            ])
        ]  # fmt: skip
    found += [
        Case("pkl", "convert", "official", "embeddings.pkl", lambda folder, out: [
            "convert", "embeddings", folder / "embeddings.pkl", "--out", out
        ])
    ]  # fmt: skip
    return found
