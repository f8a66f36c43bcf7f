"""Videos as frames: evenly spread ones, of whatever a video is given as."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError


def list_videos(videos) -> list:
    """The videos that are meant: one, as [`read_frames`] takes it, or a list (or 5-D array) of them."""
    if isinstance(videos, (str, Path)):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim not in (4, 5):
            raise ValueError(
                f"A video is an array (frames, height, width, 3), several are 5-D; got the shape {tuple(videos.shape)}."
            )
        return [videos] if videos.ndim == 4 else list(videos)
    videos = list(videos)
    if videos and _is_frame(videos[0]):
        return [videos]
    return videos


def _is_frame(item) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3)


def read_frames(video, num_frames: int) -> list:
    r"""
    Frames of a video, evenly spread: the middle ones of `num_frames` equal parts. Shorter videos repeat frames.

    Args:
        video (list of frames, array or path): A list of images (`PIL.Image.Image`, arrays or paths); an array of shape
            (frames, height, width, 3) or (frames, 3, height, width); an animated GIF, WebP or PNG file; or a video file
            that [`~transformers.video_utils.load_video`] reads, for which PyAV (`pip install av`) must be installed.
        num_frames (`int`): How many.

    Raises:
        ValueError: If there are no frames, or the file cannot be read.
    """
    if isinstance(video, (str, Path)):
        video = _read_file(Path(video), num_frames)
    if len(video) == 0:
        raise ValueError("A video has no frames.")
    return [video[index] for index in _spread(len(video), num_frames)]


def _spread(total: int, num_frames: int) -> list[int]:
    return [int((index + 0.5) * total / num_frames) for index in range(num_frames)]


def _read_file(path: Path, num_frames: int) -> list | np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    except UnidentifiedImageError:
        pass  # no animation that Pillow knows, so a video
    except Exception as error:  # Pillow's decoders raise whatever they stumble over in a damaged file
        raise ValueError(f"{path}: not a readable animation ({error})") from error
    from transformers.video_utils import load_video

    def sample(metadata, **kwargs) -> np.ndarray:
        return np.array(_spread(metadata.total_num_frames, num_frames))

    try:
        return load_video(str(path), backend="pyav", sample_indices_fn=sample)[0]
    except ImportError as error:
        raise ImportError(f"{path} is a video file, and reading it needs PyAV: `pip install av`.") from error
    except Exception as error:
        raise ValueError(f"{path}: not a readable video ({error})") from error
