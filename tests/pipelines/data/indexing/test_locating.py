"""Names in lists and ids of benchmarks lead to files, however people and downloaders write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipelines.data.annotations.shared import AnnotatedVideo
from pipelines.data.indexing.locating import Names, by_id, by_name, ids_in
from pipelines.data.indexing.video_files import VideoFiles, find
from tests.pipelines.data.indexing.test_video_files import link, touch

# --- names in a list ------------------------------------------------------------------------------------------------


def names_of(folder: Path | str, *videos: str) -> Names:
    return Names(str(folder), VideoFiles(list(videos)))


@pytest.mark.parametrize(
    "given",
    ["b c/d.mp4", "./b c/d.mp4", "b c//d.mp4", "././b c/./d.mp4", "x/../b c/d.mp4", "b c\\d.mp4", ".\\b c\\d.mp4"],
)
def test_names_below_the_folder(tmp_path: Path, given: str) -> None:
    assert names_of(tmp_path, "b c/d.mp4").name_of(given) == "b c/d.mp4"


@pytest.mark.parametrize("form", ["{0}/b/d.mp4", "{0}//b/./d.mp4", "file://{0}/b/d.mp4", "{1}/b/d.mp4"])
def test_absolute_names_below_the_folder(tmp_path: Path, form: str) -> None:
    videos = touch(tmp_path / "videos", "b/d.mp4")
    link(tmp_path, "alias", videos)
    for folder in (f"{videos}", f"{videos}/", f"file://{videos}", f"{tmp_path}/alias"):
        names = Names(folder, find(folder))
        name = names.name_of(form.format(videos, tmp_path / "alias"))
        assert name == "b/d.mp4"
        assert Path(names.uri_of(name)).samefile(videos / "b/d.mp4")


def test_spaces_around_a_name_that_lists_lose(tmp_path: Path) -> None:
    names = names_of(tmp_path, " a.mp4", "b.mp4 ", "c.mp4", " c.mp4", " d.mp4", "d.mp4 ")
    given = ("a.mp4", "./a.mp4", "b.mp4", f"{tmp_path}/b.mp4", "c.mp4", " c.mp4", "d.mp4")
    # Of two that could be meant, none is.
    assert [names.name_of(name) for name in given] == [
        *(" a.mp4", " a.mp4", "b.mp4 ", "b.mp4 ", "c.mp4", " c.mp4", "d.mp4")
    ]
    assert names.fault_of("d.mp4") == "not found as d.mp4"


def test_letters_with_accents_have_two_forms(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "Ünï/é.mp4")
    parted = unicodedata.normalize("NFD", composed)
    assert composed != parted
    assert names_of(tmp_path, parted).name_of(composed) == parted
    assert names_of(tmp_path, composed).name_of(f"./{parted}") == composed
    both = names_of(tmp_path, composed, parted)
    assert (both.name_of(composed), both.name_of(parted)) == (composed, parted)


def test_names_outside_the_folder_keep_their_place(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/e.mp4", "videos/a.mp4")
    names = Names(str(tmp_path / "videos"), find(str(tmp_path / "videos")))
    for given in (f"{tmp_path}/elsewhere/e.mp4", "../elsewhere/e.mp4"):
        name = names.name_of(given)
        assert Path(names.uri_of(name)).resolve() == tmp_path / "elsewhere/e.mp4"
        assert names.fault_of(name) == ""
    assert (
        names.name_of("../elsewhere/e.mp4") == names.name_of("./..//elsewhere/./e.mp4") == f"{tmp_path}/elsewhere/e.mp4"
    )
    assert names.name_of("../videos/a.mp4") == "a.mp4"
    assert names.fault_of(names.name_of("../z.mp4")) == f"not found as {tmp_path}/z.mp4"
    assert names.fault_of(names.name_of("/nowhere/z.mp4")) == "not found as /nowhere/z.mp4"
    # Whether another store has it is seen when it is read.
    assert names.fault_of(names.name_of("s3://other/e.mp4")) == ""
    assert names.uri_of("s3://other/e.mp4") == "s3://other/e.mp4"


def test_uris_below_a_bucket_are_names() -> None:
    names = names_of("s3://bucket/videos/", "a/b.mp4")
    assert names.name_of("s3://bucket/videos/a/b.mp4") == "a/b.mp4"
    assert names.name_of("./a//b.mp4") == "a/b.mp4"
    assert names.name_of("../videos/a/b.mp4") == "a/b.mp4"
    assert names.uri_of("a/b.mp4") == "s3://bucket/videos/a/b.mp4"
    assert names.fault_of("a/c.mp4") == "not found as a/c.mp4"


def test_the_fault_of_a_listed_file_is_its_reason(tmp_path: Path) -> None:
    link(tmp_path, "a.mp4", "/nowhere/x.mp4")
    listed = [AnnotatedVideo(name, name, f"l.csv line {i}") for i, name in enumerate(("a.mp4", "b.mp4"))]
    reasons = [video.reason for video in by_name(listed, Names(str(tmp_path), find(str(tmp_path))))]
    assert reasons[0].startswith("listed in l.csv line 0, a link to '/nowhere/x.mp4', which leads nowhere")
    assert reasons[1] == "listed in l.csv line 1, not found as b.mp4"


# --- ids of benchmarks ----------------------------------------------------------------------------------------------

ID = "-wX6_qCCnPc"


def located(tmp_path: Path, *files: str, name: str = ID) -> AnnotatedVideo:
    touch(tmp_path, "other.mp4", *files)
    (video,) = by_id([AnnotatedVideo("id", name, "l.csv line 2")], find(str(tmp_path)), str(tmp_path))
    return video


@pytest.mark.parametrize(
    "file",
    [
        f"{ID}.mp4",
        f"deep/er/{ID}.MKV",
        f"{ID}.mp4.mkv",
        f"{ID}.mp4.webm",
        f"{ID}.mkv.mkv",
        f"{ID}.f137.mp4",
        f"{ID}.f303-1.webm",
        f"{ID}.fhls-1080p.mp4",
        f"{ID}.mp4.f137.mp4",
        f"A title. With dots [{ID}].mp4",
        f"A title [HD] [{ID}].mp4.mkv",
        f"A title [{ID}].f299.mp4",
        f"A title-{ID}.webm",
        f"A title-{ID}.f248.webm",
    ],
)
def test_names_that_downloaders_give_are_found(tmp_path: Path, file: str) -> None:
    video = located(tmp_path, file)
    assert (video.name, video.uri, video.reason) == (file, f"{tmp_path}/{file}", "")


@pytest.mark.parametrize(
    "file",
    [f"{ID}.mp4.part", f"{ID}.f137.mp4.part", f"{ID}.temp.mp4", f"{ID}.mp4.crdownload", f"T [{ID}].f137.temp.mp4"],
)
def test_what_is_not_complete_is_named(tmp_path: Path, file: str) -> None:
    video = located(tmp_path, file)
    assert video.reason.startswith(f"listed in l.csv line 2, found only as {file}: a download that is not complete")


@pytest.mark.parametrize(
    ("files", "best"),
    [
        ((f"{ID}.mp4", f"{ID}.f137.mp4", f"{ID}.mp4.part"), f"{ID}.mp4"),
        ((f"{ID}.f248.webm", f"{ID}.f251.webm"), f"{ID}.f248.webm"),
        ((f"{ID}.f137.mp4", f"{ID}.f140-drc.mp4", f"{ID}.temp.mkv"), f"{ID}.f137.mp4"),
    ],
)
def test_the_best_of_several_files_counts(tmp_path: Path, files: tuple[str, ...], best: str) -> None:
    video = located(tmp_path, *files)
    assert (video.name, video.reason) == (best, "")


@pytest.mark.parametrize(
    "files", [(f"a/{ID}.mp4", f"b/{ID}.mkv"), (f"{ID}.mp4", f"{ID}.mp4.mkv"), (f"{ID}.f137.mp4", f"{ID}.f248.webm")]
)
def test_of_equally_good_files_none_counts(tmp_path: Path, files: tuple[str, str]) -> None:
    assert located(tmp_path, *files).reason == f"found as {files[0]} and as {files[1]}: leave one"


@pytest.mark.parametrize(
    "file", [f"{ID}.f251.webm", f"{ID}.mp4.ytdl", f"{ID}.en.vtt", f"{ID}.info.json", f"x{ID}.mp4", f"{ID} copy.mp4"]
)
def test_other_files_are_not_the_video(tmp_path: Path, file: str) -> None:
    assert located(tmp_path, file).reason.startswith(f"listed in l.csv line 2, not found as {ID}.*")


def test_folders_belong_to_the_id_where_it_has_some(tmp_path: Path) -> None:
    name = "P03/cam01/P03_tea"
    assert located(tmp_path, "P03_tea.avi", "cam01/P03_tea.avi", name=name).reason
    video = located(tmp_path, "sync/P03/cam01/P03_tea.avi.mp4", name=name)
    assert (video.name, video.reason) == ("sync/P03/cam01/P03_tea.avi.mp4", "")


def test_an_id_may_contain_a_dot_and_a_bracket() -> None:
    assert next(ids_in("a.b.mp4")) == ("a.b", 0)
    assert [video_id for video_id, _ in ids_in("a [b].mp4")] == ["a [b]", "b"]
