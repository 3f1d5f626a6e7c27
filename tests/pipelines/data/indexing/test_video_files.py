"""Every file below a folder is a video, a fault with its reason, or counted by its ending."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.data.indexing import video_files
from pipelines.data.indexing.video_files import HIDDEN, LINKED_AGAIN, NO_ENDING, VideoFiles, find


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def link(folder: Path, name: str, to: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(str(to))


def counted(found: VideoFiles) -> int:
    return len(found.videos) + len(found.faults) + found.others.total()


# --- links ----------------------------------------------------------------------------------------------------------


def test_links_that_lead_nowhere_are_faults(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    link(tmp_path, "gone.MP4", "/nowhere/x.mp4")
    link(tmp_path, "disk", "/nowhere/disk")
    link(tmp_path, "self.mkv", tmp_path / "self.mkv")
    link(tmp_path, "note.txt", "/nowhere/note.txt")
    link(tmp_path, ".lock", "/nowhere/lock")
    found = find(str(tmp_path))
    assert found.videos == ["a.mp4"]
    assert [name for name, _ in found.faults] == ["disk", "gone.MP4", "self.mkv"]
    reasons = dict(found.faults)
    assert reasons["gone.MP4"] == "a link to '/nowhere/x.mp4', which leads nowhere (No such file or directory)"
    assert "Too many levels of symbolic links" in reasons["self.mkv"]
    assert found.others == {".txt": 1, HIDDEN: 1}


def test_a_link_to_a_folder_above_ends_nothing_and_lists_nothing_twice(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", "b.mp4", "c/a.mp4")
    link(videos, "c/self", videos / "c")
    link(videos, "c/up", "..")
    link(videos, "top", tmp_path)
    touch(tmp_path, "beside.mp4")
    found = find(str(videos))
    # What lies outside is found by the link, what lies inside under its own name.
    assert found.videos == ["b.mp4", "c/a.mp4", "top/beside.mp4"]
    assert found.faults == []
    assert found.others == {LINKED_AGAIN: 3}
    # The same where the given folder is itself a link.
    link(tmp_path, "alias", videos)
    assert find(str(tmp_path / "alias")).videos == ["b.mp4", "c/a.mp4", "top/beside.mp4"]


def test_linked_folders_are_listed_once_under_their_own_names(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", "z/a.mp4")
    touch(tmp_path / "disk", "d.mp4", "deep/e.mp4")
    link(videos, "a", videos / "z")
    link(videos, "m", tmp_path / "disk")
    link(videos, "n", tmp_path / "disk")
    link(videos, "f.mp4", tmp_path / "disk/d.mp4")
    found = find(str(videos))
    assert found.videos == ["f.mp4", "m/d.mp4", "m/deep/e.mp4", "z/a.mp4"]
    assert found.others == {LINKED_AGAIN: 2}


def test_what_is_neither_a_file_nor_a_folder_is_a_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.mp4")
    link(tmp_path, "q.mp4", tmp_path / "p.mp4")
    link(tmp_path, "null", "/dev/null")
    os.mkfifo(tmp_path / "p.log")
    found = find(str(tmp_path))
    assert found.faults == [
        ("null", "a link to neither a file nor a folder"),
        ("p.mp4", "neither a file nor a folder"),
        ("q.mp4", "a link to neither a file nor a folder"),
    ]
    assert found.others == {".log": 1}


def test_a_folder_that_cannot_be_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def refused(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(video_files.os, "scandir", refused)
    found = find(str(tmp_path))
    assert found.videos == ["a.mp4"]
    assert found.faults == [("locked", "the folder cannot be read (Permission denied)")]


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_faults(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    touch(tmp_path, "Ünï.mp4", "日本/語.mkv")
    os.mkdir(folder + b"/d\xe9")
    for name in (b"caf\xe9.mp4", b"d\xe9/b.mp4", b"d\xe9/n.txt", b"x.\xe9"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"x")
    os.symlink(b"/nowhere/\xe9", folder + b"/l.mp4")
    found = find(str(tmp_path))
    assert found.videos == ["Ünï.mp4", "日本/語.mkv"]
    assert found.faults == [
        ("caf\\xe9.mp4", "its name, or that of its folder, is not UTF-8: rename it"),
        ("d\\xe9/b.mp4", "its name, or that of its folder, is not UTF-8: rename it"),
        ("l.mp4", "a link to '/nowhere/\\\\xe9', which leads nowhere (No such file or directory)"),
    ]
    assert found.others == {".txt": 1, ".\\xe9": 1}
    str(found).encode()


def test_endings_of_cameras_recorders_and_editors_are_videos_in_any_case(tmp_path: Path) -> None:
    names = [
        f"v.{ending}" for ending in ("MTS", "m2ts", "vob", "asf", "mxf", "Mp4", "DIVX", "rmvb", "dv", "3g2", "y4m")
    ]
    found = find(str(touch(tmp_path, *names)))
    assert found.videos == sorted(names)


def test_spaces_around_a_name_belong_to_it(tmp_path: Path) -> None:
    found = find(str(touch(tmp_path, " a.mp4", "b.mp4 ", " c /d.mp4", "e.txt ")))
    assert (found.videos, found.faults, found.others) == ([" a.mp4", " c /d.mp4", "b.mp4 "], [], {".txt ": 1})


def test_nothing_is_lost_and_other_endings_are_named(tmp_path: Path) -> None:
    names = ["a.mp4", "a.txt", "b.TXT", "c.json", "README", "x.mp4.part", "y.webm.crdownload", "z.txt.part"]
    names += [".a.mp4.swp", ".git/config", "sub/.b/c.mp4", "._a.mp4", "v1.2 final cut of it all"]
    names += [f"x.mp4.part-Frag{i}" for i in range(3)]
    found = find(str(touch(tmp_path, *names)))
    assert found.videos == ["a.mp4"]
    assert found.faults == [
        ("x.mp4.part", "a download that is not complete (.part)"),
        ("y.webm.crdownload", "a download that is not complete (.crdownload)"),
    ]
    assert found.others == Counter({HIDDEN: 4, ".part": 4, ".txt": 2, ".json": 1, NO_ENDING: 2})
    assert counted(found) == len(names)
    assert found.described() == "13 other files (4 .part, 4 hidden, 2 .txt, 2 no ending, 1 .json)"
    assert VideoFiles().described() == "0 other files"
    many = VideoFiles(others=Counter({f".{i}": 9 - i for i in range(9)}))
    assert many.described() == "45 other files (9 .0, 8 .1, 7 .2, 6 .3, 5 .4, 4 .5, 6 with others)"


# --- object stores --------------------------------------------------------------------------------------------------


def test_a_bucket_is_listed_with_sizes_and_times(bucket: str) -> None:
    for name in ("a/b.mp4", "c.MTS", "n.txt", "d.mp4.part", ".hidden/x.mp4"):
        storage.write_bytes(f"{bucket}/videos/{name}", b"x" * len(name))
    found = find(f"{bucket}/videos/")
    assert found.videos == ["a/b.mp4", "c.MTS"]
    assert found.faults == [("d.mp4.part", "a download that is not complete (.part)")]
    assert found.others == {".txt": 1, HIDDEN: 1}
    assert [found.stamps[name][0] for name in found.videos] == [7, 5]
    assert all(found.stamps[name][1] > 0 for name in found.videos)


def test_parts_in_a_bucket_are_listed_and_removed(bucket: str) -> None:
    folder = f"{bucket}/out/probed"
    assert storage.files_below(folder) == []
    storage.remove_folder(folder)
    for name in ("b", "a"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    storage.write_bytes(f"{bucket}/out/run.json", b"{}")
    assert storage.files_below(folder) == [f"{folder}/a", f"{folder}/b"]
    storage.remove_folder(folder)
    assert storage.files_below(folder) == []
    assert storage.files_below(f"{bucket}/out") == [f"{bucket}/out/run.json"]
