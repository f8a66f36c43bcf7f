"""The language model's tokenizer, with the placeholder of images and a padding token."""

import copy

from transformers import AddedToken

from .configuration_clipcap import IMAGE_TOKEN


def captioning_tokenizer(tokenizer):
    """Return a tokenizer with placeholder and padding token that pads on the left; a copy if anything changes."""
    # Their ids, since a damaged file may name tokens that the vocabulary lacks.
    pads, ends = tokenizer.pad_token_id is not None, tokenizer.eos_token_id is not None
    if IMAGE_TOKEN in tokenizer.get_vocab() and pads and tokenizer.padding_side == "left":
        return tokenizer
    if not (pads or ends):
        raise ValueError(
            "The tokenizer has neither a padding nor an end token: set `tokenizer.pad_token`, or better "
            "`tokenizer.eos_token`, which ends captions, and save the tokenizer in its language model's folder."
        )
    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if not pads:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def encodable(texts: list[str]) -> list[str]:
    """Return the texts if tokenizers can read them: a byte of the command line may be no character."""
    for text in texts:
        if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"A prompt must be text in UTF-8, but one is {repr(text)[:80]}.")
    return texts


__all__ = ["captioning_tokenizer", "encodable"]
