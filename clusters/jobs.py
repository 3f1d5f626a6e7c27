"""The jobs of a cluster by the ids of their runs: `python -m clusters.jobs list|status|logs|stop --address URL [RUN]`.

RUN is what `clusters.submit` calls the run, or the id of one job. Each start of a run is a job of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from clusters import connection
from pipelines.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN_ID = "run"
"""Key of a job's metadata."""
SUCCEEDED, FAILED, STOPPED = 0, 1, 130
RUN_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# --- runs and their jobs --------------------------------------------------------------------------------------------


def check_run_id(run: str) -> None:
    """Check that a run's id is a plain word: it becomes part of names of files and of addresses.

    Raises:
        UserError: it is not.
    """
    if not RUN_FORM.fullmatch(run):
        raise UserError(f"--run-id is {run!r}: give up to 64 letters, digits, dots, dashes and underscores")


def run_of(job: Any) -> str:
    """Return the run that a job is a start of; a job that `clusters.submit` did not start is its own."""
    return str((job.metadata or {}).get(RUN_ID, job.submission_id))


def all_jobs(client: JobSubmissionClient) -> list[Any]:
    """Return the jobs that were submitted to a cluster, the oldest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def jobs_of(client: JobSubmissionClient, run: str) -> list[Any]:
    """Return the jobs of a run, or the job of that id, the oldest first."""
    return [job for job in all_jobs(client) if run in (run_of(job), job.submission_id)]


def running(jobs: Sequence[Any]) -> Any:
    """Return the last of some jobs that has not ended, if any."""
    return next((job for job in reversed(jobs) if not job.status.is_terminal()), None)


# --- following ------------------------------------------------------------------------------------------------------


class Log:
    """Prints a job's log, which starts again with each connection, every character once."""

    def __init__(self) -> None:
        self.printed = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Print until the connection ends."""
        at = 0
        async for chunk in client.tail_job_logs(job):
            fresh = chunk[max(0, self.printed - at) :]
            at += len(chunk)
            self.printed = max(self.printed, at)
            print(fresh, end="", flush=True)


def follow(client: JobSubmissionClient, job: str, log: Log | None = None) -> int:
    """Print a job's log until it ends; return its exit status, 130 where it was stopped.

    Raises:
        UserError: the cluster no longer answers.
    """
    log, answered = log or Log(), time.monotonic()
    while True:
        try:
            asyncio.run(log.follow(client, job))
        except connection.failures():
            pass  # The status says whether the job or only the connection has ended.
        try:
            details = client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                return _outcome(job, details)
        except connection.failures() as error:
            if time.monotonic() - answered > connection.PATIENCE_S:
                raise UserError(f"job {job} cannot be followed: {connection.sentence(client, error)}") from None
        time.sleep(connection.POLL_S)


def _outcome(job: str, details: Any) -> int:
    if str(details.status) == "SUCCEEDED":
        print(f"[submit] job {job} succeeded")
        return SUCCEEDED
    if str(details.status) == "STOPPED":
        print(f"[submit] job {job} was stopped")
        return STOPPED
    # The rest of Ray's message repeats the end of the log.
    reason = (details.message or "").partition(", last available logs")[0].strip()
    print(f"[submit] job {job} failed: {reason}", file=sys.stderr)
    code: int = details.driver_exit_code or FAILED
    # Of a process that a signal ended, it is that signal's number below 0.
    return code if code > 0 else 128 - code


def follow_or_leave(client: JobSubmissionClient, job: str) -> int:
    """Follow a job; Ctrl-C leaves it running, and on a terminal asks first whether to stop it. Return as `follow`."""
    log = Log()
    while True:
        try:
            return follow(client, job, log)
        except KeyboardInterrupt:
            choice = _choice() if sys.stdin.isatty() else "leave"
        if choice == "leave":
            print(f"\n[submit] job {job} continues\n{commands(client.get_address(), job)}")
            return STOPPED
        if choice == "stop":
            client.stop_job(job)
            print(f"[submit] job {job} stops: it saves a checkpoint first")


def _choice() -> Literal["leave", "stop", "follow"]:
    try:
        answer = input("\n[submit] leave the job running (l), stop it (s), or go on following (Enter)? ")
    except (EOFError, KeyboardInterrupt):
        return "leave"
    return "stop" if answer.lower().startswith("s") else "leave" if answer.lower().startswith("l") else "follow"


def commands(address: str, job: str) -> str:
    """Return the lines that say how to follow and to stop a job."""
    return (
        f"[submit] follow: python -m clusters.jobs logs --address {address} {job}\n"
        f"[submit] stop:   python -m clusters.jobs stop --address {address} {job}"
    )


# --- command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for what it cannot read."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with the usage."""
        raise UserError(f"{message}; usage: {' '.join(self.format_usage().removeprefix('usage: ').split())}")


def parser() -> Parser:
    """Return the parser of the command line."""
    p = Parser(
        prog="python -m clusters.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("what", choices=("list", "status", "logs", "stop"), help="list all; or of one run status, log, end")
    p.add_argument("--address", metavar="URL", required=True, help="the cluster's dashboard, e.g. http://HOST:8265")
    p.add_argument("run", metavar="RUN", nargs="?", default="", help="id of a run or of a job; list takes none")
    return p


def run(argv: Sequence[str]) -> int:
    """Do what is asked and return the exit status; `logs` and `stop` return that of the job, as `follow`."""
    options = parser().parse_intermixed_args(argv)
    if bool(options.run) == (options.what == "list"):
        needs = "takes no RUN" if options.run else "needs a RUN, as `list` shows them"
        raise UserError(f"{options.what} {needs}: usage: {options.what} --address URL [RUN]")
    client = connection.connect(options.address)
    try:
        return _answer(client, options.what, options.run)
    except connection.failures() as error:
        raise UserError(connection.sentence(client, error)) from None


def _answer(client: JobSubmissionClient, what: str, run: str) -> int:
    jobs = jobs_of(client, run) if run else all_jobs(client)
    if run and not jobs:
        known = ", ".join(dict.fromkeys(run_of(job) for job in all_jobs(client))) or "none"
        raise UserError(f"RUN is {run!r}: the cluster has no such run; it has {known}")
    if what in ("list", "status"):
        for job in jobs:
            print(_line(job))
        return SUCCEEDED
    if what == "logs":
        return follow_or_leave(client, jobs[-1].submission_id)
    if (job := running(jobs)) is None:
        raise UserError(f"RUN is {run!r}: it does not run; job {jobs[-1].submission_id} has {_status(jobs[-1])}")
    client.stop_job(job.submission_id)
    return SUCCEEDED if follow(client, job.submission_id) == STOPPED else FAILED


def _status(job: Any) -> str:
    return str(job.status.value).lower()


def _line(job: Any) -> str:
    begun = f"{datetime.fromtimestamp((job.start_time or 0) / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return "  ".join([job.submission_id, _status(job), begun, (job.metadata or {}).get("out", "")]).rstrip()


if __name__ == "__main__":
    connection.main(run)
