"""Load the emoji captioning data set that ships with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "new_design", "new_caption")
LANGUAGES = ("en", "ja")


def load_emoji(split: str | None = None, language: str = "en") -> Dataset | DatasetDict:
    """Load pictures of emoji with their names.

    The files are part of the package: nothing is downloaded.

    Parameters
    ----------
    split : str, optional
        One of

        - ``"train"``: 11,080 rows in five designs.
        - ``"validation"``: 190 rows with captions that are new combinations of words from ``"train"``.
        - ``"new_design"``: 1,637 rows with captions of ``"train"`` in a design that is not in ``"train"``.
        - ``"new_caption"``: 904 rows like ``"validation"``, for the final test.

        By default, all splits are loaded.
    language : str, default="en"
        Language of the captions and keywords, ``"en"`` or ``"ja"``.

    Returns
    -------
    datasets.Dataset or datasets.DatasetDict
        The split, or all splits by name, with the columns

        - ``image``: 128x128 pixels, RGB, on white.
        - ``captions``: list of names, the one of the Unicode CLDR first. Japanese has only that one.
        - ``keywords``: list of CLDR keywords.
        - ``name``: the English CLDR name, in either language.
        - ``emoji``: the characters.
        - ``design``: ``"noto"``, ``"noto-v1"``, ``"fxemoji"``, ``"fluent-flat"``, ``"fluent-3d"`` or ``"twemoji"``.
        - ``split``: the name of the split.

    Raises
    ------
    ValueError
        If `split` or `language` is not one of the values above.

    Examples
    --------
    >>> from clipcap_hf.data import load_emoji
    >>> emoji = load_emoji("validation")
    >>> emoji[0]["image"].size
    (128, 128)
    >>> sorted(load_emoji(language="ja"))
    ['new_caption', 'new_design', 'train', 'validation']
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))} or None, but is {split!r}.")
    if language not in LANGUAGES:
        raise ValueError(f"`language` must be one of {', '.join(map(repr, LANGUAGES))}, but is {language!r}.")

    # Importing `datasets` is slow, and most of the package does not need it.
    from datasets import DatasetDict

    if split is None:
        return DatasetDict({name: _load_split(name, language) for name in SPLITS})
    return _load_split(split, language)


def _load_split(split: str, language: str) -> Dataset:
    import pyarrow.parquet as pq
    from datasets import Dataset, NamedSplit

    # Reading into memory (20 MB at most) leaves no copy in the cache folder, which may be read-only or out of date.
    with (files("clipcap_hf") / "assets" / "emoji" / f"{split}.parquet").open("rb") as file:
        dataset = Dataset(pq.read_table(file), split=NamedSplit(split))
    if language == "en":
        return dataset.remove_columns(["captions_ja", "keywords_ja"])
    dataset = dataset.remove_columns(["captions", "keywords"])
    return dataset.rename_columns({"captions_ja": "captions", "keywords_ja": "keywords"})
