"""The image column of data sets: as that of `datasets`, but it opens raster formats only."""

import io
from typing import Any

from datasets import Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..model.images_clipcap import raster_formats, shorten
from .remote import with_bytes


class RasterImage(Image):
    """
    An [`~datasets.Image`] column that refuses what is no raster image, whatever its name.

    `datasets` opens images with every format of Pillow, which passes PostScript to the program `gs`. Rows are decoded
    to the same `PIL.Image.Image` as before. Saved data sets say `Image`, so that they load without this package.

    Args:
        mode (`str`, *optional*): The mode to convert to, such as `"RGB"`.
        decode (`bool`): Whether rows hold images, or dictionaries with paths and bytes.
    """

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> PILImage.Image:
        """
        Decode an image.

        Args:
            value (`dict`): The `path` or the `bytes` of the image.
            token_per_repo_id (`dict`, *optional*): As in [`~datasets.Image`].

        Raises:
            PIL.UnidentifiedImageError: If it is in no raster format.
        """
        if not isinstance(value, dict) or (value["bytes"] is None and value["path"] is None):
            return super().decode_example(value, token_per_repo_id)
        value = with_bytes(value, ("zip", "hf", "http", "https"))  # what is checked is what is decoded
        content = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
        try:
            PILImage.open(content, formats=raster_formats()).close()
        except UnidentifiedImageError as error:
            name = shorten(value["path"] or "the bytes")
            raise UnidentifiedImageError(f"{name}: not a readable image (no supported image format)") from error
        return super().decode_example(value, token_per_repo_id)

    def __eq__(self, other: object) -> bool:
        # Equal to the plain feature, so that data sets of both kinds can be joined.
        return isinstance(other, Image) and (self.mode, self.decode) == (other.mode, other.decode)

    __hash__ = None  # type: ignore[assignment]  # as in `datasets`
