"""Run a stage as a job on a Ray cluster: `python -m clusters.submit --address URL STAGE [the stage's options]`.

The settings are checked here first; then the code and `run.json` are shipped, nothing else. The log is followed to the
terminal. Ctrl-C leaves the job running and says how to follow or stop it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clusters import connection
from pipelines import storage
from pipelines.command_line import parse
from pipelines.config import RUN, StageConfig, to_json
from pipelines.errors import UserError
from pipelines.preflight import check_credentials, used_paths
from pipelines.storage import provenance

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).parent.parent
CODE = ("s5", "pipelines", "clusters")
PASSED_ON = ("MLFLOW_TRACKING_URI",)
STOPPED = 130
SUCCEEDED, FAILED = 0, 1


@dataclass(frozen=True)
class Submission:
    """What is asked of the cluster."""

    stage: str
    config: StageConfig
    env: tuple[str, ...]
    """Environment variables passed on by name."""
    cpus: float
    stop_wait_s: int


# --- checks ---------------------------------------------------------------------------------------------------------


def check_paths(config: StageConfig) -> None:
    """Refuse local paths that mean something only in this folder.

    Raises:
        UserError: a setting names a relative path.
    """
    for key, (value, _) in used_paths(config).items():
        if not storage.is_uri(value) and not os.path.isabs(value):
            raise UserError(
                f"--{key} is {value!r}: a job runs in another folder on another machine; "
                "give an absolute path on shared storage or a URI"
            )


def check_tracking(config: StageConfig) -> None:
    """Refuse a tracking database that a job would make in a folder of its own.

    Raises:
        UserError: `tracking.uri` is a relative name.
    """
    uri = config.tracking.uri
    name = uri.removeprefix("sqlite:///")
    if (
        uri not in ("", "off")
        and not uri.startswith(("http", "databricks"))
        and not os.path.isabs(name)
        and (uri.startswith("sqlite:///") or not storage.is_uri(uri))
    ):
        raise UserError(
            f"--tracking.uri is {uri!r}: a job runs in another folder; give an address, or sqlite:////an/absolute/path"
        )


def environment(submission: Submission) -> dict[str, str]:
    """Return the job's environment variables; values of `--env` are never printed.

    Raises:
        UserError: a variable named with --env is not set here.
    """
    for name in submission.env:
        if name not in os.environ:
            raise UserError(f"--env is {name!r}: there is no such environment variable here; export it or leave it out")
    names = [name for name in (*PASSED_ON, *submission.env) if name in os.environ]
    return {name: os.environ[name] for name in names} | {
        provenance.COMMIT_VARIABLE: provenance.commit(),
        # Ray reads it beside the driver: how long a stopped job may take before it is killed.
        "RAY_JOB_STOP_WAIT_TIME_S": str(submission.stop_wait_s),
    }


# --- what is shipped ------------------------------------------------------------------------------------------------


def stage_package(submission: Submission, folder: Path) -> None:
    """Copy what the job needs into a folder: the Python files of the code, pyproject.toml and run.json."""
    for package in CODE:
        for source in sorted((ROOT / package).rglob("*.py")):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if (ROOT / "pyproject.toml").is_file():
        shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    storage.write_json(str(folder / RUN), to_json(submission.stage, submission.config))


def submit(client: JobSubmissionClient, submission: Submission) -> str:
    """Ship the code and start the job; return its id."""
    variables = environment(submission)
    job = f"{submission.stage}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="s5-job-") as folder:
        stage_package(submission, Path(folder))
        client.submit_job(
            entrypoint=f"python -m pipelines {submission.stage} --config {RUN}",
            submission_id=job,
            runtime_env={"working_dir": folder, "env_vars": variables},
            metadata={"out": submission.config.out, "commit": variables[provenance.COMMIT_VARIABLE]},
            entrypoint_num_cpus=submission.cpus,
        )
    return job


# --- the log --------------------------------------------------------------------------------------------------------


class _Log:
    """Prints a job's log, which starts again with each connection, every character once."""

    def __init__(self) -> None:
        self.printed = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        at = 0
        async for chunk in client.tail_job_logs(job):
            fresh = chunk[max(0, self.printed - at) :]
            at += len(chunk)
            self.printed = max(self.printed, at)
            print(fresh, end="", flush=True)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log until it ends; return 0 where it succeeded, 1 where it failed, 130 where it was stopped.

    Raises:
        UserError: the cluster no longer answers.
    """
    log, answered = _Log(), time.monotonic()
    while True:
        try:
            asyncio.run(log.follow(client, job))
        except connection.failures():
            pass  # The status says whether the job or only the connection has ended.
        try:
            details = client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                return _outcome(job, str(details.status), details.message or "")
        except connection.failures() as error:
            if time.monotonic() - answered > connection.PATIENCE_S:
                raise UserError(f"job {job} cannot be followed: {connection.sentence(client, error)}") from None
        time.sleep(connection.POLL_S)


def _outcome(job: str, status: str, message: str) -> int:
    if status == "SUCCEEDED":
        print(f"[submit] job {job} succeeded")
        return SUCCEEDED
    if status == "STOPPED":
        print(f"[submit] job {job} was stopped")
        return STOPPED
    # The rest of Ray's message repeats the end of the log.
    print(f"[submit] job {job} failed: {message.partition(', last available logs')[0].strip()}", file=sys.stderr)
    return FAILED


def commands(address: str, job: str) -> str:
    """Return the lines that say how to follow and to stop a job."""
    ray = f"{connection.auth_prefix()}ray job"
    return (
        f"[submit] follow: {ray} logs --follow --address {address} {job}\n"
        f"[submit] stop:   {ray} stop --address {address} {job}"
    )


# --- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.format_usage().removeprefix('usage: ').strip()}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options that stand before STAGE."""
    p = _Parser(
        prog="python -m clusters.submit",
        usage="%(prog)s --address URL [options] STAGE [the stage's options, as for python -m pipelines]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--address", metavar="URL", required=True, help="the cluster's dashboard, e.g. http://HOST:8265")
    p.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    p.add_argument(
        *("--env", "-e"),
        metavar="NAME",
        action="append",
        default=[],
        help="hand an environment variable on to the job, such as a credential; whoever may use the cluster can read "
        "it there. MLFLOW_TRACKING_URI is passed on anyway",
    )
    p.add_argument(
        "--cpus",
        type=float,
        default=0,
        metavar="N",
        help="CPUs held for the driver, which only coordinates; they are lost to training and decoding (default: 0)",
    )
    p.add_argument(
        "--stop-wait",
        type=int,
        default=60,
        metavar="SECONDS",
        help="time that the job has to end by itself once it is stopped (default: 60)",
    )
    p.add_argument("stage", metavar="STAGE ...", nargs=argparse.REMAINDER, help="stage and its options")
    return p


def run(argv: Sequence[str]) -> int:
    """Check, submit and follow; return the exit status."""
    p = parser()
    options = p.parse_args(argv)
    if not options.stage:
        p.error("there is no STAGE")
    if not options.cpus >= 0:
        raise UserError(f"--cpus is {options.cpus:g}: give 0 or more")
    if options.stop_wait < 1:
        raise UserError(f"--stop-wait is {options.stop_wait}: give at least 1 second")
    name, config = parse(options.stage)
    check_credentials(config)
    check_paths(config)
    check_tracking(config)
    submission = Submission(name, config, tuple(options.env), options.cpus, options.stop_wait)
    environment(submission)
    client = connection.connect(options.address)
    try:
        job = submit(client, submission)
    except connection.failures() as error:
        raise UserError(f"the job was not submitted: {connection.sentence(client, error)}") from None
    print(f"[submit] job {job} at {options.address}", flush=True)
    if options.no_wait:
        print(commands(options.address, job))
        return SUCCEEDED
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        print(f"\n[submit] job {job} continues\n{commands(options.address, job)}")
        return STOPPED


def main() -> None:
    """Run the command line."""
    logging.disable(logging.INFO)  # Ray's client tells each of its steps.
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
