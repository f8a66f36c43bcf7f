"""Finding files: folders that are links, and links that lead in circles."""

import os

from clipcap_hf.files import files_below


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
