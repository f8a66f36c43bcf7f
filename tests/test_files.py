"""Files: folders that are links, links that lead in circles, locks, and errors that name what was written."""

import errno
import os
import subprocess
import sys

import pytest
from clipcap_hf.data import load_captions
from clipcap_hf.files import files_below, find_images, lock_file, lock_folder, whole_file


def names(folder) -> list[str]:
    errors: list[str] = []
    found = [os.path.relpath(path, folder) for path in files_below(folder, errors)]
    assert not errors
    return found


def test_linked_folders_count_once_for_each_way_to_them(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "a").touch()
    (tmp_path / "top").mkdir()
    for link in ("first", "second"):
        (tmp_path / "top" / link).symlink_to(tmp_path / "real", target_is_directory=True)
    assert names(tmp_path / "top") == ["first/deep/a", "second/deep/a"]
    (tmp_path / "link").symlink_to(tmp_path / "top", target_is_directory=True)
    assert names(tmp_path / "link") == ["first/deep/a", "second/deep/a"]


def test_circles_end(tmp_path):
    for name, target in (("a/b", "b"), ("b/a", "a"), ("a/self", "a"), ("a/up", "."), ("b/root", "/")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        (tmp_path / target).mkdir(exist_ok=True)
        path.symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "a" / "1").touch()
    (tmp_path / "b" / "2").touch()
    assert names(tmp_path / "a") == ["1", "b/2"]


def test_links_to_nothing_are_files_that_cannot_be_read(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert names(tmp_path) == ["gone.png"]


def test_pipes_in_a_folder_are_files_that_cannot_be_read(tmp_path, processor):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    assert find_images([tmp_path])[0] == [str(tmp_path / "pipe.png")]
    with pytest.raises(ValueError, match="not a regular file"):
        processor(images=[str(tmp_path / "pipe.png")])
    with pytest.raises(ValueError, match="metadata.jsonl is not a file, but a pipe"):
        load_captions("imagefolder", tmp_path)


def test_folders_that_take_no_files_are_not_taken_for_locked():
    with pytest.raises(OSError, match="/proc"), lock_file("/proc/captions.csv"):
        pass


def test_a_lock_leaves_nothing(tmp_path):
    with lock_folder(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert os.listdir(tmp_path / "used") == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")])
def test_what_could_not_be_written_is_named(tmp_path, error):
    with pytest.raises(OSError, match="scores.json") as caught, whole_file(tmp_path / "scores.json"):
        raise error
    assert caught.value.errno == error.errno and not os.listdir(tmp_path)


def test_a_full_disk_is_said_with_the_name_of_what_was_written(tmp_path, model_folder):
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from clipcap_hf import ClipCapForConditionalGeneration\n"
        "from clipcap_hf.files import whole_folder\n"
        f"model = ClipCapForConditionalGeneration.from_pretrained({str(model_folder)!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "for write in (model.save_pretrained, lambda out: (Path(out) / 'b').write_bytes(bytes(50_000))):\n"
        "    try:\n"
        f"        with whole_folder({str(tmp_path / 'out')!r}) as folder: write(folder)\n"
        "    except OSError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    weights, other = printed.splitlines()
    assert f"The weights could not be written to {tmp_path}" in weights and "File too large" in weights
    assert f"File too large: '{tmp_path / 'out'}'" in other
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
