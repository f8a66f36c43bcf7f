"""Data and models that are shipped with the package."""

from pathlib import Path


ASSETS = Path(__file__).parent
#: Folder of the data set of emoji drawings, see [`clipcap_hf.data.load_emoji`].
EMOJI = ASSETS / "emoji"
#: Folder of the embedded captioner of emoji: `pipeline("image-captioning", model=clipcap_hf.EMOJI_MINI)`.
EMOJI_MINI = str(ASSETS / "emoji-mini")
#: Folder of the embedded captioner of photographs, which is what `clipcap caption` uses by default.
PHOTO_MINI = str(ASSETS / "photo-mini")
#: A font with the glyphs of the embedded captions, Japanese ones included.
FONT = ASSETS / "font" / "mplus1-subset.otf"


def resolve(name: str) -> str:
    """Return the folder of an embedded captioner for its short name, and any other name unchanged.

    ```python
    >>> from clipcap_hf.assets import EMOJI_MINI, resolve
    >>> resolve("emoji-mini") == EMOJI_MINI
    True
    >>> resolve("me/my-captioner")
    'me/my-captioner'

    ```
    """
    return {"emoji-mini": EMOJI_MINI, "photo-mini": PHOTO_MINI}.get(name, name)
