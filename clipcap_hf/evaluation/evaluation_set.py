"""Images and their reference captions; an image is read only when it is indexed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..files import listed
from ..model.images_clipcap import stored_images
from .digests import image_digest


@dataclass
class EvaluationSet:
    """Images and their reference captions, in order.

    Attributes:
        ids (`list[int | str]`): The image ids.
        references (`list[list[str]]`): The reference captions of each image.
        domains (`list[str]`, *optional*): The domain of each image.
        images (`Sequence`, *optional*): Paths or PIL images, which are read when indexed; `None` if there are only
            captions.
        source (`str`): Where the data comes from, for the record.
        title (`str`): Name on the page, if the images belong to no benchmark.
    """

    ids: list[int | str]
    references: list[list[str]]
    domains: list[str] | None = None
    images: Sequence[Any] | None = None
    source: str = ""
    title: str = ""

    def __post_init__(self):
        if repeated := repeated_ids(self.ids):
            raise ValueError(f"{self.source}: duplicate images: {listed(repeated)}.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Sequence[int]) -> "EvaluationSet":
        """Select the images at these positions."""

        def pick(values):
            return None if values is None else [values[position] for position in positions]

        images = self.images
        if images is not None:
            images = images.select(positions) if hasattr(images, "select") else Subset(images, positions)
        return EvaluationSet(
            pick(self.ids), pick(self.references), pick(self.domains), images, self.source, self.title
        )

    @cached_property
    def stored_images(self) -> Sequence[Any] | None:
        """Return the images not yet decoded: paths, or rows of path and bytes, for data sets of `datasets`."""
        if isinstance(self.images, Subset):
            return Subset(stored_images(self.images.items), self.images.positions)
        return stored_images(self.images)

    @cached_property
    def image_digests(self) -> list[str]:
        """SHA-256 of each image, of the files' bytes where there are files."""
        images: Any = self.stored_images
        return [image_digest(images[place]) for place in range(len(self))]


@dataclass
class Subset(Sequence):
    """Some items of a sequence, each fetched when it is indexed."""

    items: Sequence
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.items[position] for position in self.positions[index]]
        return self.items[self.positions[index]]


def repeated_ids(ids: Sequence) -> list:
    """Return the ids that occur more than once; `42` and `"42"` count as the same id."""
    seen, repeated = set(), []
    for image in ids:
        if str(image) in seen:
            repeated.append(image)
        seen.add(str(image))
    return repeated
