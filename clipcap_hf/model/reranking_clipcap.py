"""Re-rank the captions of a beam search by the text tower of the captioner's CLIP.

A language model prefers fluent captions; CLIP tells which of them fits the image. The score of a caption is the beam
search's own (by default its mean log-probability per token, in nats) plus a weight times the cosine of image and text.
A text tower that was trained on few captions tends to find them closer to an image than captions that it never saw; a
penalty on their cosine makes up for that ("calibrated stacking", Chao et al. 2016). With a memory of the captions of
training and their images, the nearest of them is a candidate, too, and a new caption must fit well to be taken.
"""

import math
import os
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import cached_file

from .beam_search_clipcap import CannotSearchFast, scored_beam_search
from .generation_clipcap import GeneratesCaptions, may_search_fast, setting
from .hashing_clipcap import weights_hash
from .memory_clipcap import CaptionMemory, may_recall, with_recalled
from .modeling_vision import embed_pixels, load_vision_tower
from .packages_clipcap import PACKAGE
from .text_tower_clipcap import TextTower, load_text_tower


#: The folder of a text tower that is saved with a captioner.
TEXT_TOWER = "text_tower"
DEFAULT_WEIGHT = 10.0
DEFAULT_BEAMS = 10  # that the commands search with, unless told otherwise
_KEPT_TEXTS = 50_000


