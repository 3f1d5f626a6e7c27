"""Tables of population-based training: the schedule that made the best member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.plots.drawing import number
from pipelines.plots.population import Part, population_figure
from pipelines.reporting.table import Figure, Table, file_name, value_text
from pipelines.tracking.history import Run
from pipelines.tuning.trials import Objective

EPOCH, MEMBER, START = "epoch", "member", "start"
"""Parameters of a member's part: the epoch after which it ends, whose it is, and the part that it goes on from."""


def schedule_table(
    title: str, keys: Sequence[str], objective: Objective, parts: Sequence[Run], values: Mapping[str, Mapping[str, str]]
) -> list[Table]:
    """Return the table of the best member's parts, with a figure of all; nothing where none has got to the last epoch.

    Args:
        title: of the sweep.
        keys: the settings that vary.
        objective: what members are compared by.
        parts: of all members.
        values: of each part, by the run's id and the key.
    """
    end = max((_epoch(part) for part in parts), default=0)
    reached = [part for part in parts if _epoch(part) == end and objective.metric in part.metrics and part.is_finished]
    if not reached:
        return []
    sign = 1 if objective.mode == "max" else -1
    line = [max(reached, key=lambda part: sign * part.metrics[objective.metric])]
    by_folder = {part.out: part for part in parts}
    while (source := by_folder.get(line[0].params.get(START, ""))) is not None:
        line.insert(0, source)
    rows = tuple(
        (
            f"up to {_epoch(part)}",
            part.params.get(MEMBER, "").removeprefix(f"{MEMBER}="),
            *(values[part.run_id][key] for key in keys),
            value_text(objective.metric, part.metrics.get(objective.metric)),
        )
        for part in line
    )
    note = "The best member's weights were trained by these members, one after another, with these values."
    drawn = [
        Part(
            _epoch(part),
            _epoch(by_folder[start]) if (start := part.params.get(START, "")) in by_folder else 0,
            part.metrics[objective.metric],
            by_folder[start].metrics.get(objective.metric) if start in by_folder else None,
            tuple(number(values[part.run_id][key]) for key in keys),
            part in line,
        )
        for part in parts
        if objective.metric in part.metrics
    ]
    name = f"{title}: schedule of the best"
    figure = Figure(file_name(name), name, population_figure(keys, drawn, objective.metric))
    return [Table(name, ("epochs", MEMBER, *keys, objective.metric), rows, (figure,), note)]


def _epoch(part: Run) -> int:
    return int(part.params.get(EPOCH, 0))
