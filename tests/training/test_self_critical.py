"""Self-critical training raises its objective, the reward of captions."""

import numpy as np
import pytest
import torch
from clipcap_hf import (
    EMOJI_MINI,
    CaptioningCollator,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ClipCapTrainer,
)
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.training.arguments import CaptioningArguments
from clipcap_hf.training.rows import EpochRows
from clipcap_hf.training.self_critical import CiderReward, _until_end, self_critical_loss
from datasets import Dataset


REFERENCES = [["a red heart", "a heart"], ["a blue dog"], ["two green apples"], ["a small white cat"]]


def test_reward_is_cider_with_an_end_word():
    pycocoevalcap = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    reward = CiderReward(REFERENCES)
    captions = ["a red heart", "a small dog", "apples", "a small white cat"]
    scorer = pycocoevalcap.CiderScorer(n=4, sigma=6.0)
    for caption, references in zip(captions, REFERENCES):
        scorer += (f"{caption} <end>", [f"{reference} <end>" for reference in references])
    _, expected = scorer.compute_score()
    np.testing.assert_allclose(reward(captions, [True] * 4, REFERENCES), expected, rtol=1e-6)


def test_breaking_off_costs_reward():
    reward = CiderReward(REFERENCES)
    whole, cut, empty, early = reward(
        ["a small white cat", "a small white cat", "", "a small white"],
        [True, False, False, True],
        [REFERENCES[3]] * 4,
    )
    assert whole == pytest.approx(10) and 0 < cut < whole and empty == 0 and early < whole
    with pytest.raises(ValueError, match="'python', not 'ptb'"):
        CiderReward(REFERENCES, "ptb")


def test_captions_end_with_their_first_end_token():
    tokens = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], [5, 1, 0, 0]])
    real, ended = _until_end(tokens, [0, 1])
    assert real.sum(1).tolist() == [3, 1, 4, 2] and ended.tolist() == [True, True, False, True]
    assert _until_end(tokens, None)[0].all()


@pytest.fixture
def batch(embeds_processor, captions):
    rows = [{"clip_embeds": torch.randn(16).tolist(), "captions": [caption]} for caption in captions]
    return CaptioningCollator(embeds_processor, return_references=True)(rows)


def test_loss_is_the_weighted_log_probability_of_the_samples(make_model, embeds_processor, batch):
    model = make_model(None).train()
    seen = {}

    def reward(captions, ended, references):
        seen.update(captions=captions, references=references)
        return np.array([0.5] * 8 + [1.5] * 4 + [-0.5] * 4)  # advantages 1 and -1

    torch.manual_seed(0)
    loss, rewards = self_critical_loss(model, model, batch, reward, embeds_processor.tokenizer)
    assert rewards == (0.5, 0.5)
    assert seen["references"] == batch["references"] * 2
    greedy = model.generate(clip_embeds=batch["clip_embeds"])[:, 4:]
    texts = [text.strip() for text in embeds_processor.batch_decode(greedy, skip_special_tokens=True)]
    assert seen["captions"][:8] == texts  # half of the batch is greedy, and the other is not
    assert seen["captions"][8:] != texts

    torch.manual_seed(0)
    samples = []
    forward = model.forward

    def spy(**kwargs):
        if kwargs.get("use_cache") is False:
            samples.append((kwargs["input_ids"], kwargs["attention_mask"]))
        return forward(**kwargs)

    model.forward = spy
    self_critical_loss(model, model, batch, reward, embeds_processor.tokenizer)
    (ids, mask), model.forward = samples[0], forward
    logits = model(input_ids=ids, attention_mask=mask, clip_embeds=batch["clip_embeds"]).logits
    chosen = logits.log_softmax(-1)[:, 3:-1].gather(2, ids[:, 4:, None])[..., 0] * mask[:, 4:]
    weight = torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    torch.testing.assert_close(loss, -(weight * chosen).sum() / mask[:, 4:].sum())


def test_the_prompt_includes_what_the_template_says_after_the_image(make_model, tokenizer, captions):
    """Greedy captions continue the whole prompt, as in evaluation, and the reward leaves out the template."""
    from clipcap_hf import ClipCapProcessor

    processor = ClipCapProcessor(None, tokenizer, prefix_length=4, prompt_template="Look:<image> a red")
    rows = [{"clip_embeds": torch.randn(16).tolist(), "captions": [caption]} for caption in captions]
    batch = CaptioningCollator(processor, return_references=True)(rows)
    prompt = processor.tokenize_prompts(None, 8, return_tensors="pt")
    assert batch["prompt_length"] == prompt["input_ids"].shape[1] > 4 + 1
    assert torch.equal(batch["input_ids"][:, : batch["prompt_length"]], prompt["input_ids"])
    assert (batch["labels"][:, : batch["prompt_length"]] == -100).all()
    assert (batch["labels"][:, batch["prompt_length"]] != -100).all()

    model = make_model(None)
    expected = model.generate(**prompt, clip_embeds=batch["clip_embeds"])[:, batch["prompt_length"] :]
    texts = [text.strip() for text in tokenizer.batch_decode(expected, skip_special_tokens=True)]
    seen = []

    def reward(captions, ended, references):
        seen.extend(captions)
        return np.zeros(len(captions))

    self_critical_loss(model, model, batch, reward, tokenizer)
    assert seen[:8] == texts


def test_references_are_needed(make_model, embeds_processor, batch, tmp_path):
    del batch["references"]
    with pytest.raises(ValueError, match="`return_references=True`"):
        self_critical_loss(make_model(None), make_model(None), batch, None, embeds_processor.tokenizer)
    args = CaptioningArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`processing_class`"):
        ClipCapTrainer(model=make_model(None), args=args, reward=lambda *_: 0, eval_dataset=[1])


def test_reward_of_the_embedded_set_rises(tmp_path):
    """Training improves the greedy captions of a half-trained captioner on its training images."""
    model = ClipCapForConditionalGeneration.from_pretrained(EMOJI_MINI)
    processor = ClipCapProcessor.from_pretrained(EMOJI_MINI)
    rows = load_emoji("new_caption").select(range(0, 904, 30))  # of which it names half
    embeds = embed_images(model, processor, rows["image"], progress=False)
    captions = [names[:1] for names in rows["captions"]]
    reward = CiderReward(captions)

    def reward_of_greedy():
        found = caption_embeds(model.eval(), processor, embeds, progress=False)
        return reward(found, [True] * len(found), captions).mean()

    before = reward_of_greedy()
    trainer = ClipCapTrainer(
        model=model,
        args=CaptioningArguments(
            output_dir=str(tmp_path),
            max_steps=25,
            learning_rate=2e-4,
            warmup_steps=2,
            per_device_train_batch_size=31,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=EpochRows(Dataset.from_dict({"clip_embeds": embeds.tolist(), "captions": captions})),
        data_collator=CaptioningCollator(processor, return_references=True),
        processing_class=processor,
        reward=reward,
    )
    trainer.train()
    assert reward_of_greedy() > before + 0.3
    logged = [entry["reward_greedy"] for entry in trainer.state.log_history if "reward_greedy" in entry]
    assert len(logged) == 6 and logged[-1] > logged[0]  # the first step, and every fifth