class CaptionReranker:
    r"""
    Choose among the captions of a beam search by the CLIP's text tower: `generate(num_beams=10, rerank=reranker)`.

    All `num_beams` captions of each image are candidates; `num_return_sequences` of them are returned, best first.
    Their texts are embedded in one batch, and texts that were embedded before are not embedded again.

    With a memory, the known caption whose images were nearest is a candidate besides, unless captions have to go on
    from a prompt or `length_penalty` is not 1. Outputs then have no `logits`, `scores` and `beam_indices`, since that
    caption has none.

    Args:
        text_tower ([`~clipcap_hf.model.text_tower_clipcap.TextTower`]): Of the CLIP that the vision tower belongs to.
        processor ([`ClipCapProcessor`]): The captioner's, which turns tokens into text.
        weight (`float`): Of the cosine. 0 leaves the beam search's order. Choose it on held-out images.
        seen_penalty (`float`): Taken off the cosines of the text tower's `seen_captions`. Choose it on held-out images
            of captions that were seen and of captions that were not.
        memory ([`CaptionMemory`], *optional*): The captions of training and their images.

    Raises:
        ValueError: If the weight or the penalty is not a number of at least 0, or there is a penalty, but the text
            tower does not list the captions that it has seen.

    Example:

    ```python
    >>> reranker = CaptionReranker.from_pretrained(model, processor)  # doctest: +SKIP
    >>> model.generate(pixel_values=pixel_values, num_beams=10, rerank=reranker)  # doctest: +SKIP

    ```
    """

    def __init__(
        self,
        text_tower: TextTower,
        processor,
        weight: float = DEFAULT_WEIGHT,
        seen_penalty: float = 0.0,
        memory: CaptionMemory | None = None,
    ):
        self.text_tower = text_tower
        self.processor = processor
        self.weight = _check_number(weight, "The weight of re-ranking")
        self.seen_penalty = _check_number(seen_penalty, "The penalty on captions that were seen")
        if self.seen_penalty and not text_tower.seen_captions:
            raise ValueError(
                f"A penalty of {seen_penalty:g} on captions that the text tower has seen needs a list of them, which "
                "it does not have (`seen_captions`): leave `seen_penalty` out, or give the text tower the list."
            )
        self.memory = memory
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        model: GeneratesCaptions,
        processor,
        text_tower: str | os.PathLike | None = None,
        weight: float | None = None,
        **hub_kwargs: Any,
    ) -> "CaptionReranker":
        r"""
        Load the text tower of a captioner's CLIP.

        Args:
            model ([`ClipCapForConditionalGeneration`]): The captioner.
            processor ([`ClipCapProcessor`]): Its processor.
            text_tower (`str`, *optional*): The CLIP: a Hub id or folder of transformers (CLIP, SigLIP, SigLIP 2,
                MetaCLIP 2), an open_clip name, or the folder of a captioner that has a text tower. By default the one
                that is saved with the captioner, or else that of the CLIP that its configuration names (`donors`).
            weight (`float`, *optional*): Of the cosine; by default what the text tower's configuration recommends
                (`rerank_weight`), or else 10. The penalty on captions that were seen is that of the configuration, too
                (`rerank_seen_penalty`), and a memory that is saved with the text tower is used
                (`rerank_memory_weight`).
            hub_kwargs: `revision`, `token`, `cache_dir`, ... for a text tower on the Hub.

        Raises:
            ValueError: If there is no text tower, or it belongs to another CLIP than the captioner's vision tower.
        """
        if weight is not None:
            _check_number(weight, "The weight of re-ranking")
        tower = _find_text_tower(model, processor, text_tower, hub_kwargs)
        _check_same_space(model, tower)
        if weight is None:
            weight = getattr(tower.config, "rerank_weight", DEFAULT_WEIGHT)
        seen_penalty = getattr(tower.config, "rerank_seen_penalty", 0.0)
        return cls(tower.to(model.device), processor, weight, seen_penalty, tower.memory)

    def record(self) -> dict[str, Any]:
        """Say what the captions depend on: the text tower, by a hash of its weights, the settings and the memory."""
        weights = self.text_tower.model.state_dict().values()
        record: dict[str, Any] = {"text_tower_sha256": weights_hash(weights), "weight": self.weight}
        if self.seen_penalty:
            seen = "\0".join(sorted(self.text_tower.seen_captions))
            record |= {"seen_penalty": self.seen_penalty, "seen_sha256": sha256(seen.encode()).hexdigest()}
        if self.memory is not None:
            record["memory"] = self.memory.record()
        return record

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed texts: (texts, embed_dim), of L2 norm 1. Each distinct text is embedded once, all in one batch."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, F.normalize(self.text_tower(new).float(), dim=-1)))
        embeds = torch.stack([self._known[text] for text in texts])
        while len(self._known) > _KEPT_TEXTS:
            self._known.popitem(last=False)
        return embeds

    def cosines(self, image_embeds: torch.Tensor, captions: list[list[str]]) -> torch.Tensor:
        """Compare each image (images, embed_dim) with its captions, as many for each: (images, captions)."""
        texts = self.embed_texts([text for of_image in captions for text in of_image])
        texts = texts.unflatten(0, (len(captions), -1))
        return torch.einsum("id,icd->ic", F.normalize(image_embeds.to(texts), dim=-1), texts)

    def rate(self, image_embeds: torch.Tensor, captions: list[list[str]]) -> torch.Tensor:
        """Rate how well captions fit their images: `cosines`, less the penalty on those that were seen."""
        return self._less_penalty(self.cosines(image_embeds, captions), captions)

    @torch.no_grad()
    def generate(self, model: GeneratesCaptions, generation_config, kwargs: dict[str, Any]):
        """Do the work of `model.generate(..., rerank=self)`."""
        wanted = _check_search(model, generation_config, kwargs)
        image_embeds, kwargs = _embed_images(model, kwargs)
        outputs = _search_all_beams(model, generation_config, kwargs)
        if len(outputs.sequences) != len(image_embeds) * setting(model, "num_beams", generation_config, kwargs):
            raise ValueError("`rerank` needs exactly one image in each prompt.")
        captions = self._texts(outputs.sequences, len(image_embeds))
        similarities = None
        if self.memory is not None:
            similarities = self.memory.similarities(image_embeds)
            if may_recall(model, self.processor, generation_config, kwargs):
                recalled = self.memory.recall(similarities, captions)
                outputs = with_recalled(model, self.processor, outputs, recalled, kwargs)
                captions = [[*of_image, caption] for of_image, caption in zip(captions, recalled)]
        best = self._order(self.cosines(image_embeds, captions), captions, outputs.sequences_scores, similarities)
        best = best[:, :wanted]
        rows = (best + torch.arange(len(best), device=best.device).unsqueeze(1) * len(captions[0])).flatten()
        for name in ("sequences", "sequences_scores", "beam_indices"):
            if (value := outputs.get(name)) is not None:
                outputs[name] = value[rows.to(value.device)]
        wants_all = setting(model, "return_dict_in_generate", generation_config, kwargs)
        return outputs if wants_all else outputs.sequences

    def _texts(self, sequences: torch.Tensor, images: int) -> list[list[str]]:
        texts = [text.strip() for text in self.processor.batch_decode(sequences, skip_special_tokens=True)]
        each = len(texts) // images
        return [texts[start : start + each] for start in range(0, len(texts), each)]

    def _less_penalty(self, cosines: torch.Tensor, captions: list[list[str]]) -> torch.Tensor:
        seen = [[caption in self.text_tower.seen_captions for caption in of_image] for of_image in captions]
        return cosines - self.seen_penalty * torch.tensor(seen).to(cosines)

    def _order(
        self,
        cosines: torch.Tensor,
        captions: list[list[str]],
        scores: torch.Tensor,
        similarities: torch.Tensor | None,
    ) -> torch.Tensor:
        """Order the captions of each image, best first: (images, captions), positions."""
        scores = scores.to(cosines).view_as(cosines)
        ratings = scores + self.weight * self._less_penalty(cosines, captions)
        if self.memory is None or similarities is None:
            return ratings.argsort(dim=1, descending=True, stable=True)
        return self.memory.order(similarities, captions, scores, ratings, cosines)


