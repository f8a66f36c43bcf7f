"""Data sets that ship with the package."""

from .emoji import load_emoji


__all__ = ["load_emoji"]
