"""The verdict at the end of each kind of run."""

import pytest
import torch
from clipcap_hf.data.embeddings import embeds_as_tensors
from clipcap_hf.training.baselines import (
    BEFORE,
    MOST_COMMON,
    NEAREST,
    most_common_caption,
    nearest_images,
    read_pooled,
)
from clipcap_hf.training.verdict import (
    Ending,
    Evaluation,
    disagreement,
    mean_words,
    report,
    shared_words,
    verdict,
)
from datasets import Array2D, Dataset, Features, List, Value


NAMES = ["red heart", "blue dog", "yellow sun", "white cat", "purple rain", "black hat"]

STYLED = [f"a drawing of {name}" for name in NAMES]


def ending(losses=(3.0, 2.0, 1.5), saved=None, after=None, before=None, own=50.0, nearest=30.0, ciders=None, **kwargs):
    cider_before = kwargs.pop("cider_before", None)
    ciders = ciders or range(len(losses))
    evaluations = [
        Evaluation(epoch, 10 * epoch, {"loss": loss, "cider": cider})
        for epoch, (loss, cider) in enumerate(zip(losses, ciders), 1)
    ]
    scores = {
        name: {"cider": value, "bleu_4": 1.0, "rouge_l": 2.0}
        for name, value in (("captioner", own), (NEAREST, nearest), (MOST_COMMON, 2.0))
    }
    if cider_before is not None:
        scores[BEFORE] = {"cider": cider_before, "bleu_4": 1.0, "rouge_l": 2.0}
    return Ending(
        evaluations,
        saved_step=10 * (saved or len(losses)),
        metric="loss",
        scores=scores,
        references=[[f"a drawing of {name}"] for name in NAMES],
        before=list(before or NAMES),
        after=list(after or [f"a drawing of {name}" for name in NAMES]),
        before_rows=list(range(6)),
        **{"loss_before": 9.0, **kwargs},
    )


@pytest.mark.parametrize(
    ("run", "word", "advice"),
    [
        (ending(), "learned", "scores higher on held-out images than copied captions"),
        (ending(), "learned", "With 6 held-out images this is uncertain"),
        (ending((3.0, 1.5, 2.5), saved=2), "learned", "rose after epoch 2"),
        (ending(after=["a drawing of a cat"] * 6), "collapsed", "Lower the learning rate"),
        (ending(after=NAMES), "did not change", "--learning-rate"),
        (ending(cider_before=60.0, loss_before=1.6), "no better", "CIDEr 60.0 against 50.0"),
        (ending(cider_before=60.0), "learned", "scores higher"),  # the loss fell: a new style
        (ending(own=20.0), "below copying", "nearest training image"),
        (ending(own=1.0, nearest=0.0), "below copying", "most common caption"),
        (ending((1.5, 2.0, 2.5)), "overfitted", "fewer epochs"),
        (ending((1.5, 2.0, 2.2, 2.3, 2.5), saved=1), "overfitted", "epoch 1 was kept"),
        (ending(overlap=4), "not judged", "4 of the 6 held-out images are also training images"),
        (ending(()), "not judged", "check captions of new images"),
        (
            ending(after=[*STYLED[:4], *NAMES[4:]], shared_words="a drawing of"),
            "partly learned",
            "4 of the 6 captions start",
        ),
        (ending(after=STYLED, shared_words="a drawing of", mean_words=5.0), "learned", "copied captions"),
        (
            ending(after=STYLED, mean_words=1.5),
            "partly learned",
            "5.0 words on average, but the training captions 1.5",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_each_kind_of_run_is_named_and_told_what_to_do(run, word, advice):
    found, why = verdict(run)
    assert found == word and advice in why
    assert f"Verdict: {word}. " in report(run, ["scores.json"], "out")


def test_words_that_nearly_all_captions_start_with():
    captions = [[f"a drawing of {name}", "another"] for name in NAMES]
    assert shared_words(captions) == "a drawing of"
    assert shared_words([*captions, ["a photo"]]) == ""
    assert shared_words([*captions * 3, ["a photo"]]) == "a drawing of"
    assert shared_words([["a"], ["a dog"]]) == shared_words([]) == ""
    assert mean_words(["one", "two words"]) == 1.5 and mean_words([]) == 0


def test_one_caption_for_images_that_have_one_is_no_collapse():
    run = ending(after=["a drawing"] * 6)
    run.references = [["a drawing"]] * 6
    assert verdict(run)[0] != "collapsed"
    assert verdict(run)[0] == "not judged" and "same caption" in verdict(run)[1]


def test_loss_and_cider_that_disagree_are_a_warning():
    run = ending((3.0, 2.0, 1.5), ciders=(240.0, 60.0, 70.0))
    assert "lowest in epoch 3 (CIDEr 70.0), CIDEr highest in epoch 1 (240.0)" in disagreement(run)
    assert disagreement(run) in report(run, [], "out")
    assert disagreement(ending(ciders=(10.0, 60.0, 59.0))) is None


def test_the_report_shows_epochs_baselines_and_captions():
    text = report(ending((3.0, 1.5, 2.5), saved=2, overlap=2), ["scores.json", "curve.png"], "out")
    assert "best: epoch 2 of 3, by loss" in text
    assert "blue dog -> a drawing of blue dog (a drawing of blue dog)" in text
    assert text.count(" -> a drawing of") == 6
    assert "2 of the 6 held-out images are also training images" in text
    assert NEAREST in text and MOST_COMMON in text
    assert "The captioner is in out, with scores.json, curve.png.\n" in text


def test_baselines_copy_captions():
    assert most_common_caption([["a"], ["b", "c"], ["b"], ["c"]]) == "b"
    train = torch.eye(3)
    rows, similarity = nearest_images(torch.tensor([[0.0, 5.0, 0.1], [1.0, 0.0, 0.0]]), train, batch_size=1)
    assert rows.tolist() == [1, 0] and similarity[1] == 1 and similarity[0] < 1
    patches = torch.stack([train, train[[0, 0, 0]]])  # (images, patches, dim)
    assert nearest_images(patches, patches)[0].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_embeddings_are_read_as_tensors(shape):
    embeds = torch.randn(5, *shape)
    feature = List(Value("float32"), length=6) if len(shape) == 1 else Array2D(shape, "float32")
    features = Features({"captions": List(Value("string")), "clip_embeds": feature})
    data = Dataset.from_dict({"captions": [["a", "b"]] * 5, "clip_embeds": embeds.numpy()}, features=features)
    rows = embeds_as_tensors(data.select([3, 1]))
    assert isinstance(rows[0]["clip_embeds"], torch.Tensor) and rows[0]["captions"] == ["a", "b"]
    assert torch.equal(torch.stack([row["clip_embeds"] for row in rows.__getitems__([0, 1])]), embeds[[3, 1]])
    # Batch by batch, since the patches of thousands of images fill the memory.
    torch.testing.assert_close(read_pooled(rows, batch_size=1), embeds[[3, 1]].reshape(2, -1, 6).mean(1))
