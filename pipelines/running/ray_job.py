"""By which names Ray knows the work of this process."""

from __future__ import annotations

import sys


def ray_job() -> dict[str, str]:
    """Return `job_id`, `submission_id` of a submitted job, and `dashboard` as the cluster sees it, where they exist.

    A stage that does not use Ray has none. Processes that Ray starts for a job have those of the job.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    worker = ray._private.worker.global_worker
    found = {
        "job_id": str(ray.get_runtime_context().get_job_id()),
        "submission_id": worker.core_worker.get_job_config().metadata.get("job_submission_id", ""),
        "dashboard": f"http://{worker.node.webui_url}" if worker.node.webui_url else "",
    }
    return {name: value for name, value in found.items() if value}