def as_reranker(rerank: Any, model: GeneratesCaptions, processor) -> "CaptionReranker | None":
    """Turn what users pass as `rerank=` (`True`, the name of a CLIP, a [`CaptionReranker`]) into a re-ranker."""
    if rerank is None or rerank is False:
        return None
    if rerank is True or isinstance(rerank, (str, os.PathLike)):
        return CaptionReranker.from_pretrained(model, processor, None if rerank is True else rerank)
    return rerank


def _check_number(value: float, what: str) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be a number of at least 0, got {value!r}.")
    return float(value)


# -- which text tower


def _find_text_tower(
    model: GeneratesCaptions, processor, name: str | os.PathLike | None, hub_kwargs: dict
) -> TextTower:
    if name is not None:
        name = os.path.expanduser(os.fspath(name))
        if _saved_text_tower(name, None) is not None:
            return _load_saved(name, processor, hub_kwargs)
        return _load_named(name, hub_kwargs)
    revision = getattr(model.config, "_commit_hash", None)
    if _saved_text_tower(model.name_or_path, revision) is not None:
        return _load_saved(
            model.name_or_path, processor, {"revision": revision, **hub_kwargs} if revision else hub_kwargs
        )
    donor = (model.config.donors or {}).get("vision_tower")
    if donor is None or donor["name"].startswith(PACKAGE):
        raise ValueError(
            f"Re-ranking needs the text tower of the captioner's CLIP. None is saved with {_label(model)}, and its "
            "configuration does not say which CLIP its vision tower comes from: pass that CLIP's name "
            "(`text_tower=`, on the command line --text-tower)."
        )
    recorded = {key: donor[key] for key in ("revision", "subfolder") if donor.get(key) is not None}
    return _load_named(donor["name"], {**recorded, **hub_kwargs})


