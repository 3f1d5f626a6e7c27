"""Which file is meant by a name in a list, or by a benchmark's id, as people and downloaders write them."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from pipelines import storage
from pipelines.data.annotations.shared import AnnotatedVideo
from pipelines.data.indexing.video_files import EXTENSIONS, UNFINISHED, VideoFiles, has_video_ending

# --- names in a list ------------------------------------------------------------------------------------------------


class Names:
    """The names of a folder's videos, and what people write for them: `./a.mp4`, `b//a.mp4`, absolute paths and URIs,
    Windows' `b\\a.mp4`, and letters with accents in either of their two Unicode forms.

    Args:
        folder: the folder, a path or a URI.
        files: what is below it.
    """

    def __init__(self, folder: str, files: VideoFiles) -> None:
        self._root = storage.absolute(folder).rstrip("/")
        self._faults = dict(files.faults)
        # What is returned is one string a file, however many stretches of it are listed.
        self._known = {name: name for name in files.videos}
        self._uris = {name: f"{self._root}/{name}" for name in files.videos}
        # Lists are read without the spaces around a name.
        spaced = [name for name in files.videos if name != name.strip()]
        alike = Counter(map(str.strip, spaced))
        self._spaced = {name.strip(): name for name in spaced if alike[name.strip()] == 1}
        self._composed = {_composed(name): name for name in self._known if not name.isascii()}

    def name_of(self, given: str) -> str:
        """Return the name of the video that is meant, or where there is none a plain form of what is given.

        What lies outside the folder keeps its absolute path or URI.
        """
        if known := self._known.get(given):
            return known
        plain = self._plain(given)
        for name in (plain, self._composed.get(_composed(plain), ""), self._plain(given.replace("\\", "/"))):
            if known := self._known.get(name):
                return known
        return self._spaced.get(plain, plain)

    def uri_of(self, name: str) -> str:
        """Return the path or URI of a name that `name_of` returned."""
        if known := self._uris.get(name):
            return known
        return name if storage.is_uri(name) or name.startswith("/") else f"{self._root}/{name}"

    def fault_of(self, name: str) -> str:
        """Return why there is no such video, or nothing; one on another store counts as there until it is read."""
        if name in self._known or storage.is_uri(name):
            return ""
        if not storage.is_uri(self._root) and os.path.isfile(self.uri_of(name)):
            return ""
        return self._faults.get(name, f"not found as {name}")

    def _plain(self, given: str) -> str:
        """Return a name without `.`, `..` and double slashes, and without the folder in front."""
        name = storage.absolute(given) if given.startswith(("/", "~", "file://")) else given
        scheme, mark, rest = name.partition("://")
        # What ends in a name that is no URI may hold `..`; in an object store that is a name like any other.
        name = f"{scheme}://{re.sub('/+', '/', rest)}" if mark else posixpath.normpath(name)
        if name.startswith("../"):
            # It may come back into the folder; where it does not, it is one name, however it is written.
            scheme, mark, folder = self._root.rpartition("://")
            name = f"{scheme}{mark}{posixpath.normpath(f'{folder}/{name}')}"
        below = name.removeprefix(f"{self._root}/")
        if below == name and name.startswith("/"):
            # The same folder by another way, such as a link.
            below = os.path.realpath(name).removeprefix(f"{os.path.realpath(self._root)}/")
            below = below if below in self._known else name
        return below


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def by_name(videos: list[AnnotatedVideo], names: Names) -> list[AnnotatedVideo]:
    """Return videos with their files, or the reason why they have none; their names are those of `Names.name_of`."""

    def located(video: AnnotatedVideo) -> AnnotatedVideo:
        fault = video.reason or names.fault_of(video.name)
        # Of what the folder lists, the fault alone is new; a csv's line helps to find the name.
        reason = f"listed in {video.location}, {fault}" if fault and not video.reason else fault
        return replace(video, uri=names.uri_of(video.name), reason=reason)

    return [located(video) for video in videos]


# --- ids of benchmarks ----------------------------------------------------------------------------------------------

FORMAT = re.compile(r"\.f[\w=+-]+$")
"""What yt-dlp puts before the ending of a stream that is still to be merged with another: `.f` and its format id."""
SOUND_FORMATS = re.compile(r"\.f(139|140|141|171|172|249|250|251|256|258|325|328|338|380|599|600|774)\b")
"""Format ids of YouTube that are sound alone, some of them in files with a video's ending (`ID.f251.webm`)."""
BRACKETED = re.compile(r"\[([^\[\]]+)\]$")
"""yt-dlp's own naming: `TITLE [ID].ENDING`."""
YOUTUBE_ID = re.compile(r"-([\w-]{11})$")
"""youtube-dl's own naming: `TITLE-ID.ENDING`."""
WHOLE, STREAM, INCOMPLETE = range(3)
"""How good a file is: the whole video, a picture stream without its sound, or a part that does not serve."""


