"""A child process that probes, reads and encodes videos, so that a decoder that hangs or crashes costs one video, not
the task.

decord can spin for ever without letting go of Python's lock (decord issue 373): only the end of its process helps. The
child takes one video at a time, starts in 0.3 s, and holds neither torch nor Ray. Its frames come back through a file
in memory.

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
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import IO

import numpy as np

from pipelines.data.video_requests import Clips, Encoding, VideoReply, VideoRequest
from s5.errors import VideoError
from s5.video.reader import FrameArray, Source
from s5.video.reading import VideoFacts, probe, read_clips

GRACE_S = 5.0
"""Seconds after the time limit at which a child whose parent has gone ends itself."""


class VideoTimeoutError(VideoError):
    """A video took longer than the time limit."""


class VideoProcess:
    """Probes and reads videos in a child process, which starts when it is needed and again after one was lost."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory = _memory_file()
        # Nothing is sent: that all of its writing ends are closed tells the child that this process has gone.
        self._parent_gone, self._alive = os.pipe()

    def probe(self, uri: str, timeout_s: float) -> VideoFacts:
        """Return the facts of a video; see `s5.video.reading.probe`.

        Raises:
            VideoError: it cannot be read, or the decoder crashed.
            VideoTimeoutError: there are no facts after `timeout_s` seconds.
        """
        facts = self._ask(VideoRequest(uri, None, timeout_s)).facts
        assert facts is not None
        return facts

    def read(self, uri: str, clips: Clips, timeout_s: float) -> list[FrameArray]:
        """Return the clips of a video, each (T, S, S, 3); see `reading.read_clips`, and `probe` for the errors."""
        shapes = self._ask(VideoRequest(uri, clips, timeout_s)).shapes
        frames = [np.empty(shape, np.uint8) for shape in shapes]
        with open(self._memory, "rb", closefd=False) as memory:
            memory.seek(0)
            for clip in frames:
                memory.readinto(clip.data)
        return frames

    def encode(self, uri: str, encoding: Encoding, timeout_s: float) -> VideoFacts:
        """Re-encode a video and return the new facts; see `encoding.encode`, and `probe` for the other errors."""
        facts = self._ask(VideoRequest(uri, encoding, timeout_s)).facts
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

    def _ask(self, question: VideoRequest) -> VideoReply:
        connection = self._started()
        answer: VideoReply | None = None
        try:
            connection.send(question)
            if not connection.poll(question.timeout_s):
                raise VideoTimeoutError(f"not read within data.decode_timeout_s, {question.timeout_s:g} s")
            answer = connection.recv()
        except (EOFError, ConnectionError):
            raise VideoError(f"the decoder crashed ({self._end()})") from None
        finally:
            # Also where this task is interrupted: the child's answer must not be taken for that of the next video.
            if answer is None:
                self.close()
        if answer.unwritable:
            raise OSError(answer.unwritable)
        if answer.reason:
            raise VideoError(answer.reason)
        return answer

    def _started(self) -> Connection:
        if self._connection is None:
            ours, theirs = socket.socketpair()
            handles = theirs.fileno(), self._memory, self._parent_gone
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve{handles}"],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
            theirs.close()
            self._connection = Connection(ours.detach())
        return self._connection

    def _end(self) -> str:
        """Return how the child ended, in words."""
        assert self._child is not None
        try:
            status = self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "its process continues"
        return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _memory_file() -> int:
    """Return the handle of a file that is in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        # Unlike multiprocessing's shared memory, not bounded by the size of /dev/shm, which containers keep small.
        return os.memfd_create("frames")
    handle, name = tempfile.mkstemp()
    os.unlink(name)
    return handle


# --- the child ------------------------------------------------------------------------------------------------------


def serve(connection_handle: int, memory_handle: int, parent_gone: int) -> None:
    """VideoReply until the parent has gone, which ends this process also in the middle of a video."""
    _end_with(parent_gone)
    connection = Connection(connection_handle)
    with open(memory_handle, "wb") as memory:
        while True:
            try:
                question: VideoRequest = connection.recv()
            except EOFError:
                return
            # For systems whose pipes send no signal; works while a decoder holds Python's lock.
            faulthandler.dump_traceback_later(question.timeout_s + GRACE_S, exit=True)
            connection.send(answered(question, memory))
            faulthandler.cancel_dump_traceback_later()


def _end_with(pipe: int) -> None:
    """End this process once the pipe's writing ends are closed, by SIGIO, which does not wait for Python's lock.

    Unlike Linux' signal at the parent's death, it does not come when the thread ends that started this process.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(1)


def answered(question: VideoRequest, memory: IO[bytes]) -> VideoReply:
    """Probe, read or encode one video; frames that are read go to the start of `memory`."""
    work = question.work
    try:
        with opened(question.uri, whole=not isinstance(work, Clips)) as source:
            if work is None:
                return VideoReply(facts=probe(source))
            if not isinstance(work, Clips):
                return _encoded(source, work)
            clips = read_clips(source, work.clips, work.size, work.display_size, work.decoder)
    except (VideoError, OSError) as error:
        return VideoReply(reason=str(error))
    memory.seek(0)
    for clip in clips:
        memory.write(clip.data)
    memory.flush()
    return VideoReply(shapes=[clip.shape for clip in clips])


def _encoded(source: Source, encoding: Encoding) -> VideoReply:
    # Only here: PyAV's import is not needed to read by decord.
    from pipelines.data.encoding import encode

    try:
        return VideoReply(facts=encode(source, encoding))
    except OSError as error:
        return VideoReply(unwritable=error.strerror or str(error))


@contextmanager
def opened(uri: str, whole: bool) -> Iterator[Source]:
    """Give what a decoder can read of a name; see `storage.opened`."""
    if "://" not in uri:
        yield uri
        return
    # pyarrow takes 30 MB, which local files do not need.
    from pipelines import storage
    from pipelines.errors import UserError

    try:
        with storage.opened(uri, whole) as source:
            yield source
    except UserError as error:
        raise VideoError(str(error)) from None
