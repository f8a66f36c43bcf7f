"""The vision tower that is an object detector."""

import numpy as np
import pytest
import torch
from clipcap_hf import (
    ClipCapConfig,
    ClipCapForConditionalGeneration,
    DetectorVisionConfig,
    DetectorVisionModel,
)
from clipcap_hf.model.colors_detector import COLORS, GROUNDS, describe_colors, name_colors
from clipcap_hf.model.modeling_detector import decode_boxes, summarize_detections, suppress_doubles
from clipcap_hf.model.modeling_vision import embed_pixels
from transformers import AutoConfig, AutoModel, GPT2Config


PAINTS = {
    "black": (0.1, 0.1, 0.1), "white": (0.9, 0.9, 0.9), "gray": (0.5, 0.5, 0.5), "brown": (0.5, 0.3, 0.1),
    "red": (0.9, 0.1, 0.1), "orange": (1.0, 0.5, 0.1), "yellow": (0.9, 0.85, 0.1), "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9), "purple": (0.7, 0.1, 0.8),
}  # fmt: skip
SMALL = {"num_classes": 3, "width": 4, "depths": (1, 1, 2), "neck_width": 8, "num_bins": 4}


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return DetectorVisionModel(DetectorVisionConfig(**SMALL, score_threshold=0.01)).eval()


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared)


def test_boxes_equal_a_computation_in_numpy():
    logits = torch.randn(2, 4 * 5, 2, 3)
    found = decode_boxes(logits, (2, 3), 5)
    assert found.shape == (2, 6, 4)
    for image, row, column in np.ndindex(2, 2, 3):
        bins = np.exp(logits[image, :, row, column].numpy().reshape(4, 5))
        left, top, right, bottom = (bins / bins.sum(1, keepdims=True)) @ np.arange(5)
        middle_x, middle_y = column + 0.5, row + 0.5
        edges = [(middle_x - left) / 3, (middle_y - top) / 2, (middle_x + right) / 3, (middle_y + bottom) / 2]
        np.testing.assert_allclose(found[image, row * 3 + column].numpy(), np.clip(edges, 0, 1), atol=1e-6)


def test_doubles_equal_a_greedy_search():
    generator = torch.Generator().manual_seed(0)
    upper = torch.rand(3, 40, 2, generator=generator) * 0.5
    boxes = torch.cat([upper, upper + 0.1 + 0.4 * torch.rand(3, 40, 2, generator=generator)], dim=-1)
    classes = torch.randint(0, 3, (3, 40), generator=generator)
    keep = suppress_doubles(boxes, classes, 0.4)
    for image in range(3):
        kept = []
        for index in range(40):
            rivals = [one for one in kept if classes[image, one] == classes[image, index]]
            if all(iou(boxes[image, one].tolist(), boxes[image, index].tolist()) <= 0.4 for one in rivals):
                kept.append(index)
        assert keep[image].nonzero().flatten().tolist() == kept
    assert 0.1 < keep.float().mean() < 0.9


def test_embedding_holds_scores_counts_and_sizes():
    config = DetectorVisionConfig(**SMALL, score_threshold=0.3, max_detections=5)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.48], [0.6, 0.6, 0.8, 0.8], [0.1, 0.1, 1.0, 1.0]]])
    scores = torch.zeros(1, 4, 3)
    scores[0, :3, 0] = torch.tensor([0.9, 0.8, 0.7])  # two things: the second box is the first again
    scores[0, 1, 2] = 0.6  # something else on the place of the first
    scores[0, 3, 1] = 0.25  # below the threshold
    (embed,), (box,), (known,) = summarize_detections(scores, boxes, torch.zeros(1, 3), config)
    assert not known  # nothing but things of the first class
    torch.testing.assert_close(embed, torch.tensor([0.9, 0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0]))


