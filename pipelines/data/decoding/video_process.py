"""A child process that probes, reads and encodes videos, so that a decoder that hangs or crashes costs one video, not
the task.

decord can loop for ever while holding the GIL (decord issue 373): only ending its process helps. The child handles one
video at a time, starts in 0.3 s, and imports neither torch nor Ray. Frames come back through a file in memory.

    parent  -- VideoRequest -->  child
    parent  <-- VideoReply ----  child, its frames in the file
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from typing import IO, cast

import numpy as np

from pipelines.data.decoding.video_progress import Counted, progress_of, stalled_at
from pipelines.data.decoding.video_requests import ClipRequest, EncodeRequest, FramesRequest, VideoReply, VideoRequest
from s5.errors import VideoError
from s5.video.containers.outline import has_index
from s5.video.reader import FrameArray, Source
from s5.video.reading import Decoder, SquareReader, VideoFacts, probe, read_clips

GRACE_S = 5.0
"""Seconds after the time limit at which a child whose parent has ended exits."""


STALLED_S = 5.0
"""Seconds without progress after which another video may be read in place of one."""
TIMED_OUT, STALLED = "not read within data.decode_timeout_s", "its decoder makes no progress"
"""How the reasons of a `VideoTimeoutError` begin."""


class VideoTimeoutError(VideoError):
    """A video took longer than the time limit, or made no progress while another was read in its place."""


class VideoProcess:
    """Probes, reads and re-encodes videos in a child process, started on demand and restarted after a crash."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory = _memory_file()
        # Nothing is written to this pipe: the child learns that this process has ended when its write ends are closed.
        self._parent_pipe, self._alive = os.pipe()

    def probe(self, uri: str, timeout_s: float) -> VideoFacts:
        """Return the facts of a video; see `s5.video.reading.probe`.

        Raises:
            VideoError: it cannot be read, or the decoder crashed.
            VideoTimeoutError: it took longer than `timeout_s` seconds.
        """
        facts = self._send(VideoRequest(uri, None, timeout_s)).facts
        assert facts is not None
        return facts

    def read(
        self,
        uri: str,
        clips: ClipRequest,
        timeout_s: float,
        instead: Callable[[], bool] | None = None,
        stalled_s: float = STALLED_S,
    ) -> list[FrameArray]:
        """Return the clips of a video, each (T, S, S, 3); see `reading.read_clips`, and `probe` for the errors.

        Where it makes no progress for `stalled_s` seconds, `instead` is called, which may read another in its place and
        returns whether it has. If there is no progress meanwhile either, the video is given up: `VideoTimeoutError`.
        """
        return self._received(self._send(VideoRequest(uri, clips, timeout_s), instead, stalled_s))

    def frames(self, uri: str, frames: FramesRequest, timeout_s: float) -> FrameArray:
        """Return frames (F, S, S, 3) of a video; see `probe` for the errors.

        The child keeps the video open: a next request for later frames of it goes on where this one ends.
        """
        return self._received(self._send(VideoRequest(uri, frames, timeout_s)))[0]

    def encode(self, uri: str, encoding: EncodeRequest, timeout_s: float) -> VideoFacts:
        """Re-encode a video and return the new facts; see `encoding.encode`, and `probe` for other errors."""
        facts = self._send(VideoRequest(uri, encoding, timeout_s)).facts
        assert facts is not None
        return facts

    def close(self) -> None:
        """End the child."""
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None

    def _send(
        self, request: VideoRequest, instead: Callable[[], bool] | None = None, stalled_s: float = STALLED_S
    ) -> VideoReply:
        connection = self._connected()
        assert self._child is not None
        reply: VideoReply | None = None
        try:
            connection.send(request)
            deadline, pid = time.monotonic() + request.timeout_s, self._child.pid
            while instead and (place := stalled_at(connection, pid, deadline, stalled_s)) is not None:
                if instead() and progress_of(pid) == place and not connection.poll():
                    raise VideoTimeoutError(f"{STALLED} for {stalled_s:g} s, nor while its spare was read")
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise VideoTimeoutError(f"{TIMED_OUT}, {request.timeout_s:g} s")
            reply = connection.recv()
        except (EOFError, ConnectionError):
            raise VideoError(f"the decoder crashed ({self._exit_reason()})") from None
        finally:
            # Also when this task is interrupted: a late reply must not be taken for that of the next video.
            if reply is None:
                self.close()
        if reply.unwritable:
            raise OSError(reply.unwritable)
        if reply.reason:
            raise VideoError(reply.reason)
        return reply

    def _received(self, reply: VideoReply) -> list[FrameArray]:
        frames = [np.empty(shape, np.uint8) for shape in reply.shapes]
        with open(self._memory, "rb", closefd=False) as memory:
            memory.seek(0)
            for clip in frames:
                memory.readinto(clip.data)
        return frames

    def _connected(self) -> Connection:
        if self._connection is None:
            ours, theirs = socket.socketpair()
            handles = theirs.fileno(), self._memory, self._parent_pipe
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve{handles}"],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
            theirs.close()
            self._connection = Connection(ours.detach())
        return self._connection

    def _exit_reason(self) -> str:
        """Return how the child ended, for a message."""
        assert self._child is not None
        try:
            status = self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "its process is still running"
        return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _memory_file() -> int:
    """Return the handle of a file, in memory where the system supports it."""
    if hasattr(os, "memfd_create"):
        # Unlike multiprocessing's shared memory, not limited by /dev/shm, which is small in containers.
        return os.memfd_create("frames")
    handle, name = tempfile.mkstemp()
    os.unlink(name)
    return handle


