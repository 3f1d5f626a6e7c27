"""The benchmarks' annotation files, in their own formats: labels, splits, and what is said of damaged ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.annotations import breakfast, coin, kinetics, lvu
from pipelines.data.annotations.shared import AnnotatedVideo, Annotations
from pipelines.errors import UserError

GENRE = "class_id class_name youtube_id imdb_id\n"
VIEWS = "view_count youtube_id imdb_id\n"
LIKES = "like_count dislike_count youtube_id imdb_id\n"
DISHES = "file_name,duration,action,class_id\n"
CLIPS = "label,youtube_id,time_start,time_end,split\n"


def _files(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return str(folder)


def _lvu(tmp_path: Path, task: str, train: str, val: str, test: str) -> str:
    return _files(tmp_path / "lvu_1.0" / task, {"train": train, "val": val, "test": test})


def _views(tmp_path: Path, **texts: str) -> str:
    files = {"train": VIEWS + "531 a-1 tt1\n", "val": VIEWS + "9 b tt2\n", "test": VIEWS + "7 c tt3\n"}
    return _lvu(tmp_path, "view_count", **(files | texts))


def _by_id(annotations: Annotations) -> dict[str, AnnotatedVideo]:
    return {video.video_id: video for video in annotations.videos}


# --- LVU ------------------------------------------------------------------------------------------------------------


def test_lvu_classes_keep_their_ids_and_the_head_its_size(tmp_path: Path) -> None:
    train = GENRE + "0 nm1 -wX6_qCCnPc tt1\n9 nm 9 --hendERqm0 tt2\n"
    given = _lvu(tmp_path, "director", train, GENRE + "0 nm1 b tt1\n", GENRE + "4 \\N c tt1\n\n")
    annotations = lvu.read(given)
    assert annotations.classes == ["nm1", "1", "2", "3", "\\N", "5", "6", "7", "8", "nm 9"]
    assert (annotations.dataset, annotations.task, annotations.protocol) == ("lvu", "director", "windows")
    videos = _by_id(annotations)
    assert [(video.split, video.label) for video in videos.values()] == [
        ("train", 0),
        ("train", 9),
        ("val", 0),
        ("test", 4),
    ]
    assert videos["--hendERqm0"].class_name == "nm 9"
    assert videos["--hendERqm0"].location == "train.csv line 3"
    assert lvu.read(f"{given}/") == annotations


@pytest.mark.parametrize("task", lvu.CLASSES)
def test_lvu_heads_have_the_sizes_of_the_benchmark(tmp_path: Path, task: str) -> None:
    sizes = {"relationship": 4, "way_speaking": 5, "scene": 6, "director": 10, "genre": 4, "writer": 10, "year": 9}
    annotations = lvu.read(_lvu(tmp_path, task, *(f"{GENRE}0 x {split} tt\n" for split in "abc")))
    assert len(annotations.classes) == sizes[task]


def test_lvu_targets_are_centred_logarithms_and_ratios(tmp_path: Path) -> None:
    views = _by_id(lvu.read(_views(tmp_path)))
    assert views["a-1"].target == pytest.approx(math.log(531) - 11.76425435683139)
    assert views["a-1"].label is None
    likes = lvu.read(_lvu(tmp_path, "like_ratio", LIKES + "3 1 a t\n", LIKES + "0 5 b t\n", LIKES + "5 0 c t\n"))
    assert [video.target for video in likes.videos] == pytest.approx(
        [7.5 - 9.138220535629456, -9.138220535629456, 10 - 9.138220535629456]
    )
    assert likes.classes == []


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("val", VIEWS + "10 a tt\n1e3 b tt\n", "val.csv line 3 has view_count '1e3'; give a whole number >= 1"),
        ("val", VIEWS + "0 a tt\n", "val.csv line 2 has view_count '0'"),
        ("test", VIEWS + "-4 a tt\n", "test.csv line 2 has view_count '-4'"),
        ("test", VIEWS + "4 a\n", "test.csv line 2 has 2 fields, not 3: '4 a'"),
        ("test", VIEWS + "4 4 a tt\n", "test.csv line 2 has 4 fields, not 3"),
        ("test", "view_count,youtube_id,imdb_id\n4,a,t\n", "begins with 'view_count,youtube_id,imdb_id'.*with spaces"),
        ("test", "", "test.csv begins with ''"),
        ("test", VIEWS, "test.csv lists no videos"),
        ("test", VIEWS + "1 b tt\n", r"1 videos more than once, such as 'b' \(test.csv line 2.*after val.csv line 2"),
        ("val", VIEWS + "1 b tt\n" * 2, r"'b' \(val.csv line 3 lists it again after val.csv line 2\)"),
    ],
)
def test_damaged_lvu_files_are_refused(tmp_path: Path, split: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lvu.read(_views(tmp_path, **{split: text}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4 x b tt\n", "val.csv line 2 has class_id '4'; give a whole number from 0 to 3"),
        ("x x b tt\n", "val.csv line 2 has class_id 'x'"),
        ("0 Drama b tt\n", "val.csv line 2 has class_name 'Drama'; class 0 is 'Comedy' elsewhere"),
    ],
)
def test_damaged_lvu_classes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lvu.read(_lvu(tmp_path, "genre", GENRE + "0 Comedy a tt\n", GENRE + text, GENRE + "1 x c tt\n"))


def test_votes_that_are_none_have_no_ratio(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.csv line 2 has like_count '0'; there must be at least one"):
        lvu.read(_lvu(tmp_path, "like_ratio", LIKES + "0 0 a tt\n", LIKES + "1 1 b tt\n", LIKES + "1 1 c tt\n"))


def test_folders_that_are_no_lvu_task_are_named(tmp_path: Path) -> None:
    given = _views(tmp_path)
    with pytest.raises(UserError, match=r"annotations is '.*lvu_1.0': LVU has no task 'lvu_1.0'.*relationship.*view_"):
        lvu.read(str(Path(given).parent))
    (Path(given) / "val.csv").unlink()
    with pytest.raises(UserError, match=r"there is no val.csv in it; give the folder of a task"):
        lvu.read(given)
    with pytest.raises(UserError, match="there is no such folder; give the folder of a task"):
        lvu.read(str(tmp_path / "genre"))


# --- Breakfast ------------------------------------------------------------------------------------------------------


def test_breakfast_files_lie_by_person_and_camera(tmp_path: Path) -> None:
    train = DISHES + "P03-cam01-P03_cereals,56,cereals,0\nP04-stereo-P04_milk_ch0,10,milk,8\n"
    annotations = breakfast.read(_files(tmp_path, {"train": train, "test": DISHES + "P47-webcam02-P47_tea,5,tea,2\n"}))
    assert [video.name for video in annotations.videos] == [
        "P03/cam01/P03_cereals",
        "P04/stereo/P04_milk_ch0",
        "P47/webcam02/P47_tea",
    ]
    assert [(video.split, video.label) for video in annotations.videos] == [("train", 0), ("train", 8), ("test", 2)]
    assert annotations.classes == ["cereals", "1", "tea", "3", "4", "5", "6", "7", "milk", "9"]
    assert (annotations.dataset, annotations.protocol) == ("breakfast", "whole")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DISHES + "P1-cam,5,tea,2\n", "test.csv line 2 has file_name 'P1-cam'; give PERSON-CAMERA-NAME"),
        (DISHES + "P1-cam-P1_tea,5,tea,10\n", "test.csv line 2 has class_id '10'; give a whole number from 0 to 9"),
        (DISHES + "P1-cam-P1_tea,5,tea,0\n", "has action 'tea'; class 0 is 'cereals' elsewhere"),
        (DISHES + "P1-cam-P1_tea,5,,2\n", "test.csv line 2 has action ''"),
        (DISHES + "P1-cam-P1_tea,5,tea\n", "test.csv line 2 has 3 fields"),
        (
            DISHES.replace(",", ";") + "P1-cam-P1_tea;5;tea;2\n",
            "unknown column 'file_name;duration.*separate them with commas",
        ),
        (DISHES.replace("action,", ""), "has no column action"),
        (DISHES + '"P1-cam-P1_tea,5,tea,2\n' + "x" * 200_000, "test.csv line .* is no csv"),
        (DISHES, "test.csv lists no videos"),
        ("", "test.csv has no column file_name"),
    ],
)
def test_damaged_breakfast_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    train = DISHES + "P03-cam01-P03_cereals,56,cereals,0\n"
    with pytest.raises(UserError, match=message):
        breakfast.read(_files(tmp_path, {"train": train, "test": text}))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    given = _files(tmp_path, {"train": DISHES, "test": DISHES})
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train.csv is not a text file in UTF-8"):
        breakfast.read(given)


# --- COIN -----------------------------------------------------------------------------------------------------------


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {"class": "MakeTea", "recipe_type": 3, "subset": "training", "start": 4, "end": 20.5, "duration": 90.0}
    return entry | {"video_url": "u", "annotation": [{"id": "1", "segment": [4.0, 9.0], "label": "boil"}]} | changes


def _coin(tmp_path: Path, database: Any) -> str:
    path = tmp_path / "COIN.json"
    path.write_text(database if isinstance(database, str) else json.dumps({"database": database}))
    return str(path)


def test_coin_uses_a_segment_of_each_video(tmp_path: Path) -> None:
    database = {"-a_": _entry(), "b": _entry(subset="testing", recipe_type=179, **{"class": "Zip"})}
    annotations = coin.read(_coin(tmp_path, database))
    video = _by_id(annotations)["-a_"]
    assert (video.name, video.split, video.label, video.class_name) == ("-a_", "train", 3, "MakeTea")
    assert (video.start_s, video.end_s) == (4, 20.5)
    assert [video.split for video in annotations.videos] == ["train", "test"]
    assert len(annotations.classes) == 180
    assert (annotations.classes[3], annotations.classes[4], annotations.classes[179]) == ("MakeTea", "4", "Zip")
    assert (annotations.dataset, annotations.protocol) == ("coin", "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe_type": 180}, "entry v has recipe_type 180; give the task's number, 0 to 179"),
        ({"recipe_type": "3"}, "entry v has recipe_type '3'"),
        ({"recipe_type": True}, "entry v has recipe_type True"),
        ({"subset": "validation"}, "entry v has subset 'validation'; give training or testing"),
        ({"start": 21}, "entry v has start 21 and end 20.5; give 0 <= start < end"),
        ({"end": None}, "entry v has end None; give seconds"),
        ({"class": "Other"}, "entry v has class 'Other'; recipe_type 3 is 'MakeTea' elsewhere"),
    ],
)
def test_damaged_coin_entries_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        coin.read(_coin(tmp_path, {"good": _entry(), "v": _entry(**changes)}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"database": {', "COIN.json is not JSON: .* in line 1, column 15"),
        ("[]", 'has no "database" of videos'),
        ('{"database": {}}', 'has no "database" of videos'),
        ('{"database": {"a": 1}}', "entry a is 1; give an object"),
        ('{"database": {"a": {}, "a": {}}}', "has the key 'a' twice"),
    ],
)
def test_what_is_not_coin_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        coin.read(_coin(tmp_path, text))


# --- Kinetics -------------------------------------------------------------------------------------------------------


def _kinetics(tmp_path: Path, **texts: str) -> str:
    train = CLIPS + 'zumba,a_-,5,15,train\n"abseiling, fast",b,0,10,train\n'
    return _files(tmp_path, {"train": train} | texts)


def test_kinetics_classes_are_the_sorted_names_of_train(tmp_path: Path) -> None:
    validate = CLIPS.replace("split", "split,is_cc") + "zumba,c,1234567,1234577,validate,1\n"
    test = "youtube_id,time_start,time_end,split\nd,1,2,test\n"
    annotations = kinetics.read(_kinetics(tmp_path, validate=validate, test=test))
    assert annotations.classes == ["abseiling, fast", "zumba"]
    assert [(video.video_id, video.split, video.label) for video in annotations.videos] == [
        ("a_-_000005_000015", "train", 1),
        ("b_000000_000010", "train", 0),
        ("c_1234567_1234577", "val", 1),
        ("d_000001_000002", "test", None),
    ]
    assert (annotations.dataset, annotations.protocol) == ("kinetics", "multi-clip")


def test_kinetics_may_be_one_file(tmp_path: Path) -> None:
    path = tmp_path / "k.csv"
    path.write_text(CLIPS + "x,a,0,10,train\nx,a,20,30,val\n,a,40,50,test\n")
    assert [video.split for video in kinetics.read(str(path)).videos] == ["train", "val", "test"]


def test_seconds_with_a_second_label_are_rejected(tmp_path: Path) -> None:
    test = CLIPS + "zumba,a,0,10,test\nzumba,a,10,20,test\n"
    annotations = kinetics.read(
        _kinetics(tmp_path, val=CLIPS + 'zumba,c,1,9,val\n"abseiling, fast",c,1,9,val\n', test=test)
    )
    reasons = [video.reason for video in annotations.videos]
    assert reasons == ["", "", "", "listed again in val.csv line 3, after val.csv line 2", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CLIPS + "zumba,c,1,9,valid\n", "val.csv line 2 has split 'valid'; give train, val, validate, test"),
        (CLIPS + "rumba,c,1,9,val\n", "val.csv line 2 has label 'rumba'; give a class of split train"),
        (CLIPS + ",c,1,9,val\n", "val.csv line 2 has label ''"),
        ("youtube_id,time_start,time_end,split\nc,1,9,val\n", "val.csv line 2 is of split val and has no label"),
        (CLIPS + "zumba,c,9,9,val\n", "val.csv line 2 has time_end '9'; give a time after time_start, 9"),
        (CLIPS + "zumba,c,1.5,9,val\n", "val.csv line 2 has time_start '1.5'"),
        (CLIPS + "zumba,,1,9,val\n", "val.csv line 2 has youtube_id ''"),
        (CLIPS + "zumba,a_-,5,15,val\n", r"such as 'a_-_000005_000015' \(val.csv line 2 .* train.csv line 2"),
        (CLIPS.replace(",", " ") + "zumba c 1 9 val\n", "val.csv has an unknown column 'label youtube_id"),
        ("", "val.csv has no column youtube_id"),
    ],
)
def test_damaged_kinetics_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kinetics.read(_kinetics(tmp_path, val=text))


def test_kinetics_needs_labelled_training_clips(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no clip of split train has a label"):
        kinetics.read(_files(tmp_path, {"val": CLIPS + "zumba,c,1,9,val\n"}))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"there is none of train.csv, val.csv, validate.csv, test.csv in it"):
        kinetics.read(str(tmp_path / "none"))


@pytest.mark.parametrize("read", [breakfast.read, coin.read, kinetics.read])
def test_annotations_that_are_not_there_are_named(tmp_path: Path, read: Callable[[str], Annotations]) -> None:
    with pytest.raises(UserError, match=r"annotations is '.*nowhere': there is no such"):
        read(str(tmp_path / "nowhere"))
