"""Look whether a cluster has what runs need, and say what to fix: `python -m clusters.doctor --address URL`.

A small job asks every node: versions, GPUs, decoders, room, clock, and where they are named the store (--store), the
MLflow server (--tracking-uri) and a video (--video). Exit status 0 where all is well, 1 where something is to be fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clusters import connection
from clusters.findings import GIB, Finding, findings
from clusters.jobs import FAILED, SUCCEEDED, Parser
from clusters.shipping import entrypoint, stage_code
from clusters.submit import handed_on
from pipelines import storage, tracking
from pipelines.errors import UserError
from pipelines.running import node_checks
from pipelines.running.node_checks import ASKED, CLIP, MARK, Asked, NodeReport
from pipelines.storage import provenance

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# The versions come first: they say why the rest does not run.
ENTRYPOINT = " && ".join(
    (
        entrypoint("""-c 'import platform, ray; print("Python", platform.python_version(), "Ray", ray.__version__)'"""),
        entrypoint("-m pipelines.running.cluster_report"),
    )
)
WITHOUT_UV = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"""Where the head was started by `uv run`, Ray would start each worker by it too, as `pipelines.__main__` says."""
JOB_S = 1200.0
"""Seconds that the job may take; on a sound cluster it takes half a minute."""


def check_places(asked: Asked) -> None:
    """Refuse what cannot mean the same on all nodes.

    Raises:
        UserError: names the option and the remedy.
    """
    for option, path in (("--store", asked.store), ("--video", asked.video)):
        storage.check_no_credentials(path)
        if path and not storage.is_uri(path) and not os.path.isabs(path):
            raise UserError(f"{option} is {path!r}: nodes have other folders; give an absolute path or a URI")
    if asked.store.startswith(("http://", "https://")):
        raise UserError(f"--store is {asked.store!r}: a web server cannot be written to; give s3://, gs:// or a path")
    tracking.check_without_credentials(asked.tracking_uri, "--tracking-uri")
    if asked.tracking_uri and not asked.tracking_uri.startswith(("http://", "https://")):
        raise UserError(
            f"--tracking-uri is {asked.tracking_uri!r}: give the address of an MLflow server, such as "
            "http://mlflow:5000; nodes do not share a database"
        )


# --- the job --------------------------------------------------------------------------------------------------------


def ask(client: JobSubmissionClient, asked: Asked, variables: dict[str, str]) -> list[NodeReport]:
    """Run the job and return what the nodes say.

    Raises:
        UserError: the job fails, or takes too long.
    """
    job = f"doctor-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="s5-job-") as folder:
        _stage(Path(folder), asked)
        client.submit_job(
            entrypoint=ENTRYPOINT,
            submission_id=job,
            runtime_env={"working_dir": folder, "env_vars": variables},
            metadata={"commit": provenance.commit()},
        )
    print(f"[doctor] job {job} at {client.get_address()}", file=sys.stderr, flush=True)
    end = time.monotonic() + JOB_S
    try:
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > end:
                raise UserError(f"job {job} has not ended within {JOB_S:.0f} s: see its log on the cluster's dashboard")
            time.sleep(connection.POLL_S)
    except (UserError, KeyboardInterrupt):
        client.stop_job(job)
        raise
    return read_log(client.get_job_logs(job))


def _stage(folder: Path, asked: Asked) -> None:
    """Copy what the job needs into a folder."""
    stage_code(folder)
    (folder / ASKED).write_text(json.dumps(asdict(asked)))
    (folder / CLIP).write_bytes(node_checks.make_clip())


def read_log(log: str) -> list[NodeReport]:
    """Return the reports that the job printed.

    Raises:
        UserError: it printed none; says why.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(MARK):
            return [NodeReport(**row) for row in json.loads(line.removeprefix(MARK))]
    here = provenance.versions()
    for line in lines:
        if found := re.fullmatch(r"Python (\S+) Ray (\S+)", line):
            there = {"python": found[1], "ray": found[2]}
            if there["ray"] != here["ray"] or there["python"].split(".")[:2] != here["python"].split(".")[:2]:
                raise UserError(
                    f"the cluster runs Ray {there['ray']} on Python {there['python']}, and this machine Ray "
                    f"{here['ray']} on Python {here['python']}: give both the same"
                )
    raise UserError(
        f"the job that asks the nodes fails ({lines[-1] if lines else 'it prints nothing'}): the Python that runs "
        "Ray there needs the packages of constraints.txt: install them in its environment on all nodes"
    )


