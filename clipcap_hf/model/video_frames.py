"""Frames of a video: a list of images, an array, an animation or a video file."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from transformers.video_utils import VideoMetadata, load_video

from .images_clipcap import fetch, raster_formats, shorten


def list_videos(videos, wanted: int = 0) -> list:
    r"""
    List the videos in a single video, a list or 5-D array of videos, or a list of videos per chat.

    Args:
        videos: Videos in any form of [`read_frames`].
        wanted (`int`): How many videos there should be, 0 if that is not known. It tells whether a list of paths in a
            list is one video, by its frames, or a chat's videos.
    """
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
    found = [one for video in videos for one in (video if _is_list_of_videos(video) else [video])]
    if len(found) < wanted:
        found = [one for video in found for one in (video if _is_list_of_paths(video) else [video])]
    return found


def _is_frame(item) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3)


def _is_list_of_videos(item) -> bool:
    """Tell whether this is a chat's list: several videos, or one in any form."""
    if not isinstance(item, (list, tuple)):
        return False
    if len(item) == 1 and not _is_frame(item[0]):
        return True
    return all(isinstance(one, (list, tuple)) or getattr(one, "ndim", 0) == 4 for one in item)


def _is_list_of_paths(item) -> bool:
    return isinstance(item, (list, tuple)) and all(isinstance(one, (str, Path)) for one in item)


def middle_frames(total: int, num_frames: int) -> list[int]:
    """List the middle frame of each of `num_frames` equal parts of a video. Shorter videos repeat frames."""
    return [int((index + 0.5) * total / num_frames) for index in range(num_frames)]


def read_frames(
    video,
    sample: Callable[[VideoMetadata], Sequence[int]],
    metadata: VideoMetadata | None = None,
    timeout: float | None = None,
) -> tuple[list, VideoMetadata]:
    r"""
    Read some frames of a video.

    Args:
        video (list of frames, array or path): A list of images (`PIL.Image.Image`, arrays or paths); an array of shape
            (frames, height, width, 3) or (frames, 3, height, width); or the path or http(s) URL of an animated GIF,
            WebP or PNG file, or of a video file for [`~transformers.video_utils.load_video`], which needs PyAV
            (`pip install av`).
        sample (`Callable`): Chooses the frames: from the video's metadata to increasing indices.
        metadata (`VideoMetadata`, *optional*): For lists and arrays, what `sample` should know besides their length.
        timeout (`float`, *optional*): Seconds for the whole download of a URL; 30 by default.

    Returns:
        `tuple[list, VideoMetadata]`: The frames, and the metadata with the chosen `frames_indices`.

    Raises:
        ValueError: If there are no frames, or the file cannot be read.
    """
    if isinstance(video, (str, Path)):
        return _read_named(video, sample, timeout)
    if len(video) == 0:
        raise ValueError("A video has no frames.")
    return _choose(video, VideoMetadata(**{**(metadata or {}), "total_num_frames": len(video)}), sample)


def _choose(frames, metadata: VideoMetadata, sample: Callable) -> tuple[list, VideoMetadata]:
    metadata.frames_indices = [int(index) for index in sample(metadata)]
    return [frames[index] for index in metadata.frames_indices], metadata


def _read_named(video: str | Path, sample: Callable, timeout: float | None) -> tuple[list, VideoMetadata]:
    shown = shorten(video)
    if str(video).lower().startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video"
            path.write_bytes(fetch(str(video), timeout))
            return _read_file(path, shown, sample)
    if not os.path.isfile(video):
        raise ValueError(f"{shown}: no such file")
    return _read_file(Path(video), shown, sample)


def _read_file(path: Path, shown: str, sample: Callable) -> tuple[list, VideoMetadata]:
    try:
        with Image.open(path, formats=raster_formats()) as image:
            pictures = [(frame.convert("RGBA"), frame.info.get("duration")) for frame in ImageSequence.Iterator(image)]
    except UnidentifiedImageError:
        return _read_film(path, shown, sample)
    except Exception as error:  # Pillow's decoders raise errors of any kind on damaged files
        raise ValueError(f"{shown}: not a readable animation ({shorten(error)})") from error
    frames, milliseconds = zip(*pictures)
    metadata = VideoMetadata(total_num_frames=len(frames))
    if all(milliseconds):
        metadata.duration = sum(milliseconds) / 1000
        metadata.fps = len(frames) / metadata.duration
    return _choose(frames, metadata, sample)


def _read_film(path: Path, shown: str, sample: Callable) -> tuple[list, VideoMetadata]:
    def choose(metadata: VideoMetadata, **kwargs) -> np.ndarray:
        if not metadata.total_num_frames:  # WebM and Matroska do not store it
            metadata.total_num_frames = _count_frames(path)
            metadata.duration = metadata.total_num_frames / metadata.fps if metadata.fps else None
        metadata.frames_indices = [int(index) for index in sample(metadata)]
        return np.array(metadata.frames_indices)

    try:
        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=choose)
    except ImportError as error:
        raise ImportError(f"{shown} is a video file, and reading it needs PyAV: `pip install av`.") from error
    except Exception as error:
        raise ValueError(f"{shown}: not a readable video ({shorten(error)})") from error
    # An index that was asked for several times is read once.
    return [frames[index] for index in middle_frames(len(frames), len(metadata.frames_indices))], metadata


def _count_frames(path: Path) -> int:
    try:  # without it, transformers would require PyAV of everyone who loads a captioner's code
        import av
    except ImportError:
        raise

    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))
