"""Convert files of the official ClipCap code to the formats of this package."""

from .checkpoint import convert_official_checkpoint
from .embeddings import convert_official_embeddings


__all__ = ["convert_official_checkpoint", "convert_official_embeddings"]
