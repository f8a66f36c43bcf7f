"""CLIPScore and RefCLIPScore, with random CLIPs of transformers and of open_clip."""

import json
import weakref

import numpy as np
import pytest
import torch
from clipcap_hf import metrics
from clipcap_hf.evaluation import EvaluationSet, evaluate_captions
from PIL import Image


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Save a random CLIP with a byte-level tokenizer and an image processor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    end = ("<end>", vocabulary["<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[end])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>").save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 40, "eos_token_id": len(vocabulary) - 1}
    vision = {**size, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return str(folder)


def test_clip_score_follows_its_formula(tiny_clip, tmp_path):
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(4)]
    captions, references = ["a cat", "a dog", "", "x" * 99], [["a cat", "cats"], "the dog", "empty", "x y"]
    for n, image in enumerate(images):
        image.save(tmp_path / f"{n}.png")
    module = metrics.load("clip_score", clip_model=tiny_clip, cache_dir=str(tmp_path))
    module.add_batch(predictions=captions[:3], references=references[:3], images=images[:3])
    module.add(prediction=captions[3], reference=references[3], images=str(tmp_path / "3.png"))
    result = module.compute(per_image=True)

    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images, return_tensors="pt")["pixel_values"]

    def text(caption):
        ids = tokenizer("A photo depicts " + caption, truncation=True, max_length=40, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_text_features(**ids).pooler_output, dim=-1)[0]

    with torch.inference_mode():
        seen = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        clip = [2.5 * max(float(text(c) @ v), 0) if c else 0.0 for c, v in zip(captions, seen)]
        near = [
            max(float(text(c) @ text(r)) for r in ([g] if isinstance(g, str) else g))
            for c, g in zip(captions, references)
        ]
    both = [2 * a * max(b, 0) / (a + max(b, 0)) if a + b > 0 else 0 for a, b in zip(clip, near)]
    np.testing.assert_allclose(result["clip_score_per_image"], clip, atol=1e-5)
    np.testing.assert_allclose(result["ref_clip_score_per_image"], both, atol=1e-5)
    assert max(clip) > 0 and result["clip_score"] == pytest.approx(np.mean(clip), abs=1e-5)
    assert (result["clip_model"], result["clip_dtype"]) == (tiny_clip, "float32")

    without = module.compute(predictions=captions, images=images)
    assert without["clip_score"] == pytest.approx(result["clip_score"]) and "ref_clip_score" not in without
    with pytest.raises(ValueError, match="1 predictions and 4 images"):
        metrics.score_captions(["a"], metrics="clip_score", images=images, clip_model=tiny_clip)


def test_clip_score_by_open_clip(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision_cfg = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision_cfg, text_cfg=text_cfg).eval()
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(4)]
    captions = ["a cat", "a dog", "two green apples", "rain"]
    result = metrics.score_captions(
        captions, metrics="clip_score", images=images, clip_model=str(tmp_path), per_image=True
    )
    transform = open_clip.transform.image_transform(32, is_train=False)
    with torch.inference_mode():
        seen = clip.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        said = clip.encode_text(open_clip.tokenize(["A photo depicts " + text for text in captions]), normalize=True)
    expected = 2.5 * (seen * said).sum(1).clamp(min=0)
    np.testing.assert_allclose(result["clip_score_per_image"], expected, atol=1e-5)
    assert result["clip_score"] > 0 and result["clip_dtype"] == "float32"


class CountedImages:
    """A column of images decoded on access, as in `datasets`; it counts how many are alive at a time."""

    def __init__(self, number):
        self.number, self.alive, self.most, self.read = number, 0, 0, 0

    def __len__(self):
        return self.number

    def __getitem__(self, place):
        if place >= self.number:
            raise IndexError(place)
        image = Image.new("RGB", (40, 48), (place, 0, 255 - place))
        self.read += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self._gone)
        return image

    def _gone(self):
        self.alive -= 1


def test_a_benchmark_of_images_is_never_in_memory_at_once(tiny_clip, monkeypatch):
    """As a list, the images of COCO's Karpathy split would take 4.6 GB."""
    monkeypatch.setattr("clipcap_hf.metrics.clip.BATCH_SIZE", 8)
    images = CountedImages(50)
    captions = [f"picture {place}" for place in range(50)]
    data = EvaluationSet(list(range(50)), [[caption] for caption in captions], images=images, source="x")
    report, _ = evaluate_captions(
        dict(enumerate(captions)), data, metrics=["clip_score"], tokenizer="python", clip_model=tiny_clip
    )
    assert images.read == 50 and images.most <= 2
    listed = [images[place] for place in range(50)]
    expected = metrics.score_captions(
        captions, metrics="clip_score", images=listed, clip_model=tiny_clip, per_image=False
    )
    assert report["scores"]["entire"]["clip_score"] == pytest.approx(100 * expected["clip_score"], abs=1e-6)