# --- the child ------------------------------------------------------------------------------------------------------


def serve(connection_handle: int, memory_handle: int, parent_pipe: int) -> None:
    """Handle requests until the parent ends, which ends this process even in the middle of a video."""
    _exit_with(parent_pipe)
    connection = Connection(connection_handle)
    video = OpenVideo()
    with open(memory_handle, "wb") as memory:
        while True:
            try:
                request: VideoRequest = connection.recv()
            except EOFError:
                return
            # For systems whose pipes send no signal; works while a decoder holds the GIL.
            faulthandler.dump_traceback_later(request.timeout_s + GRACE_S, exit=True)
            connection.send(handle(request, memory, video))
            faulthandler.cancel_dump_traceback_later()


def _exit_with(pipe: int) -> None:
    """End this process once the pipe's write ends are closed, by SIGIO, which needs no GIL.

    Unlike Linux's parent-death signal, it is not sent when the thread ends that started this process.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(1)


class OpenVideo:
    """The video that stays open for later frames, if any."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._key: tuple[str, int, Decoder] | None = None
        self._reader: SquareReader | None = None
        self._last_s = 0.0

    def read(self, uri: str, work: FramesRequest) -> FrameArray:
        """Return frames (F, S, S, 3), opening the video unless it is open and they are behind the last ones.

        Raises:
            VideoError, OSError: they cannot be read; the video is closed.
        """
        key = uri, work.size, work.decoder
        with ExitStack() as failed:
            failed.callback(self.close)
            if self._reader is None or key != self._key or work.times_F[0] <= self._last_s:
                self.close()
                source = self._stack.enter_context(open_source(uri))
                opened = SquareReader(source, work.size, work.display_size, work.decoder)
                self._reader, self._key = self._stack.enter_context(closing(opened)), key
            frames: FrameArray = np.stack(self._reader.read(work.times_F))
            self._last_s = float(work.times_F[-1])
            failed.pop_all()
        return frames

    def close(self) -> None:
        """Close it."""
        self._reader = None
        self._stack.close()


def handle(request: VideoRequest, memory: IO[bytes], video: OpenVideo) -> VideoReply:
    """Probe, read or re-encode one video; frames go to the start of `memory`."""
    work = request.work
    try:
        if isinstance(work, FramesRequest):
            return _written([video.read(request.uri, work)], memory)
        video.close()
        with open_source(request.uri, _whole(work)) as source:
            if work is None:
                return VideoReply(facts=probe(source))
            if not isinstance(work, ClipRequest):
                return _encoded(source, work)
            clips = read_clips(source, work.clips, work.size, work.display_size, work.decoder, work.boxes)
    except (VideoError, OSError) as error:
        return VideoReply(reason=str(error))
    return _written(clips, memory)


def _written(clips: list[FrameArray], memory: IO[bytes]) -> VideoReply:
    memory.seek(0)
    for clip in clips:
        memory.write(clip.data)
    memory.flush()
    return VideoReply(shapes=[clip.shape for clip in clips])


def _encoded(source: Source, encoding: EncodeRequest) -> VideoReply:
    # Imported here: reading by decord needs no PyAV.
    from pipelines.data.decoding.encoding import encode

    try:
        return VideoReply(facts=encode(source, encoding))
    except OSError as error:
        return VideoReply(unwritable=error.strerror or str(error))


def _whole(work: ClipRequest | EncodeRequest | None) -> bool | Callable[[IO[bytes]], bool]:
    """Return whether all of a file will be read, or what says so of an open file."""
    return isinstance(work, EncodeRequest) if work else lambda file: not has_index(file)


@contextmanager
def open_source(uri: str, whole: bool | Callable[[IO[bytes]], bool] = False) -> Iterator[Source]:
    """Yield what a decoder can read; see `storage.open_video`."""
    if "://" not in uri:
        yield uri
        return
    # pyarrow takes 30 MB, and local files need none of it.
    from pipelines import storage
    from pipelines.errors import UserError

    try:
        with storage.open_video(uri, whole) as source:
            yield source if isinstance(source, str) else cast(IO[bytes], Counted(source))
    except UserError as error:
        raise VideoError(str(error)) from None
