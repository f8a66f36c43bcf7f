"""Tell drawings from photographs by their background."""

import numpy as np
from PIL import Image


# Chosen on the embedded emoji and on the validation photographs of Flickr8k; the captioning guide says how often
# each is taken for the other.
_SIDE = 64
_TOLERANCE = 4  # of 255
_EVEN_SHARE = 0.6
#: What each embedded captioner knows.
KINDS = {"emoji-mini": "drawing", "photo-mini": "photograph"}


def looks_drawn(image: Image.Image) -> bool:
    """
    Tell whether an image is probably a drawing: most of its border has one colour.

    Photographs of a thing on a plain background count as drawings, drawings that fill the image as photographs.

    Args:
        image (`PIL.Image.Image`): An RGB image, as [`~clipcap_hf.model.images_clipcap.load_image`] returns it.

    Example:

    ```python
    >>> from PIL import Image
    >>> from clipcap_hf.drawings import looks_drawn

    >>> looks_drawn(Image.new("RGB", (64, 64), "white")), looks_drawn(Image.effect_noise((64, 64), 50).convert("RGB"))
    (True, False)

    ```
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2)  # large images take a shortcut
    pixels = np.asarray(small, dtype=np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    even = np.abs(border - np.median(border, axis=0)).max(axis=1) <= _TOLERANCE
    return bool(even.mean() > _EVEN_SHARE)


def other_kind(knows: str | None, drawn: bool | None) -> str | None:
    """Return what an image looks like, `"drawing"` or `"photograph"`, if that is not what its captioner knows.

    Args:
        knows (`str`, *optional*): What the captioner knows; None if it may know both.
        drawn (`bool`, *optional*): Whether the image looks like a drawing, see [`looks_drawn`].
    """
    looks_like = {True: "drawing", False: "photograph", None: None}[drawn]
    return looks_like if knows not in (None, looks_like) else None
