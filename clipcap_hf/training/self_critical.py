"""Self-critical training (Rennie et al. 2017): favour sampled captions that score above greedy ones."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from ..metrics import document_frequencies, tokenize
from ..metrics.formulas import cider
from ..metrics.ngrams import Corpus
from ..model.modeling_clipcap import ClipCapForConditionalGeneration


class CiderReward:
    """
    Compute CIDEr-D of captions, counting the end of a caption as a word.

    Without that word, the reward teaches captions that break off after "with a".

    Args:
        references (`list[list[str]]`): The captions of all training images, which determine the weight of rare
            n-grams.
        tokenizer (`str`): `"python"`, `"ja"`, `"characters"` or `"none"`. Not `"ptb"`, which starts Java for each
            batch.

    Example:

    ```python
    >>> from clipcap_hf.training.self_critical import CiderReward

    >>> reward = CiderReward([["a red heart"], ["a blue dog"], ["a sun"]])
    >>> whole, cut = reward(["a red heart", "a red heart"], [True, False], [["a red heart"], ["a red heart"]])
    >>> bool(whole > cut)
    True

    ```
    """

    END = "<end>"

    def __init__(self, references: Sequence[Sequence[str]], tokenizer: str = "python"):
        if tokenizer == "ptb":
            raise ValueError("The reward cannot start Java for each batch: choose the tokenizer 'python', not 'ptb'.")
        self.tokenizer = tokenizer
        self.frequencies = document_frequencies(self._with_end(references), tokenizer="none")

    def __call__(
        self, captions: Sequence[str], ended: Sequence[bool], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Return rewards of shape (captions,), from 0 to 10."""
        captions = tokenize(list(captions), self.tokenizer)
        captions = [f"{caption} {self.END}".strip() if end else caption for caption, end in zip(captions, ended)]
        return cider(Corpus(captions, self._with_end(references)), self.frequencies)["cider"][1]

    def _with_end(self, references: Sequence[Sequence[str]]) -> list[list[str]]:
        tokens = iter(tokenize([text for group in references for text in group], self.tokenizer))
        return [[f"{next(tokens)} {self.END}" for _ in group] for group in references]


class _GreedyFirstHalf(LogitsProcessor):
    """Make the first half of a batch greedy while the second half samples, in one pass."""

    def __call__(self, input_ids, scores):
        half = len(scores) // 2
        greedy = torch.full_like(scores[:half], -torch.inf)
        greedy.scatter_(1, scores[:half].argmax(1, keepdim=True), 0.0)
        return torch.cat([greedy, scores[half:]])


def self_critical_loss(
    model: nn.Module, captioner: ClipCapForConditionalGeneration, inputs: dict, reward: Callable, tokenizer
) -> tuple[torch.Tensor, tuple[float, float]]:
    """
    Compute the self-critical loss of one batch.

    It is minus the log-probability of sampled captions, weighted by their reward minus that of the greedy captions.
    Dropout is off, so that captions are drawn from the distribution that is trained.

    Args:
        model (`nn.Module`): The captioner, wrapped for distributed training or not.
        captioner ([`ClipCapForConditionalGeneration`]): The same captioner, not wrapped.
        inputs (`dict`): A batch of [`CaptioningCollator`] with `references` and `prompt_length`.
        reward (`Callable`): See [`CiderReward`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes the captions.

    Returns:
        The loss per token, and the mean rewards of the sampled and of the greedy captions.
    """
    if "references" not in inputs:
        raise ValueError("Self-critical training needs the references: pass `return_references=True` to the collator.")
    model.eval()
    prompt_length = inputs["prompt_length"]
    prompt = {name: inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")}
    images = {name: inputs[name] for name in ("clip_embeds", "pixel_values") if name in inputs}
    if "pixel_values" in images and captioner.config.freeze_vision:
        with torch.no_grad():
            images = {
                "clip_embeds": captioner.get_clip_embeds(images["pixel_values"])
            }  # encode once for all uses below

    sequences = captioner.generate(
        **{name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in {**prompt, **images}.items()},
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        num_beams=1,
        logits_processor=LogitsProcessorList([_GreedyFirstHalf()]),
    )
    tokens = sequences[:, prompt_length:]
    real, ended = _until_end(tokens, captioner.generation_config.eos_token_id)
    captions = [
        tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(tokens.cpu(), real.cpu())
    ]
    references = list(inputs["references"])
    rewards = np.asarray(reward(captions, ended.tolist(), references * 2), dtype=np.float32)
    greedy, sampled = np.split(rewards, 2)
    advantage = torch.from_numpy(sampled - greedy).to(tokens.device)

    tokens, real = tokens[len(references) :], real[len(references) :]
    outputs = model(
        input_ids=torch.cat([prompt["input_ids"], tokens], 1),
        attention_mask=torch.cat([prompt["attention_mask"], real.to(prompt["attention_mask"].dtype)], 1),
        logits_to_keep=tokens.shape[1] + 1,
        use_cache=False,
        **images,
    )
    log_probs = -F.cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), tokens, reduction="none")
    loss = -(advantage[:, None] * log_probs * real).sum() / real.sum()
    return loss, (float(sampled.mean()), float(greedy.mean()))


def _until_end(tokens: torch.Tensor, eos_token_id) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens belong to the caption, its end token included, and which captions have an end token."""
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, device=tokens.device).flatten()
    is_end = torch.isin(tokens, ends)
    real = is_end.cumsum(1) - is_end.long() == 0
    return real, is_end.any(1)
