"""Evenly spaced frames of a video: a list of images, an array, an animation or a video file."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from .images_clipcap import raster_formats, shorten


def list_videos(videos) -> list:
    """List the videos in a single video, a list or 5-D array of videos, or a list of videos per chat."""
    if isinstance(videos, (str, Path)):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim not in (4, 5):
            raise ValueError(
                "A video is an array (frames, height, width, 3), several are 5-D; got the shape "
                f"{tuple(videos.shape)}."
            )
        return [videos] if videos.ndim == 4 else list(videos)
    videos = list(videos)
    if videos and _is_frame(videos[0]):
        return [videos]
    return [video[0] if _is_list_of_one_video(video) else video for video in videos]


def _is_frame(item) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3)


def _is_list_of_one_video(item) -> bool:
    """Tell whether this is a chat's list with a single video."""
    return isinstance(item, (list, tuple)) and len(item) == 1 and not _is_frame(item[0])


def read_frames(video, num_frames: int) -> list:
    r"""
    Read the middle frame of each of `num_frames` equal parts of a video. Shorter videos repeat frames.

    Args:
        video (list of frames, array or path): A list of images (`PIL.Image.Image`, arrays or paths); an array of shape
            (frames, height, width, 3) or (frames, 3, height, width); an animated GIF, WebP or PNG file; or a video
            file for [`~transformers.video_utils.load_video`], which needs PyAV (`pip install av`).
        num_frames (`int`): Number of frames.

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
    shown = shorten(path)
    if not os.path.isfile(path):
        raise ValueError(f"{shown}: no such file")
    try:
        with Image.open(path, formats=raster_formats()) as image:
            return [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    except UnidentifiedImageError:
        pass  # not an animation, so it must be a video
    except Exception as error:  # Pillow's decoders raise errors of any kind on damaged files
        raise ValueError(f"{shown}: not a readable animation ({shorten(error)})") from error
    from transformers.video_utils import load_video

    def sample(metadata, **kwargs) -> np.ndarray:
        return np.array(_spread(metadata.total_num_frames, num_frames))

    try:
        return load_video(str(path), backend="pyav", sample_indices_fn=sample)[0]
    except ImportError as error:
        raise ImportError(f"{shown} is a video file, and reading it needs PyAV: `pip install av`.") from error
    except Exception as error:
        raise ValueError(f"{shown}: not a readable video ({shorten(error)})") from error