def _saved_text_tower(name: str | None, revision: str | None) -> str | None:
    """Find the configuration of the text tower in a captioner's folder or repository."""
    if not name:
        return None
    if os.path.isdir(name):
        path = Path(name) / TEXT_TOWER / "config.json"
        return str(path) if path.is_file() else None
    if not revision:
        return None
    return cached_file(
        name,
        "config.json",
        subfolder=TEXT_TOWER,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _load_saved(name: str, processor, hub_kwargs: dict) -> TextTower:
    """Load the text tower that is saved with a captioner; without a tokenizer of its own it shares the captioner's."""
    if os.path.isdir(name):
        folder = str(Path(name) / TEXT_TOWER)
        has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
        return load_text_tower(folder, tokenizer=None if has_tokenizer else processor.tokenizer)
    own = cached_file(
        name, "tokenizer_config.json", subfolder=TEXT_TOWER, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    return load_text_tower(
        name, tokenizer=None if own is not None else processor.tokenizer, subfolder=TEXT_TOWER, **hub_kwargs
    )


def _load_named(name: str, hub_kwargs: dict) -> TextTower:
    try:
        return load_text_tower(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not load a text tower to re-rank with from {name}: {error}") from error


def _label(model: GeneratesCaptions) -> str:
    return model.name_or_path or "this captioner"


def _check_same_space(model: GeneratesCaptions, tower: TextTower):
    """Refuse the text tower of another CLIP: its cosines with these images would mean nothing."""
    width = tower(["a"]).shape[-1]
    own = _embed_dim(model)
    if own is not None and width != own:
        raise ValueError(
            f"The text tower of {tower.name} gives embeddings of width {width}, but this captioner's image embeddings "
            f"have width {own}: pass the CLIP that its vision tower belongs to."
        )
    if tower.memory is not None and len(tower.memory.projection) != width:
        raise ValueError(
            f"The text tower of {tower.name} gives embeddings of width {width}, but the images beside it were "
            f"remembered by embeddings of width {len(tower.memory.projection)}: copy the folder again."
        )
    donor = (model.config.donors or {}).get("vision_tower") or {}
    is_donor = donor.get("name") == tower.name and model.config.freeze_vision
    if model.vision_tower is None or is_donor or not tower.has_vision_tower:
        return  # known to be the same, or there is nothing to compare
    other = load_vision_tower(tower.name, model.vision_tower.dtype).state_dict()
    own_weights = model.vision_tower.state_dict()
    if own_weights.keys() != other.keys() or not all(
        torch.equal(value.cpu(), other[key]) for key, value in own_weights.items()
    ):
        raise ValueError(
            f"The vision tower of {tower.name} has other weights than this captioner's, so that its text tower does "
            "not fit these image embeddings: pass the CLIP that the vision tower belongs to. (If it was only trained "
            "further, `CaptionReranker(load_text_tower(...), processor)` skips this comparison.)"
        )


def _embed_dim(model: GeneratesCaptions) -> int | None:
    """Width of the pooled image embedding, which texts are compared with; `None` if only the tower knows it."""
    if model.config.vision_feature == "pooled":
        return model.config.clip_embed_dim
    for name in ("projection_dim", "embed_dim", "hidden_size"):
        if (width := getattr(model.config.vision_config, name, None)) is not None:
            return width
    return None


# -- the search


def _check_search(model: GeneratesCaptions, generation_config, kwargs: dict[str, Any]) -> int:
    """Check that there will be several captions to choose from, and return how many are wanted."""

    def of(name: str) -> Any:
        return setting(model, name, generation_config, kwargs)

    if of("do_sample"):
        raise ValueError("`rerank` chooses among the captions of a beam search: leave `do_sample` out.")
    if (beams := of("num_beams") or 1) < 2:
        raise ValueError(
            f"`rerank` chooses among the captions of a beam search: pass `num_beams=`, for example {DEFAULT_BEAMS}."
        )
    if kwargs.get("assistant_model") is not None or kwargs.get("streamer") is not None:
        raise ValueError("`rerank` works with neither `assistant_model` nor `streamer`: leave it out.")
    if (wanted := of("num_return_sequences") or 1) > beams:
        raise ValueError(
            f"`num_return_sequences` is {wanted}, but {beams} beams give no more than {beams} captions: raise "
            "`num_beams`."
        )
    return wanted


def _embed_images(model: GeneratesCaptions, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Embed the images once, for the mapping network as well as for the comparison with texts."""
    kwargs = dict(kwargs)
    pixels, clip_embeds = kwargs.get("pixel_values"), kwargs.get("clip_embeds")
    if (pixels is None) == (clip_embeds is None):
        raise ValueError("`rerank` compares captions with the image: pass `pixel_values` or `clip_embeds`.")
    if model.config.vision_feature == "pooled":
        if clip_embeds is None:
            kwargs["clip_embeds"] = clip_embeds = model.get_clip_embeds(kwargs.pop("pixel_values"))
        return torch.as_tensor(clip_embeds), kwargs
    if pixels is None:
        raise ValueError(
            "`rerank` needs the pooled embedding of each image, but this captioner's `clip_embeds` are patches: pass "
            "`pixel_values`."
        )
    return embed_pixels(model.vision_tower, pixels, "pooled")[0], kwargs


def _search_all_beams(model: GeneratesCaptions, generation_config, kwargs: dict[str, Any]):
    kwargs = {**kwargs, "num_return_sequences": setting(model, "num_beams", generation_config, kwargs)}
    plain = not setting(model, "return_dict_in_generate", generation_config, kwargs)
    if plain and may_search_fast(model, generation_config, kwargs):
        try:
            return model.generate(generation_config=generation_config, **kwargs, custom_generate=scored_beam_search)
        except CannotSearchFast:  # the settings, once worked out, need transformers' own search
            pass
    outputs = model.generate(
        generation_config=generation_config, **{**kwargs, "return_dict_in_generate": True, "output_scores": True}
    )
    if getattr(outputs, "sequences_scores", None) is None:
        raise ValueError("`rerank` needs a search that gives `sequences_scores`: leave `custom_generate` out.")
    return outputs


__all__ = ["DEFAULT_BEAMS", "CaptionReranker", "as_reranker"]
