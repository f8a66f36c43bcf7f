"""Pack captions into rows: all of an image, so that its prefix is read only once, or those of several images.

The prefix does not depend on the caption, so a row can hold `[prefix, caption 1, ..., caption 5]`: each caption sees
the prefix and itself, and counts its positions from the end of the prefix. Losses and gradients equal those of five
rows with one caption each. Several images share a row, each seeing only itself, which leaves little padding.

The last token of the prompt predicts the first token of every caption, and the last token of a caption predicts
nothing, so it is only a label. Labels therefore say at which position they are predicted (`predictor_index`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.modeling_clipcap import ClipCapForConditionalGeneration


IGNORED = -100


@dataclass
class ImageWithCaptions:
    """The tokens of one image and its captions.

    Args:
        prompt (`list[int]`): The image's placeholders and the text around them, shared by all captions.
        captions (`list[list[int]]`): The tokens of each caption, end token included.
    """

    prompt: list[int]
    captions: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(max(0, len(caption) - 1) for caption in self.captions)


def pack(
    images: Sequence[ImageWithCaptions],
    image_token_id: int,
    pad_token_id: int,
    images_per_row: int = 2,
) -> dict[str, torch.Tensor]:
    r"""
    Make a training batch in which all captions of an image share its prefix.

    Args:
        images (sequence of [`ImageWithCaptions`]): The images, in the order of the pixels or embeddings of the batch.
        image_token_id (`int`): The placeholder for one vector of the prefix.
        pad_token_id (`int`): Fills rows up to the length of the longest.
        images_per_row (`int`): Average number of images per row; rows get nearly equal lengths.

    Returns:
        `dict`: `input_ids` and `position_ids` (rows, length); `attention_mask` (rows, 1, length, length), True for
        positions that may be attended to; `labels` (labels,), of which the first is ignored, and `predictor_index`
        (labels,), the position that predicts each, counted over all rows; `prefix_index` (placeholders,), for each
        placeholder the index of its prefix vector, counted over the prefixes of all images.
    """
    rows = _balanced_rows(images, max(1, round(len(images) / images_per_row)))
    length = max(sum(len(images[index]) for index in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # The image and caption (0: prompt) of each position; padding sees only itself.
    image_of, caption_of = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    # Trainer counts the labels without the first, which in ordinary batches nothing predicts.
    labels, predictor_index = [IGNORED], [0]
    prefix_index: list[int] = []
    prefix_length = sum(token == image_token_id for token in images[0].prompt)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            tokens, positions, captions, predictors = _lay_out(images[index])
            end = start + len(tokens)
            input_ids[row, start:end] = torch.tensor(tokens)
            position_ids[row, start:end] = torch.tensor(positions)
            image_of[row, start:end] = index
            caption_of[row, start:end] = torch.tensor(captions)
            labels += itertools.chain(*images[index].captions)
            predictor_index += [row * length + start + place for place in predictors]
            prefix_index += range(index * prefix_length, (index + 1) * prefix_length)
            start = end
    return {
        "input_ids": input_ids,
        "attention_mask": _mask(image_of, caption_of),
        "position_ids": position_ids,
        "labels": torch.tensor(labels),
        "predictor_index": torch.tensor(predictor_index),
        "prefix_index": torch.tensor(prefix_index),
    }


def _balanced_rows(images: Sequence[ImageWithCaptions], number: int) -> list[list[int]]:
    """Assign the images to rows: the longest first, each to the row that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(number)]
    lengths = [0] * number
    for index in sorted(range(len(images)), key=lambda index: -len(images[index])):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(index)
        lengths[shortest] += len(images[index])
    return [row for row in rows if row]


def _lay_out(image: ImageWithCaptions) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the tokens of an image with their positions and captions (0: prompt), and the predictor of each label."""
    prompt = len(image.prompt)
    tokens, positions, captions = list(image.prompt), list(range(prompt)), [0] * prompt
    predictors = []
    for number, caption in enumerate(image.captions, start=1):
        read = caption[:-1]
        predictors += [prompt - 1, *range(len(tokens), len(tokens) + len(read))][: len(caption)]
        tokens += read
        positions += range(prompt, prompt + len(read))
        captions += [number] * len(read)
    return tokens, positions, captions, predictors


def _mask(image_of: torch.Tensor, caption_of: torch.Tensor) -> torch.Tensor:
    """Let each position see the earlier tokens of its image's prompt and of its own caption."""
    length = image_of.shape[1]
    same_image = image_of.unsqueeze(2) == image_of.unsqueeze(1)  # padding counts as a separate image
    keys = caption_of.unsqueeze(1)
    visible = (keys == 0) | (keys == caption_of.unsqueeze(2))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (same_image & visible & causal).unsqueeze(1)


@torch.no_grad()
def can_pack(model: ClipCapForConditionalGeneration) -> bool:
    """Test whether the language model respects 4-dimensional attention masks and positions, on two short captions.

    Recurrent models (Mamba) and some attention kernels do not, and would let captions see each other.
    """
    training = model.training
    config, token = model.config, model.config.image_token_id
    captions = [[1, 2, 5], [3, 4, 6]]
    shape = (1, config.clip_length) if config.vision_feature == "patches" else (1,)
    embeds = torch.ones(*shape, config.clip_embed_dim, device=model.device)
    prompt = [token] * config.prefix_length
    together = pack([ImageWithCaptions(prompt, captions)], token, 0)
    alone = torch.tensor([prompt + caption[:-1] for caption in captions])
    try:
        model.eval()
        packed = model(**{name: value.to(model.device) for name, value in together.items()}, clip_embeds=embeds).logits
        rows = model(input_ids=alone.to(model.device), clip_embeds=embeds.expand(2, *embeds.shape[1:])).logits
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    ends = torch.tensor([config.prefix_length + 1, config.prefix_length + 3])  # where the last labels are predicted
    return torch.allclose(packed[0, ends].float(), rows[:, -1].float(), rtol=2e-2, atol=2e-2)
