"""Who does what on a cluster: workers that train, CPUs that decode for them, and which of the two limits the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pipelines.config import FinetuneConfig, PretrainConfig
from pipelines.recipes.costs import Cost
from pipelines.recipes.rates import Node


def roles(config: PretrainConfig | FinetuneConfig, cost: Cost, node: Node) -> Iterator[str]:
    """Yield lines that say how many decode tasks training needs and has, the clips per second, and what limits them.

    Each worker is taken to be alone on such a node; decode tasks have the CPUs that it leaves, as
    `running.resources.place_workers` shares them out.

    Args:
        config: settings of the stage.
        cost: of the stage, by the node's rates.
        node: a machine whose rates were measured.
    """
    workers, data = config.scale.world_size, config.data
    if not cost.device_s or not cost.clips:
        return
    alone = cost.clips / cost.device_s
    head = f"{workers:,} worker{'s' * (workers > 1)}, each on a node of its own with {node.description}:"
    if not cost.decode_s:
        yield f"{head} ~{workers * alone:,.1f} clips/s by the model, from cached features"
        return
    if node.shared_cores:
        rate = workers * cost.clips / (cost.device_s + cost.decode_s / node.cores)
        share = cost.device_s / (cost.device_s + cost.decode_s / node.cores)
        yield f"{head} ~{rate:,.1f} clips/s, {share:.0%} of the time for the model and the rest for decoding"
        return
    needed = math.ceil(workers * cost.decode_s / cost.device_s)
    left = workers * int((node.cores - config.scale.cpus_per_worker) / data.cpus_per_decode + 1e-6)
    tasks = min(left, data.decode_tasks or left)
    rate = min(workers * alone, tasks * cost.clips / cost.decode_s)
    yield f"{head} ~{rate:,.1f} clips/s, limited by {'the model' if tasks >= needed else 'decoding'}"
    yield (
        f"decoding for the model's ~{workers * alone:,.1f} clips/s needs ~{needed:,} tasks, {needed / workers:.1f} for "
        f"each worker; the CPUs that workers leave hold {left:,}"
        + (f", --data.decode-tasks allows {tasks:,}" * (tasks < left))
    )
    if tasks < needed:
        more = math.ceil((needed - tasks) * data.cpus_per_decode)
        yield f"it takes ~{more:,} CPUs more to keep the model busy, on nodes without GPUs; or `transcode` first"