# --- what is printed ------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[NodeReport], str]] = {
    "node": lambda each: each.name,
    "CPUs": lambda each: f"{each.resources.get('CPU', 0):g}",
    "GPUs": lambda each: f"{each.resources.get('GPU', 0):g}",
    "python": lambda each: each.versions.get("python", "-"),
    "ray": lambda each: each.versions.get("ray", "-"),
    "torch": lambda each: each.versions.get("torch", "-"),
    "decoders": lambda each: "+".join(name for name in ("decord", "pyav") if _works(each, name)) or "none",
    "disk GiB": lambda each: _free(each, "disk"),
    "memory GiB": lambda each: _free(each, "memory"),
    "shm GiB": lambda each: _free(each, "shm"),
    "clock ms": lambda each: (
        "-" if each.clock_offset_s is None else f"{1e3 * each.clock_offset_s:+.1f}±{1e3 * each.clock_error_s:.1f}"
    ),
    "write MB/s": lambda each: _speed(each.write_mb_s),
    "read MB/s": lambda each: _speed(each.read_mb_s),
    "mlflow": lambda each: "yes" if _works(each, "mlflow") else "no",
    "video": lambda each: "yes" if _works(each, "video") else "no",
}


def table(reports: Sequence[NodeReport], asked: Asked) -> str:
    """Return a line of each node; `free/all` where there is room to speak of."""
    left_out = {"write MB/s", "read MB/s"} if not asked.store else set()
    left_out |= ({"mlflow"} if not asked.tracking_uri else set()) | ({"video"} if not asked.video else set())
    columns = {title: cell for title, cell in COLUMNS.items() if title not in left_out}
    rows = [[*columns], *([cell(each) for cell in columns.values()] for each in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _works(each: NodeReport, question: str) -> bool:
    return not each.errors.keys() & {"system", question}


def _free(each: NodeReport, kind: str) -> str:
    if kind not in each.total_bytes:
        return "-"
    return f"{each.free_bytes[kind] / GIB:.1f}/{each.total_bytes[kind] / GIB:.0f}"


def _speed(mb_s: float | None) -> str:
    return "-" if mb_s is None else f"{mb_s:.0f}"


def show(reports: Sequence[NodeReport], found: Sequence[Finding], asked: Asked) -> None:
    """Print the table, and a line for each finding."""
    print(table(reports, asked))
    for finding in found:
        print(f"{'FIX ' if finding.fix else 'note'}  {finding.text}")
    if not any(finding.fix for finding in found):
        print(f"nothing to fix on {len(reports)} node{'s' * (len(reports) > 1)}")


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = Parser(
        prog="python -m clusters.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--address", metavar="URL", required=True, help="the cluster's dashboard, e.g. http://HOST:8265")
    p.add_argument(
        "--store", default="", metavar="PATH", help="folder of runs; each node writes and reads 64 MiB there"
    )
    p.add_argument(
        "--tracking-uri",
        default=os.environ.get(tracking.VARIABLE, ""),
        metavar="URL",
        help="the MLflow server (default: $MLFLOW_TRACKING_URI)",
    )
    p.add_argument("--video", default="", metavar="PATH", help="a video that each node reads, beside a made one")
    p.add_argument(
        *("--env", "-e"),
        metavar="NAME",
        action="append",
        default=[],
        help="hand an environment variable on to the job, such as a credential; whoever may use the cluster can read "
        "it there",
    )
    p.add_argument("--json", action="store_true", help="print what the nodes say and what is found as JSON")
    return p


def asked_by(options: argparse.Namespace) -> Asked:
    """Return what nodes are to reach."""
    return Asked(store=options.store, tracking_uri=options.tracking_uri.rstrip("/"), video=options.video)


def run(argv: Sequence[str]) -> int:
    """Ask the nodes, print what is found, and return the exit status."""
    options = parser().parse_args(argv)
    asked = asked_by(options)
    check_places(asked)
    variables = handed_on(options.env)
    client = connection.connect(options.address)
    try:
        reports = ask(client, asked, variables | WITHOUT_UV)
    except connection.failures() as error:
        raise UserError(f"the nodes were not asked: {connection.sentence(client, error)}") from None
    found = findings(reports, asked, here := provenance.versions())
    if options.json:
        rows = [asdict(each) for each in reports]
        print(json.dumps({"here": here, "nodes": rows, "findings": [each._asdict() for each in found]}, indent=2))
    else:
        show(reports, found, asked)
    return FAILED if any(finding.fix for finding in found) else SUCCEEDED


if __name__ == "__main__":
    connection.main(run)
