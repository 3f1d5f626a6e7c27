"""Captions: both forms of files, and what is wrong with captions; none is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.manifest import SCHEMA
from pipelines.data.narration import captions as captions_module
from pipelines.data.narration.captions import Caption, check_captions, read_captions
from pipelines.data.narration.segments import Segments
from pipelines.errors import UserError

GOOD = [("a", 0.0, 2.5, "whisk the eggs"), ("a", 2, 6, "heat\u2028 the  pan"), ("b", 1.25, 3.0, "ä cöp of tea")]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[Any]) -> str:
    keys = ("video", "start", "end", "text")
    dicts = [dict(zip(keys, row, strict=True)) if isinstance(row, tuple) else row for row in rows]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in dicts) + "\n"


def grouped(rows: list[tuple[str, float, float, str]]) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for video, start, end, text in rows:
        lists = found.setdefault(video, {"start": [], "end": [], "text": []})
        for name, value in zip(lists, (start, end, text), strict=True):
            lists[name].append(value)
    return found


def said(path: str) -> list[tuple[str, float, float, str]]:
    found = list(read_captions(path))
    assert not any(caption.reason for caption in found)
    return [(caption.video, caption.start_s, caption.end_s, caption.text) for caption in found]


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_both_forms_say_the_same(
    tmp_path: Path, read: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "READ", read)
    expected = [(video, start, end, " ".join(text.split())) for video, start, end, text in GOOD]
    whole = write(tmp_path / "c.json", "\ufeff" + json.dumps(grouped(GOOD), indent=indent))
    assert said(write(tmp_path / "c.jsonl", "\n" + lines(GOOD))) == expected == said(whole)
    check_captions(whole)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("a", 0, 1, ""), "it has no text"),
        (("a", 0, 1, " \n"), "it has no text"),
        (("a", 0, 1, None), "it has no text"),
        (("a", 0, 1, float("nan")), "it has no text"),
        (("", 0, 1, "x"), "video is '': it names no video"),
        ((7, 0, 1, "x"), "video is 7: it names no video"),
        (("a", 5, 5, "x"), "it ends at 5 s, not after its start at 5 s"),
        (("a", 5, 2, "x"), "it ends at 2 s, not after its start at 5 s"),
        (("a", float("nan"), 2, "x"), "start is nan: no finite number of seconds"),
        (("a", 0, float("inf"), "x"), "end is inf: no finite number of seconds"),
        (("a", 0, 10**400, "x"), "end is 1000"),
        (("a", "0", 1, "x"), "start is '0': no finite number of seconds"),
        (("a", 0, True, "x"), "end is True: no finite number of seconds"),
        ({"video": "a", "start": 0, "text": "x"}, "end is None: no finite number of seconds"),
        ([1, 2], r"the line is \[1, 2\], no object with video, start, end, text"),
    ],
)
def test_a_caption_that_is_none_says_why_and_the_others_stay(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "c.jsonl", lines([GOOD[0], row, GOOD[2]]))
    first, wrong, last = read_captions(path)
    assert (first.text, last.text) == (GOOD[0][3], GOOD[2][3])
    assert wrong.location == "c.jsonl line 2"
    assert wrong.reason.startswith(reason.replace("\\", ""))


def test_lines_and_videos_that_are_none(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl", b'{"video": "a", "sta\n\xff\xfe\n' + b"[" * 100_000 + b"\n" + lines(GOOD).encode()
    )
    reasons = [caption.reason for caption in read_captions(path)]
    assert len(reasons) == 6
    assert all(reason.startswith("the line is no JSON: ") for reason in reasons[:3])
    assert reasons[3:] == ["", "", ""]
    content = {"a": None, "c": {"start": 1, "end": 2, "text": "x"}} | grouped(GOOD[2:])
    nothing, scalars, right = read_captions(write(tmp_path / "c.json", json.dumps(content)))
    assert nothing.reason == "it is None, no object with lists start, end, text"
    assert scalars.reason.startswith("it is {'start': 1, 'end': 2, 'text': 'x'}, no object with lists")
    assert right.text == GOOD[2][3]


def test_lists_of_different_lengths(tmp_path: Path) -> None:
    content = {"a": {"start": [1], "end": [2], "text": []}} | grouped(GOOD[2:])
    wrong, right = read_captions(write(tmp_path / "c.json", json.dumps(content)))
    assert wrong.reason == "its lists have different lengths: 1 start, 1 end, 0 text"
    assert right.text == GOOD[2][3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", r"narration is '.*c.txt': give a file that ends in .jsonl, .ndjson or .json"),
        ("c.jsonl", "\n\n", r"there are no captions in it"),
        ("c.json", "{}", r"there are no captions in it"),
        ("c.json", "", r"it ends in the middle \(character 1\); give HowTo100M's json, whole, or a .jsonl"),
        ("c.json", "[1]", r"'\[' stands where '\{' should \(character 1\); give HowTo100M's json"),
        ("c.json", '{"a": {"start": [1], "end"', r"it ends in the middle, or is no JSON"),
        (
            "c.json",
            '{"a": {"start": [1], "end": [2], "text": ["x"]}, "b": {"sta',
            r"it ends in the middle, or is no JSON",
        ),
        ("c.json", "{1: 2}", r"'1' stands where the name of a video should"),
        ("c.json", b'{"\xff": 2}', r"it is not a text file in UTF-8"),
    ],
)
def test_files_that_are_none_are_named_beforehand(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        check_captions(write(tmp_path / name, content))
    with pytest.raises(UserError, match="there is no such file"):
        check_captions(str(tmp_path / "none.jsonl"))


WHOLE = json.dumps(grouped(GOOD))


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (f"{WHOLE}\n{WHOLE}", len(WHOLE) + 2, r"'\{' stands after the end of the object"),
        (f"{WHOLE}  more", len(WHOLE) + 3, "'m' stands after the end of the object"),
        (f"{WHOLE}}}", len(WHOLE) + 1, r"'\}' stands after the end of the object"),
        ("{} []", 4, r"'\[' stands after the end of the object"),
        (f"{WHOLE[:-1]} ,}}", len(WHOLE) + 2, r"'\}' stands where the name of a video should"),
        ("{,}", 2, "',' stands where the name of a video should"),
        (f"{WHOLE[:-1]},,{WHOLE[1:]}", len(WHOLE) + 1, "',' stands where the name of a video should"),
    ],
)
def test_a_json_file_is_one_object_to_its_end(
    tmp_path: Path, read: int, content: str, place: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "READ", read)
    path = write(tmp_path / "c.json", content)
    for whole in (check_captions, lambda path: list(read_captions(path))):
        with pytest.raises(UserError, match=rf"{message}.* \(character {place:,}\); give"):
            whole(path)
    assert said(write(tmp_path / "c.json", f"{WHOLE} \n\n"))


# --- segments -------------------------------------------------------------------------------------------------------


def manifest(*videos: tuple[str, float, float]) -> pa.Table:
    facts = {"uri": "x", "split": "train", "duration_s": 60.0, "fps": 8.0, "num_frames": 480, "width": 64, "height": 64}
    return pa.Table.from_pylist([{"video_id": v, "start_s": s, "end_s": e} | facts for v, s, e in videos], SCHEMA)


def placed(captions: list[Caption], shortest_s: float = 0.0, size: int = 2) -> tuple[Segments, list[Any], list[str]]:
    segments = Segments(manifest(("train/a", 0.0, 20.0), ("b", 10.0, 30.0), ("x/c", 0, 9), ("y/c", 0, 9)), shortest_s)
    parts = list(segments.parts(captions, size))
    assert [len(part.segments) + len(part.rejects) for part in parts[:-1]] == [size] * (len(parts) - 1)
    rows = [row for part in parts for row in part.segments.to_pylist()]
    return segments, rows, [failure.reason for part in parts for failure in part.rejects]


def test_captions_become_stretches_of_their_videos() -> None:
    captions = [
        Caption("a", "1", 1.0, 4.0, "one"),
        Caption("train/a", "2", 3.0, 25.0, "two"),
        Caption("a", "3", 1.0, 4.0, "one"),
        Caption("b", "4", 8.0, 12.5, "three"),
        Caption("b", "5", 30.0, 31.0, "four"),
        Caption("b", "6", 2.0, 10.0, "five"),
        Caption("nobody", "7", 0.0, 1.0, "six"),
        Caption("c", "8", 0.0, 1.0, "seven"),
        Caption("", "9", reason="it has no text"),
        Caption("y/c", "10", 0.0, 1.0004, "eight"),
    ]
    segments, rows, reasons = placed(captions)
    assert [(row["video"], row["row"], row["start_s"], row["end_s"], row["text"]) for row in rows] == [
        ("train/a", 0, 1.0, 4.0, "one"),
        ("train/a", 0, 3.0, 20.0, "two"),
        ("train/a", 0, 1.0, 4.0, "one"),
        ("b", 1, 10.0, 12.5, "three"),
        ("y/c", 3, 0.0, 1.0004, "eight"),
    ]
    names = [row["video_id"] for row in rows]
    assert names[:2] == ["train/a@1-4#0", "train/a@3-20#1"]
    assert len(set(names)) == len(names)
    assert reasons == [
        "30 to 31 s lies outside the video, which is used from 10 to 30 s",
        "2 to 10 s lies outside the video, which is used from 10 to 30 s",
        "no video of the manifest has that id",
        "several videos of the manifest have that name",
        "it has no text",
    ]
    # The second and the third begin while the one before is said.
    assert segments.counts == {"clipped": 2, "overlapping": 2}
    assert placed(captions, size=100)[1:] == (rows, reasons)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(4.0, 6.0, (0.5, 9.5)), (0.5, 1.5, (0.0, 9.0)), (18.0, 19.0, (11.0, 20.0)), (2.0, 12.0, (2.0, 12.0))],
)
def test_short_segments_are_widened_within_the_video(start: float, end: float, expected: tuple[float, float]) -> None:
    segments, rows, _ = placed([Caption("a", "1", start, end, "x")], shortest_s=9.0)
    assert (rows[0]["start_s"], rows[0]["end_s"]) == pytest.approx(expected)
    assert segments.counts["widened"] == (end - start < 9)
    _, rows, _ = placed([Caption("a", "1", start, end, "x")], shortest_s=100.0)
    assert (rows[0]["start_s"], rows[0]["end_s"]) == (0.0, 20.0)


def test_overlaps_do_not_depend_on_the_order_of_the_captions() -> None:
    random = np.random.default_rng(0)
    starts = random.integers(0, 18, 12)
    times = [
        (float(start), float(start + length)) for start, length in zip(starts, random.integers(1, 3, 12), strict=True)
    ]
    ordered = sorted(times)
    slow = sum(any(start < end for _, end in ordered[:i]) for i, (start, _) in enumerate(ordered))
    assert 0 < slow < 11
    for _ in range(20):
        random.shuffle(times)
        captions = [Caption("a", "1", start, end, "x") for start, end in times]
        assert placed(captions)[0].counts["overlapping"] == slow
    apart = [Caption(video, "1", start, start + 1.0, "x") for video in "ab" for start in (14.0, 12.0, 13.0, 11.0)]
    assert placed(apart)[0].counts["overlapping"] == 0
