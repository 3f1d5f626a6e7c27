"""Own lists: stretches to the millisecond, lines that come twice, and labels that are numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.annotations import own
from pipelines.data.annotations.shared import Annotations
from pipelines.data.indexing.locating import Names, by_name
from pipelines.data.indexing.video_files import VideoFiles
from pipelines.errors import UserError

FILES = [f"v{i}.mp4" for i in range(9)]


def _csv(tmp_path: Path, *lines: str, columns: str = "video,label") -> Annotations:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([columns, *lines]) + "\n")
    return own.from_csv(str(path), FILES)


def _labelled(tmp_path: Path, *labels: str) -> Annotations:
    return _csv(tmp_path, *(f"v{i}.mp4,{label}" for i, label in enumerate(labels)))


# --- stretches ------------------------------------------------------------------------------------------------------


def test_ids_of_stretches_are_to_the_millisecond(tmp_path: Path) -> None:
    bounds = ["1234.567,1300", "1234.571,1300", "0,4", ",7.5", "4,", "123456.001,123456.002", "0.0004,1"]
    listed = _csv(tmp_path, *(f"v0.mp4,{line}" for line in bounds), columns="video,start_s,end_s")
    assert [video.video_id for video in listed.videos] == [
        "v0@1234.567-1300",
        "v0@1234.571-1300",
        "v0@0-4",
        "v0@0-7.5",
        "v0@4-",
        "v0@123456.001-123456.002",
        "v0@0-1",
    ]
    assert not any(video.reason for video in listed.videos)
    assert (listed.videos[0].start_s, listed.videos[1].start_s) == (1234.567, 1234.571)


def test_what_is_listed_again_is_one_reject_each(tmp_path: Path) -> None:
    lines = ["v0.mp4,x,,train,1,2", "v0.mp4,y,,val,1.0,2.0", "v1.mp4,x,,,,", "v1.mp4,x,,,,", "v0.mp4,x,3,,1,2"]
    listed = _csv(tmp_path, *lines, columns="video,label,target,split,start_s,end_s")
    assert [video.reason for video in listed.videos] == [
        "",
        "labels.csv line 3 lists it again with label 'y' rather than 'x' and split 'val' rather than 'train'; "
        "labels.csv line 2 counts",
        "",
        "labels.csv line 5 lists it again; labels.csv line 4 counts",
        "labels.csv line 6 lists it again with target 3.0 rather than None and split '' rather than 'train'; "
        "labels.csv line 2 counts",
    ]
    assert listed.classes == ["x", "y"]


def test_a_list_with_credentials_is_refused_without_showing_them(tmp_path: Path) -> None:
    for address in ("s3://key:hush@bucket/a.mp4", "https://host/a.mp4?sig=hush"):
        with pytest.raises(UserError, match=r"labels.csv line 2 has video '.*\*\*\*.*' with credentials") as raised:
            _csv(tmp_path, f"{address},x")
        assert "hush" not in str(raised.value)


# --- labels that are numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (["0", "2", "10"], [0, 2, 10]),
        (["0.0", "2.0", "10.0"], [0, 2, 10]),
        (["3", "1.0", "02", "0"], [3, 1, 2, 0]),
        (["1", "", "0"], [1, None, 0]),
        (["1200", "7"], [1200, 7]),
        (["29999"], [29999]),
    ],
)
def test_whole_numbers_are_the_labels(tmp_path: Path, labels: list[str], ids: list[int | None]) -> None:
    listed = _labelled(tmp_path, *labels)
    assert [video.label for video in listed.videos] == ids
    highest = max(label for label in ids if label is not None)
    assert listed.classes == [str(label) for label in range(highest + 1)]
    assert [video.class_name for video in listed.videos] == [None if label is None else str(label) for label in ids]


def test_many_classes_without_videos_are_told(tmp_path: Path) -> None:
    (warning,) = _labelled(tmp_path, "1990", "2020").warnings
    assert warning.startswith("labels are numbers up to 2020, so there are 2021 classes, and only 2 have videos")
    assert _labelled(tmp_path, "0", "1", "3").warnings == []


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["1", "99999"], "'1' becomes 0, '99999' becomes 1"),
        (["-1", "0", "1"], "'-1' becomes 0, '0' becomes 1, '1' becomes 2"),
        (["10", "2", "cat"], "'10' becomes 0, '2' becomes 1"),
        (["0.5", "1.5"], "'0.5' becomes 0, '1.5' becomes 1"),
        (["1e1", "2"], "'1e1' becomes 0, '2' becomes 1"),
    ],
)
def test_numbers_that_change_are_told(tmp_path: Path, labels: list[str], told: str) -> None:
    listed = _labelled(tmp_path, *labels)
    assert listed.classes == sorted(labels)
    (warning,) = listed.warnings
    count = told.count("becomes")
    assert (
        f"are renumbered ({told}; {count} in all): to keep numbers as labels, give whole numbers from 0 to 29,999 alone"
        in warning
    )


def test_names_are_sorted_without_a_word(tmp_path: Path) -> None:
    listed = _labelled(tmp_path, "b", "a", "9" * 400 + "x", "nan")
    assert listed.classes == sorted(["b", "a", "9" * 400 + "x", "nan"])
    assert listed.warnings == []


def test_what_other_programs_take_for_missing_is_a_label(tmp_path: Path) -> None:
    labels = ["nan", "NaN", "NULL", "None", "NA", "n/a", "x\0y", "inf"]
    listed = _labelled(tmp_path, *labels)
    assert [video.class_name for video in listed.videos] == labels
    assert listed.classes == sorted(labels)
    assert not any(video.reason for video in listed.videos)
    assert listed.warnings == []


@pytest.mark.parametrize("name", ["v1\0.mp4", "/v1\0.mp4", "~/\0", "file:///v1\0.mp4", "s3://bucket/\0.mp4"])
def test_a_name_with_a_nul_byte_is_one_reject(tmp_path: Path, name: str) -> None:
    (tmp_path / "labels.csv").write_text(f"video,label\n{name},x\nv0.mp4,y\n")
    names = Names(str(tmp_path), VideoFiles(videos=["v0.mp4"]))
    listed = own.from_csv(str(tmp_path / "labels.csv"), ["v0.mp4"], names.name_of)
    reasons = [video.reason for video in by_name(listed.videos, names)]
    assert reasons == ["labels.csv line 2 has a NUL byte in its name", ""]


def test_folders_whose_names_are_numbers_are_told_if_these_change() -> None:
    listed = own.from_folder(["0/a.mp4", "1/a.mp4", "2/a.mp4"])
    assert (listed.classes, listed.warnings) == (["0", "1", "2"], [])
    (warning,) = own.from_folder(["2/a.mp4", "10/a.mp4", "0/a.mp4"]).warnings
    assert warning.startswith("labels that are numbers are renumbered ('10' becomes 1; 1 in all)")
    assert "give --annotations with a column label" in warning


def test_faults_of_a_folder_are_rejects_of_their_class() -> None:
    listed = own.from_folder(["val/cook/a.mp4"], [("val/bake/b.mp4", "a link"), ("disk", "a link")])
    assert [(v.video_id, v.split, v.class_name, v.reason) for v in listed.videos] == [
        ("val/cook/a", "val", "cook", ""),
        ("val/bake/b.mp4", "val", "bake", "a link"),
        ("disk", "", None, "a link"),
    ]
    assert listed.classes == ["bake", "cook"]
