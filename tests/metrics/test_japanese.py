"""Japanese captions: no part of the package assumes that spaces separate words."""

import clipcap_hf
import pytest
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_embeds, embed_images
from clipcap_hf.data import load_emoji
from clipcap_hf.demo import train_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Tokenizer


def unigram(captions):
    """As rinna/japanese-gpt2-*: a sentencepiece unigram in a T5Tokenizer, which ends every text with `</s>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=4
    )
    tokenizer.train_from_iterator(captions, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    vocab = [(piece, 0.0 if piece in special else -2.0 - index / 100) for piece, index in pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0, bos_token="<s>")


def characters(captions):
    """As BERT for Japanese characters: every character is a token, and decoding must put nothing between them."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2}
    for character in sorted(set("".join(captions))):
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", bos_token="[SEP]"
    )


@pytest.fixture(scope="module")
def embedded():
    """CLIP embeddings of 32 real drawings, and their Japanese names."""
    rows = load_emoji("train", language="ja")
    plain = [index for index, names in enumerate(rows["captions"]) if " " not in names[0]]  # skin tones have spaces
    rows = rows.select(plain[:: len(plain) // 32]).select(range(32))
    model = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI)
    processor = ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)
    return embed_images(model, processor, rows["image"], progress=False), [names[0] for names in rows["captions"]]


@pytest.mark.parametrize("make", [unigram, characters])
def test_embedded_set_in_japanese_trains_and_captions(embedded, make, tmp_path):
    embeds, captions = embedded
    assert len(set(captions)) == 32 and not any(" " in caption for caption in captions)
    make(captions).save_pretrained(tmp_path)
    torch.manual_seed(0)
    vocab_size = len(make(captions))
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(
        tmp_path
    )
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, str(tmp_path), prefix_length=2, clip_embed_dim=embeds.shape[1], normalize_clip_embeds=True
    )
    processor = ClipCapProcessor.from_vision_text_pretrained(None, str(tmp_path), prefix_length=2)
    rows = [{"clip_embeds": row, "captions": caption} for row, caption in zip(embeds, captions)]
    batch = CaptioningCollator(processor)(rows)
    end = processor.tokenizer.eos_token_id
    assert ((batch["labels"] == end).sum(1) == 1).all()  # the tokenizer's own end token is not added to ours
    assert not (batch["labels"] == processor.tokenizer.unk_token_id).any()

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = caption_embeds(model.eval(), processor, embeds, progress=False)
    assert sum(one == other for one, other in zip(said, captions)) >= 30
    assert not any(" " in caption for caption in said)

    model.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    again = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    processor = ClipCapProcessor.from_pretrained(tmp_path / "captioner")
    assert caption_embeds(again, processor, embeds, progress=False) == said

    # A beginning is continued without a space, whatever the tokenizer makes of the start of a text. (Trained on whole
    # captions for seconds, the model may itself say the piece that stands for a space, once or twice.)
    inputs = processor(clip_embeds=embeds, text=[caption[0] for caption in captions], return_tensors="pt")
    continued = processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)
    assert all(text.strip().startswith(caption[0]) for text, caption in zip(continued, captions))
    assert sum(" " not in text.strip() for text in continued) >= 28


def test_a_new_tokenizer_keeps_scripts_apart():
    """Without spaces, the tokens of sentences span words: "ボールで遊ぶ" was one."""
    captions = ["小さな女の子がボールで遊ぶ", "小さな女の子がボールを見る", "a girl plays"] * 5
    plain, split = (train_tokenizer(captions, 400, split_scripts=split) for split in (False, True))
    assert len(plain(captions[0]).input_ids) < 4
    assert [split.decode([token]) for token in split(captions[0]).input_ids[-4:]] == ["ボール", "で", "遊", "ぶ"]
    assert split.decode(split(captions[0]).input_ids) == captions[0]
    assert split.tokenize("a girl plays") == plain.tokenize("a girl plays")