def test_classifier_supports_the_detector():
    config = DetectorVisionConfig(
        **SMALL, score_threshold=0.3, classifier="test_efficientnet", classifier_weight=0.5, num_scenes=2
    )
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.48]]])
    scores = torch.zeros(1, 2, 3)
    scores[0, 0, 0], scores[0, 1, 1] = 0.4, 0.36
    # The second thing wins its place; the third has no box; of the scenes one is too improbable.
    evidence = torch.tensor([[0.0, 1.0, 0.8, 0.9, 0.02]])
    (embed,), (box,), (known,) = summarize_detections(scores, boxes, evidence, config)
    assert known and torch.equal(box, boxes[0, 1])
    size = (0.5 * 0.48) ** 0.5
    expected = [0.0, 0.36 + 0.64 * 0.5, 0.4, 0.0, 0.25, 0.25, 0.0, size, 0.4, 0.9, 0.0]
    torch.testing.assert_close(embed, torch.tensor(expected))


def test_colors_of_ground_and_main_thing():
    assert [COLORS[index] for index in name_colors(torch.tensor([PAINTS[name] for name in COLORS])).tolist()] == list(
        COLORS
    )
    pixels = torch.full((2, 3, 64, 96), 0.5)
    pixels[0, :, 32:] = torch.tensor([0.3, 0.6, 0.2])[:, None, None]  # grass
    pixels[0, :, 10:40, 20:60] = torch.tensor([0.4, 0.25, 0.1])[:, None, None]  # a brown thing
    boxes = torch.tensor([[20 / 96, 10 / 64, 60 / 96, 40 / 64], [0.0, 0.0, 0.1, 0.1]])
    found = describe_colors(pixels, boxes, torch.tensor([True, False]))
    assert found.shape == (2, len(GROUNDS) + len(COLORS))
    assert 0.8 < found[0, GROUNDS.index("green")] < 1 and found[0, 1:3].sum() == 0 and found[1].sum() == 0
    assert COLORS[int(found[0, len(GROUNDS) :].argmax())] == "brown" and found[0, len(GROUNDS) :].sum() == 1


def test_classifier_travels_with_the_tower(tmp_path):
    torch.manual_seed(0)
    config = DetectorVisionConfig(**SMALL, classifier="test_efficientnet", num_classifier_classes=5, num_scenes=2)
    tower = DetectorVisionModel(config).eval()
    tower.class_map.data[:, 3] = 1  # each class of the classifier shows the first scene
    pixel_values = torch.randn(2, 3, 64, 96)
    embeds = tower(pixel_values).pooler_output
    assert embeds.shape == (2, 11) and config.hidden_size == 11
    torch.testing.assert_close(embeds[:, 9:], torch.tensor([[1.0, 0.0]] * 2))
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixel_values).pooler_output, embeds)


def test_round_trip(tower, tmp_path):
    pixel_values = torch.randn(2, 3, 64, 96)
    output = tower(pixel_values)
    assert output.pooler_output.shape == (2, 9)
    assert output.last_hidden_state.shape == (2, 8, 4, 6)
    assert torch.equal(tower(pixel_values, return_dict=False)[1], output.pooler_output)
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, DetectorVisionModel) and AutoConfig.from_pretrained(tmp_path).num_bins == 4
    assert torch.equal(again(pixel_values).pooler_output, output.pooler_output)


def test_captioner_with_such_a_tower(tower, tmp_path):
    text_config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    config = ClipCapConfig(vision_config=tower.config, text_config=text_config)
    assert config.clip_embed_dim == 9
    ClipCapForConditionalGeneration(config, vision_tower=tower).save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path).eval()
    embeds, _ = embed_pixels(again.vision_tower, pixel_values)
    assert torch.equal(embeds, tower(pixel_values).pooler_output)


@pytest.mark.parametrize(
    "wrong", [{"score_threshold": 0.0}, {"iou_threshold": 1.0}, {"depths": (1, 2)}, {"num_scenes": 2}]
)
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
        DetectorVisionConfig(**wrong)