def ids_in(name: str) -> Iterator[tuple[str, int]]:
    """Yield the ids that the last part of a file's name may stand for, each with how good the file is.

    `ID.mp4`; with another ending appended by a downloader that was told the first (`ID.mp4.mkv`); a stream that was
    not merged (`ID.f137.mp4`); what is incomplete (`ID.mp4.part`, `ID.temp.mp4`); `TITLE [ID].mp4`; `TITLE-ID.mp4`.
    """
    rest = UNFINISHED.sub("", name)
    rank = WHOLE if rest == name else INCOMPLETE
    if SOUND_FORMATS.search(rest):
        return
    rest = rest.rpartition(".")[0]
    while rest:
        yield rest, rank
        for pattern in (BRACKETED, YOUTUBE_ID):
            if match := pattern.search(rest):
                yield match[1], rank
        shorter, _, ending = rest.rpartition(".")
        if ending == "temp":
            rank = INCOMPLETE
        elif FORMAT.search(rest):
            rank = max(rank, STREAM)
        elif ending.lower() not in EXTENSIONS:
            return
        rest = shorter


def by_id(videos: list[AnnotatedVideo], files: VideoFiles, folder: str) -> list[AnnotatedVideo]:
    """Return videos with their files; their names are paths without ending, in the folder or in any below it.

    Of several files, the best counts (`ids_in`); of several that are equally good, none.
    """
    root = storage.absolute(folder).rstrip("/")
    depth = videos[0].name.count("/")
    wanted = {video.name for video in videos}
    found: dict[str, list[tuple[int, str]]] = {}
    faults = [name for name, _ in files.faults if UNFINISHED.search(name) or has_video_ending(name)]
    broken = dict(files.faults)
    for file in [*files.videos, *faults]:
        *folders, last = file.split("/")
        above = "".join(f"{name}/" for name in folders[len(folders) - depth :]) if depth else ""
        for video_id, rank in ids_in(last):
            if (name := above + video_id) in wanted:
                found.setdefault(name, []).append((INCOMPLETE if file in broken else rank, file))
                break

    def located(video: AnnotatedVideo) -> AnnotatedVideo:
        candidates = sorted(found.get(video.name, []))
        if not candidates:
            reason = f"listed in {video.location}, not found as {video.name}.* in the folder or below it"
            return replace(video, uri=f"{root}/{video.name}", reason=video.reason or reason)
        rank, file = candidates[0]
        reason = ""
        if rank == INCOMPLETE:
            why = broken.get(file, "a download that is not complete")
            reason = f"listed in {video.location}, found only as {file}: {why}"
        elif len(candidates) > 1 and candidates[1][0] == rank:
            reason = f"found as {file} and as {candidates[1][1]}: leave one"
        return replace(video, name=file, uri=f"{root}/{file}", reason=video.reason or reason)

    return [located(video) for video in videos]
