"""What the errors that Ray Train reports of a worker are taken for."""

from __future__ import annotations

import socket

import pytest
import ray
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from pipelines.training.controller import REASON_CHARACTERS, classify, node_answers
from pipelines.training.failure_policy import Loss

PROCESS_DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage"
)


def died(message: str, **context: object) -> Exception:
    """Return what Ray Train reports where a health check meets a dead actor."""
    cause = ray.exceptions.ActorDiedError(
        ActorDiedErrorContext(actor_id=b"\x01" * 16, class_name="RayTrainWorker", error_message=message, **context)
    )
    return WorkerHealthCheckFailedError("A worker health check failed.", cause)


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (died(PROCESS_DIED), Loss("died", "Worker unexpectedly exits with a connection error code 2. End of file")),
        (died(f"Worker exit detail: {'x' * 1000}"), Loss("died", "x" * REASON_CHARACTERS)),
        (died("The actor died because its node has died."), Loss("node", "")),
        (
            died("gone", node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)),
            Loss("node", ""),
        ),
        (ray.exceptions.ActorUnavailableError("the connection was reset", None), Loss("node", "")),
        (
            WorkerHealthCheckTimeoutError("A worker health check has been hanging for 90 seconds."),
            Loss("unresponsive", "no answer to Ray Train's health check"),
        ),
        (
            RuntimeError("a traceback\n\nconnection reset by peer\n"),
            Loss("raised", "RuntimeError: connection reset by peer"),
        ),
        (KeyError(), Loss("raised", "KeyError")),
    ],
)
def test_errors_are_classified(error: Exception, loss: Loss) -> None:
    found = classify(error)
    assert found.kind == loss.kind
    # The loss of a node is explained by its kind alone.
    if loss.kind != "node":
        assert found.reason == loss.reason


def test_a_lost_node_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeID": "a", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        monkeypatch.setattr(ray, "nodes", lambda: [node])
        assert node_answers("a")
        assert not node_answers("b"), "a node that the cluster does not know"
    assert not node_answers("a")
