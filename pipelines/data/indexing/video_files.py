"""The files below a folder: videos, those that cannot be one, and others, counted by their endings. No file is lost.

On local disks, links are followed. A folder is listed once, however many links lead to it, under its own name where it
has one below the folder; so a link to a folder that contains it ends nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyarrow import fs

from pipelines import storage
from pipelines.errors import UserError

EXTENSIONS = (
    *("mp4", "m4v", "mov", "qt", "3gp", "3gpp", "3g2", "f4v", "ismv", "insv", "mj2"),
    *("mkv", "mk3d", "webm", "avi", "divx", "amv", "flv", "ogv", "ogm", "wmv", "asf", "rm", "rmvb", "nut", "nsv"),
    *("mpg", "mpeg", "mpe", "mpv", "m1v", "m2v", "m2p", "vob", "vro", "mod", "tod", "dv", "dif", "mxf", "gxf"),
    *("ts", "mts", "m2ts", "m2t", "trp", "tp", "wtv", "h264", "264", "avc", "h265", "265", "hevc", "ivf", "obu", "y4m"),
    *("mjpg", "mjpeg"),
)
"""Endings of the files that are taken for videos, in any case: those of FFmpeg's formats that cameras, recorders,
editors and downloaders write."""
UNFINISHED = re.compile(r"\.(part|partial|crdownload|download|opdownload|filepart|!ut|!qb|bc!)$", re.IGNORECASE)
"""What browsers and downloaders append to the name of a file that is not complete (yt-dlp and youtube-dl: `.part`)."""
FRAGMENT = re.compile(r"-frag\d+$")
"""What yt-dlp appends to `.part` for each piece of a stream: one ending, not hundreds."""
NO_ENDING, HIDDEN, LINKED_AGAIN = "no ending", "hidden", "links to folders that are listed"
SHOWN_ENDINGS = 6
"""Endings that are named; the others are counted together."""
MAX_ENDING = 12
"""Characters of an ending; what is longer is part of the name."""


@dataclass
class VideoFiles:
    """What lies below a folder. Names are paths below it, separated by `/`."""

    videos: list[str] = field(default_factory=list)
    """Names of the files with a video's ending, sorted."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Names of what should be a video or a folder and is none, each with the reason."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of the other files, by ending."""
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size in bytes and time of the last change in ns of each video in an object store, whose listing states them."""

    def described(self) -> str:
        """Return the number of other files with their endings, such as `3 other files (2 .txt, 1 hidden)`."""
        total = self.others.total()
        what = f"{total} other file{'' if total == 1 else 's'}"
        most = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{count} {ending}" for ending, count in most[:SHOWN_ENDINGS]]
        if rest := sum(count for _, count in most[SHOWN_ENDINGS:]):
            named.append(f"{rest} with others")
        return f"{what} ({', '.join(named)})" if named else what

    def add(self, name: str) -> None:
        """Add a file by its name."""
        if is_hidden(name):
            self.others[HIDDEN] += 1
        elif has_video_ending(name):
            self._add_video(name)
        elif (whole := UNFINISHED.sub("", name)) != name and has_video_ending(whole):
            self.faults.append((shown(name), f"a download that is not complete ({name[len(whole) :]})"))
        else:
            self.others[ending_of(name)] += 1

    def _add_video(self, name: str) -> None:
        if shown(name) == name:
            self.videos.append(name)
        else:
            self.faults.append((shown(name), "its name, or that of its folder, is not UTF-8: rename it"))

    def sort(self) -> VideoFiles:
        """Sort videos and faults by name and return this."""
        self.videos.sort()
        self.faults.sort()
        return self


def has_video_ending(name: str) -> bool:
    """Return whether a file's ending is that of a video; spaces behind it do not count."""
    return name.rpartition(".")[2].rstrip().lower() in EXTENSIONS and "." in name


def is_hidden(name: str) -> bool:
    """Return whether a name or one of its folders begins with a dot."""
    return name.startswith(".") or "/." in name


def ending_of(name: str) -> str:
    """Return a file's ending with its dot, in small letters."""
    _, dot, ending = FRAGMENT.sub("", name.rpartition("/")[2].lower()).rpartition(".")
    return f".{shown(ending)}" if dot and 0 < len(ending) <= MAX_ENDING else NO_ENDING


def shown(name: str) -> str:
    """Return a name as text that can be written anywhere: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(folder: str) -> VideoFiles:
    """Return what lies below a folder, a path or a URI.

    Raises:
        UserError: there is no such folder, or it may not be read.
    """
    if not storage.is_folder(folder):
        raise UserError(f"videos is {folder!r}: there is no such folder")
    system, inner = storage.filesystem(folder)
    found = VideoFiles()
    if isinstance(system, fs.LocalFileSystem):
        _walk(inner.rstrip("/") or "/", found)
        return found.sort()
    for info in system.get_file_info(fs.FileSelector(inner, recursive=True)):
        if info.type == fs.FileType.File:
            name = info.path.removeprefix(inner.rstrip("/") + "/")
            found.add(name)
            found.stamps[name] = info.size or 0, info.mtime_ns or 0
    return found.sort()


# --- local disks ----------------------------------------------------------------------------------------------------


def _walk(root: str, found: VideoFiles) -> None:
    """Add everything below a local folder, real folders before those that links lead to."""
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"videos is {root!r}: it cannot be read ({error.strerror})") from None
    listed: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        if waiting:
            below = waiting.pop()
        else:
            # Of two links to a folder, the first by name counts.
            links.sort(reverse=True)
            below = links.pop()
        try:
            status = os.stat(f"{root}/{below}")
            entries = list(os.scandir(f"{root}/{below}"))
        except OSError as error:
            found.faults.append((shown(below), f"the folder cannot be read ({error.strerror})"))
            continue
        if (place := (status.st_dev, status.st_ino)) in listed:
            found.others[LINKED_AGAIN] += 1
            continue
        listed.add(place)
        for name, is_link in _folders(entries, f"{below}/" if below else "", found):
            (links if is_link else waiting).append(name)


def _folders(entries: list[os.DirEntry[str]], prefix: str, found: VideoFiles) -> Iterator[tuple[str, bool]]:
    """Add a folder's files, and yield the names of the folders in it and whether each is a link."""
    for entry in entries:
        name = prefix + entry.name
        if not entry.is_symlink():
            if entry.is_dir():
                yield name, False
            elif entry.is_file():
                found.add(name)
            else:
                _add_fault(name, "neither a file nor a folder", found)
            continue
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            _add_fault(
                name, f"a link to {shown(os.readlink(entry.path))!r}, which leads nowhere ({error.strerror})", found
            )
            continue
        if stat.S_ISDIR(mode):
            yield name, True
        elif stat.S_ISREG(mode):
            found.add(name)
        else:
            _add_fault(name, "a link to neither a file nor a folder", found)


def _add_fault(name: str, reason: str, found: VideoFiles) -> None:
    """Add what cannot be read as a fault if it may have been a video or a folder of some, else as another file."""
    if not is_hidden(name) and (has_video_ending(name) or ending_of(name) == NO_ENDING):
        found.faults.append((shown(name), reason))
    else:
        found.others[HIDDEN if is_hidden(name) else ending_of(name)] += 1
