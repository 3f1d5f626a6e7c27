"""Run a stage as a job on a Ray cluster: `python -m clusters.submit --address URL STAGE [the stage's options]`.

The settings are checked here first; then the code and `run.json` are shipped, nothing else. The log is followed to the
terminal. Ctrl-C asks whether to stop the job or to leave it running. The same command follows a run that is going on,
and starts one again that has ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from clusters import connection, jobs
from clusters.shipping import entrypoint, stage_code
from pipelines import storage, tracking
from pipelines.command_line import parse
from pipelines.config import RUN, StageConfig, SweepConfig, to_json
from pipelines.errors import UserError
from pipelines.preflight import check_credentials, check_space, used_paths
from pipelines.storage import provenance
from pipelines.tuning import ready_spaces

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PASSED_ON = ("MLFLOW_TRACKING_URI",)
OF_THE_CLUSTER = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS")
"""Variables that the nodes have themselves."""


@dataclass(frozen=True)
class Submission:
    """What is asked of the cluster."""

    stage: str
    config: StageConfig
    env: tuple[str, ...]
    """Environment variables passed on by name."""
    cpus: float
    stop_wait_s: int
    run: str = ""
    """Id of the run; empty for one that follows from stage and --out."""

    @property
    def run_id(self) -> str:
        """Id of the run: the same for the same stage and --out."""
        out = storage.absolute(self.config.out).rstrip("/") if self.config.out else uuid.uuid4().hex
        return self.run or f"{self.stage}-{hashlib.sha256(out.encode()).hexdigest()[:8]}"

    @property
    def settings(self) -> str:
        """A digest of the settings."""
        text = json.dumps(to_json(self.stage, self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        UserError: `tracking.uri`, or the variable that stands in for it, is a relative name or none that MLflow takes.
    """
    option = "--tracking.uri" if config.tracking.uri else tracking.VARIABLE
    uri = config.tracking.uri or os.environ.get(tracking.VARIABLE, "")
    name = uri.removeprefix("sqlite:///")
    if (
        uri not in ("", "off")
        and not uri.startswith(("http", "databricks"))
        and not os.path.isabs(name)
        and (uri.startswith("sqlite:///") or not storage.is_uri(uri))
    ):
        raise UserError(
            f"{option} is {uri!r}: a job runs in another folder; give an address, or sqlite:////an/absolute/path"
        )
    if uri:
        tracking.resolve_uri(config.tracking, config.out)


def handed_on(names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that --env names; their values are never printed.

    Raises:
        UserError: one is not set here, or is one of the cluster's own.
    """
    for name in names:
        if name in OF_THE_CLUSTER:
            raise UserError(
                f"--env is {name!r}: the nodes have their own, and jobs are no place for tokens; leave it out"
            )
        if name not in os.environ:
            raise UserError(f"--env is {name!r}: there is no such environment variable here; export it or leave it out")
    return {name: os.environ[name] for name in names}


def environment(submission: Submission) -> dict[str, str]:
    """Return the job's environment variables.

    Raises:
        UserError: as `handed_on`.
    """
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return (
        passed_on
        | handed_on(submission.env)
        | {
            provenance.COMMIT_VARIABLE: provenance.commit(),
            # Ray reads it beside the driver: how long a stopped job may take before it is killed.
            "RAY_JOB_STOP_WAIT_TIME_S": str(submission.stop_wait_s),
        }
    )


# --- what is shipped ------------------------------------------------------------------------------------------------


def stage_package(submission: Submission, folder: Path) -> None:
    """Copy what the job needs into a folder: the code and run.json.

    Raises:
        UserError: it is too much.
    """
    stage_code(folder)
    storage.write_json(str(folder / RUN), to_json(submission.stage, submission.config))


def submit(client: JobSubmissionClient, submission: Submission) -> tuple[str, bool]:
    """Return the id of the run's job and whether it ran already; else ship the code and start one.

    Raises:
        UserError: the run is going on with other settings.
    """
    run = submission.run_id
    while True:
        known = jobs.all_jobs(client)
        if (job := jobs.running([job for job in known if jobs.run_of(job) == run])) is not None:
            if (job.metadata or {}).get("settings") != submission.settings:
                raise UserError(
                    f"run {run} goes on with other settings, as job {job.submission_id}: stop it first, or give "
                    "another --out or --run-id"
                )
            return job.submission_id, True
        taken = {job.submission_id for job in known}
        job_id = next(name for number in count(1) if (name := f"{run}-{number}") not in taken)
        try:
            _ship(client, submission, run, job_id)
        except RuntimeError as error:
            # Somebody was faster.
            if "already exists" not in str(error):
                raise
        else:
            return job_id, False


def _ship(client: JobSubmissionClient, submission: Submission, run: str, job_id: str) -> None:
    variables = environment(submission)
    metadata = {jobs.RUN_ID: run, "settings": submission.settings, "out": submission.config.out}
    with tempfile.TemporaryDirectory(prefix="s5-job-") as folder:
        stage_package(submission, Path(folder))
        client.submit_job(
            entrypoint=entrypoint(f"-m pipelines {submission.stage} --config {RUN}"),
            submission_id=job_id,
            runtime_env={"working_dir": folder, "env_vars": variables},
            metadata=metadata | {"commit": variables[provenance.COMMIT_VARIABLE]},
            entrypoint_num_cpus=submission.cpus,
        )


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> jobs.Parser:
    """Return the parser of the options that stand before STAGE."""
    p = jobs.Parser(
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
    p.add_argument("--run-id", metavar="NAME", help="name of the run (default: one that follows from stage and --out)")
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
    if options.run_id is not None:
        jobs.check_run_id(options.run_id)
    name, config = parse(options.stage)
    if isinstance(config, SweepConfig):
        # A file of a space is read here: the job gets what it says.
        config = ready_spaces.resolved(config)
        check_space(config)
    check_credentials(config)
    check_paths(config)
    check_tracking(config)
    submission = Submission(name, config, tuple(options.env), options.cpus, options.stop_wait, options.run_id or "")
    environment(submission)
    client = connection.connect(options.address)
    try:
        job, is_attached = submit(client, submission)
    except connection.failures() as error:
        raise UserError(f"the job was not submitted: {connection.sentence(client, error)}") from None
    print(f"[submit] job {job} at {options.address}{' runs already' if is_attached else ''}", flush=True)
    if options.no_wait:
        print(jobs.commands(options.address, job))
        return jobs.SUCCEEDED
    return jobs.follow_or_leave(client, job)


if __name__ == "__main__":
    connection.main(run)
