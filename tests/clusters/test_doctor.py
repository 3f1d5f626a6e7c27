from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from clusters import doctor
from clusters.findings import Finding, findings
from pipelines.errors import UserError
from pipelines.running.node_checks import MARK, Asked, NodeReport
from pipelines.storage import provenance

GIB = 2**30
VERSIONS = {"python": "3.11.4", "ray": "2.60.0", "torch": "2.9.0+cu128", "decord": "0.6.0"}
SOUND = NodeReport(
    name="a",
    resources={"CPU": 8, "GPU": 1, "object_store_memory": GIB},
    machine="x86_64",
    versions=VERSIONS,
    temp_dir="/tmp/ray",
    free_bytes={"disk": 50 * GIB, "memory": 8 * GIB, "shm": 2 * GIB},
    total_bytes={"disk": 100 * GIB, "memory": 16 * GIB, "shm": 2 * GIB},
    torch_gpus=1,
    clock_offset_s=0.002,
    clock_error_s=0.001,
)


def found_for(*changes: dict[str, Any], here: dict[str, str] = VERSIONS) -> list[Finding]:
    """Return the findings of a cluster of sound nodes a, b, ... that differ by these changes, and of one more node."""
    nodes = [
        replace(SOUND, **({"name": name} | change)) for name, change in zip("abcdefg", (*changes, {}), strict=False)
    ]
    return findings(nodes, Asked(store="/store"), here)


def test_nothing_is_found_on_sound_nodes() -> None:
    # How torch was built may differ, as on nodes without GPUs; so may the last part of Python's version here.
    plain = {"versions": VERSIONS | {"torch": "2.9.0+cpu"}, "torch_gpus": 0, "resources": {"CPU": 8}}
    assert found_for(plain, here=VERSIONS | {"python": "3.11.9", "torch": "2.9.0"}) == [
        Finding(
            False,
            "python is 3.11.9 here and 3.11.4 on the cluster: settings are checked with the one and run with the other",
        )
    ]
    assert found_for(plain) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"versions": VERSIONS | {"torch": "2.8.1"}}, "torch is 2.8.1 on a, 2.9.0 on b: install the packages"),
        ({"versions": {"python": "3.11.4", "ray": "2.60.0", "torch": "2.9.0"}}, "decord is missing on a, 0.6.0 on b"),
        (
            {"torch_gpus": 0, "torch_reason": "driver too old"},
            "Ray counts 1 GPUs on a and torch sees 0 (driver too old)",
        ),
        ({"errors": {"torch": "no libc"}}, "a cannot import torch (no libc): install the packages"),
        ({"errors": {"pyav": "No module named 'av'"}}, "a cannot decode with PyAV (No module named 'av'): install"),
        ({"errors": {"system": "the node died"}}, "a cannot be asked (the node died): if a package"),
        ({"errors": {"write": "No space left on device"}}, "a cannot write to --store (No space left on device): give"),
        ({"errors": {"mlflow": "it answers 403: start it"}}, "a cannot reach MLflow (it answers 403: start it)"),
        ({"unseen": "b"}, "--store '/store' is not shared: what b wrote is not there for a, and so for 1 of 2 nodes"),
        ({"clock_offset_s": -3.0}, "the clock of a is 3.0 s behind that of the job's node (to within 0.001 s): run"),
        ({"free_bytes": {"disk": 4 * GIB, "memory": 8 * GIB}}, "the disk of /tmp/ray on a has 4.0 of 100.0 GiB left"),
        ({"free_bytes": {"disk": 50 * GIB, "memory": GIB // 2}}, "the memory on a has 0.5 of 16.0 GiB left: Ray ends"),
        ({"total_bytes": {"disk": GIB, "memory": GIB, "shm": GIB // 2}}, "/dev/shm on a holds 0.50 GiB, less than"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_a_remedy(change: dict[str, Any], told: str) -> None:
    (finding,) = found_for(change)
    assert finding.fix
    assert finding.text.startswith(told)
    assert ": " in finding.text
    assert "\n" not in finding.text


def test_what_the_machine_here_has_is_compared() -> None:
    for package, fix in (("ray", True), ("python", True), ("torch", False), ("decord", False)):
        (finding,) = found_for(here=VERSIONS | {package: "1.0.0"})
        assert finding.fix == fix
        assert finding.text.startswith(f"{package} is 1.0.0 here and {VERSIONS[package].partition('+')[0]} on the")


def test_what_is_no_fault_is_not_found() -> None:
    # decord has no wheels for other machines; a slow answer says nothing of the clock.
    arm = {"machine": "aarch64", "versions": {k: v for k, v in VERSIONS.items() if k != "decord"}}
    assert found_for(arm | {"errors": {"decord": "decord is not installed"}}) == []
    assert found_for({"clock_offset_s": 30.0, "clock_error_s": 29.5}) == []
    (finding,) = found_for({"resources": {"CPU": 8}})
    assert not finding.fix
    assert "--num-gpus=1" in finding.text


def test_many_nodes_with_one_fault_are_one_finding() -> None:
    broken: dict[str, Any] = {"errors": {"pyav": "No module named 'av'"}}
    (finding,) = found_for(broken, broken, broken, broken, broken)
    assert finding.text.startswith("a, b, c and 2 more cannot decode with PyAV")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--store", "out/runs"], "--store is 'out/runs': nodes have other folders"),
        (["--video", "v.mp4"], "--video is 'v.mp4': nodes have other folders"),
        (["--store", "https://web/x"], "--store is 'https://web/x': a web server cannot be written to"),
        (["--store", "s3://key:secret@bucket"], "'s3://***@bucket' holds credentials"),
        (["--tracking-uri", "sqlite:////m.db"], "--tracking-uri is 'sqlite:////m.db': give the address"),
        (["--tracking-uri", "http://u:secret@m"], "--tracking-uri holds credentials"),
        (["--env", "S5_NOT_SET"], "--env is 'S5_NOT_SET'"),
        ([], "no Ray dashboard answers there"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        doctor.run(["--address", "http://127.0.0.1:9", *arguments])
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "Python 3.9.2 Ray 2.60.0\nTypeError: kw_only",
            "the cluster runs Ray 2.60.0 on Python 3.9.2, and this machine",
        ),
        ("Python 3.11.4 Ray 2.10.0\nTypeError: x", "the cluster runs Ray 2.10.0 on Python 3.11.4, and this machine"),
        ("x\nModuleNotFoundError: No module named 'ray'\n", "fails (ModuleNotFoundError: No module named 'ray'): the"),
        ("", "fails (it prints nothing)"),
    ],
)
def test_a_job_that_fails_says_why(log: str, told: str) -> None:
    with pytest.raises(UserError) as failed:
        doctor.read_log(log)
    assert told in str(failed.value)


def test_reports_are_read_from_the_log_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    here = provenance.versions()
    line = MARK + json.dumps([vars(SOUND) | {"write_mb_s": 12.4}])
    (read,) = doctor.read_log(f"Python {here['python']} Ray {here['ray']}\n{line}\nmore\n")
    assert read == replace(SOUND, write_mb_s=12.4)
    doctor.show([read], [], Asked(store="/store"))
    header, row, last = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()).startswith("node CPUs GPUs python ray torch decoders disk GiB")
    expected = "a 8 1 3.11.4 2.60.0 2.9.0+cu128 decord+pyav 50.0/100 8.0/16 2.0/2 +2.0±1.0 12 -"
    assert " ".join(row.split()) == expected
    assert last == "nothing to fix on 1 node"
