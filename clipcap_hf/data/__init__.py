"""Data sets: readers of captioned images, CLIP embeddings, and the data set that ships with the package."""

from .embed import embed
from .embeddings import check_embeddings, embeddings_provenance, load_embeddings
from .emoji import load_emoji
from .readers import READERS, load_captions
from .schema import caption_features, to_caption_form, warn_of_overlap


__all__ = [
    "READERS",
    "caption_features",
    "check_embeddings",
    "embed",
    "embeddings_provenance",
    "load_captions",
    "load_embeddings",
    "load_emoji",
    "to_caption_form",
    "warn_of_overlap",
]
