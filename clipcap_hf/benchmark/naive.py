"""Caption as the official code does: one image at a time, without a cache, reading the whole sequence per token."""

import torch

from ..model.modeling_clipcap import ClipCapForConditionalGeneration


def _prefix(model: ClipCapForConditionalGeneration, image: torch.Tensor) -> torch.Tensor:
    kind = "pixel_values" if image.ndim == 4 else "clip_embeds"
    return model.get_image_features(**{kind: image}).pooler_output


@torch.no_grad()
def naive_greedy(model: ClipCapForConditionalGeneration, images: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Decode greedily and return token ids `(images, new_tokens)`.

    Images are pixels `(images, 3, height, width)` or embeddings `(images, dim)`.
    """
    captions = []
    for image in images.split(1):
        sequence = _prefix(model, image)
        tokens = []
        for _ in range(new_tokens):
            logits = model.language_model(inputs_embeds=sequence, use_cache=False).logits[:, -1]
            tokens.append(logits.argmax(-1))
            sequence = torch.cat([sequence, model.get_input_embeddings()(tokens[-1])[:, None]], dim=1)
        captions.append(torch.stack(tokens, dim=1))
    return torch.cat(captions)


@torch.no_grad()
def naive_beams(
    model: ClipCapForConditionalGeneration, images: torch.Tensor, new_tokens: int, num_beams: int
) -> torch.Tensor:
    """Return the best beam's token ids `(images, new_tokens)`; images are as for [`naive_greedy`]."""
    captions = []
    for image in images.split(1):
        sequences = _prefix(model, image)
        tokens = torch.zeros(1, 0, dtype=torch.long, device=sequences.device)
        scores = torch.zeros(1, device=sequences.device)
        for _ in range(new_tokens):
            logits = model.language_model(inputs_embeds=sequences, use_cache=False).logits[:, -1]
            totals = logits.float().log_softmax(-1)
            scores, places = (scores[:, None] + totals).flatten().topk(num_beams)
            parents, best = places // totals.shape[-1], places % totals.shape[-1]
            sequences = sequences[parents]
            tokens = torch.cat([tokens[parents], best[:, None]], dim=1)
            sequences = torch.cat([sequences, model.get_input_embeddings()(best)[:, None]], dim=1)
        captions.append(tokens[:1])
    return torch.cat(captions)
