"""Damaged files: errors that name them, and settings that would silently give wrong pixels."""

import json
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from .images_clipcap import shorten


_DAMAGE = (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, pickle.UnpicklingError, zipfile.BadZipFile)

_LARGEST_SIDE = 2**13  # pixels


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn the errors of damaged files, which name no file, into a `ValueError` that says what was read.

    Args:
        what (`str`): For example `"The weights in FOLDER"`.
    """
    try:
        yield
    except _DAMAGE as error:
        # Without an unpickler's text, which may advise to run what is in the file.
        reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else shorten(error)
        raise ValueError(f"{what} are incomplete or damaged ({reason}): copy or download them again.") from error
    except Exception as error:
        if type(error) is Exception:  # all that `tokenizers` raises
            raise ValueError(f"{what} are incomplete or damaged ({shorten(error)}): copy them again.") from error
        # How transformers refers to a report of other sizes, which it has printed.
        if not isinstance(error, RuntimeError) or "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{what} have other shapes than config.json says: copy or download both again.") from error


@contextmanager
def named(name: str | os.PathLike | None) -> Iterator[None]:
    """Name the file or folder (None: there is none) in each error about the values that it holds."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        text = str(error)
        if any(unknown in text for unknown in ("does not recognize this arch", "Unrecognized model type")):
            release = f"transformers {transformers.__version__}"
            raise ValueError(
                f"config.json of {name} has a `model_type` that {release} does not know: it is damaged, or for a "
                "newer release."
            ) from error
        if name is None or str(name) in text:
            raise
        raise ValueError(f"{name}: {text}") from error
    except KeyError as error:  # of tables of what transformers knows, such as activations
        raise ValueError(f"{name or 'The model'}: {error} is missing in its files, or is unknown there.") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        of_the_caller = any(text in str(error) for text in ("unexpected keyword", "meta device context"))
        if name is None or of_the_caller or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name}: a value in its files has the wrong type or size ({type(error).__name__}: {shorten(error)})."
        ) from error


def load_config(name: str, **kwargs) -> PreTrainedConfig:
    """Load a configuration as `AutoConfig` does; errors have its name, and that of an unknown type is short."""
    with named(name):
        return AutoConfig.from_pretrained(name, **kwargs)


def check_archive(path: str | os.PathLike):
    """Refuse a `.pt` file whose records are damaged, or larger than the file. Legacy files have no check sums.

    torch itself ignores check sums, and takes memory for the sizes that the file names.

    Raises:
        ValueError: If a record is damaged; the message names the file.
    """
    with open(path, "rb") as file:
        legacy = file.read(2) != b"PK"
    try:
        if legacy:
            return _check_storage_sizes(path)
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > os.path.getsize(path):  # torch stores uncompressed
                raise zipfile.BadZipFile("its records are larger than the file")
            for record in records:
                if not record.CRC:  # `torch.serialization.set_crc32_options(False)`
                    continue
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass
    except Exception as error:  # a damaged directory of records can raise almost anything
        raise ValueError(f"{path} is damaged or cut short ({shorten(error)}): download it again.") from error


def _check_storage_sizes(path: str | os.PathLike):
    """Read the instructions of a legacy `.pt` file, without following them: it has no larger storage than itself."""
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            return  # not a pickle; who reads it will say so
        file.seek(0)
        for _ in range(4):  # magic number, version, machine, weights
            number = 0
            for instruction, argument, _ in pickletools.genops(file):
                if isinstance(argument, int) and instruction.name.startswith(("BININT", "INT", "LONG")):
                    number = argument
                elif instruction.name == "BINPERSID" and number > os.path.getsize(path):
                    raise ValueError("it names a storage that is larger than the file")


def is_expanded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor repeats a smaller storage: a few bytes of a file could then ask for all memory."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def check_transform(image_processor: Any):
    """Refuse a transform that would silently make infinite, NaN or equal pixels of every image.

    Raises:
        ValueError: If `image_std` is not above 0, if `rescale_factor` is 0, if one of them or `image_mean` is missing
            or not finite, or if the images would be larger than any tower takes.
    """
    for name in ("size", "crop_size"):
        sizes = getattr(image_processor, name, None) or {}
        for side in ("height", "width", "shortest_edge"):
            value = sizes.get(side) if hasattr(sizes, "get") else getattr(sizes, side, None)
            if value is not None and not (is_finite_number(value) and value in range(1, _LARGEST_SIDE + 1)):
                raise ValueError(
                    f"`{name}` in the image processor must be 1 to {_LARGEST_SIDE} pixels, got {str(value)[:80]}."
                )
    sizes = getattr(image_processor, "crop_size", None) or {}
    sides = [sizes.get(side) if hasattr(sizes, "get") else getattr(sizes, side, None) for side in ("height", "width")]
    if getattr(image_processor, "do_center_crop", False) and None in sides:
        raise ValueError("`crop_size` in the image processor needs a `height` and a `width`.")
    for name, used, kind, allowed in (
        ("image_mean", "do_normalize", "finite numbers", lambda number: True),
        ("image_std", "do_normalize", "positive numbers", lambda number: number > 0),
        ("rescale_factor", "do_rescale", "a number other than 0", lambda number: number != 0),
    ):
        value, is_used = getattr(image_processor, name, None), getattr(image_processor, used, None)
        if value is None and is_used is True:
            raise ValueError(f"`{used}` in the image processor needs `{name}`: {kind}.")
        if value is None or is_used is False:
            continue
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if len(numbers) not in (1, 3):
            raise ValueError(
                f"`{name}` in the image processor must be 3 numbers, for red, green and blue: got {value}."
            )
        if not all(is_finite_number(number) and allowed(number) for number in numbers):
            raise ValueError(f"`{name}` must be {kind} in the image processor, got {str(value)[:80]}.")


def try_transform(image_processor: Any):
    """Transform one image, so that settings of any kind that fail do so at loading, and not at each image of a user.

    Raises:
        ValueError: If it fails.
    """
    check_transform(image_processor)
    try:
        image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")
    except ImportError:  # of torchvision, which those need who have images
        pass
    except Exception as error:  # of any kind: settings are checked by using them
        raise ValueError(
            f"the settings of the image processor fail on every image ({type(error).__name__}: {shorten(error)})."
        ) from error


def is_finite_number(value: Any) -> bool:
    """Tell whether a value of a JSON file is a number, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


__all__ = [
    "check_archive",
    "check_transform",
    "is_expanded",
    "is_finite_number",
    "load_config",
    "named",
    "naming",
    "try_transform",
]
