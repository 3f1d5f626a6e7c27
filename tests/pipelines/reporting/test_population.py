"""What a report says of population-based training."""

from __future__ import annotations

from pipelines.reporting.by_sweep import sweep_tables
from pipelines.tracking.history import Run
from tests.pipelines.reporting.study import a_run

RATES = {("a", 1): 0.1, ("b", 1): 0.5, ("c", 1): 0.01, ("a", 2): 0.1, ("b", 2): 0.08, ("c", 2): 0.01}
REACHED = {("a", 1): 0.5, ("b", 1): 0.1, ("c", 1): 0.3, ("a", 2): 0.6, ("b", 2): 0.7, ("c", 2): 0.4}


def population(*, mode: str = "max", lost: tuple[tuple[str, int], ...] = ()) -> list[Run]:
    """Three members over two epochs; after the first, b takes over a."""
    about = {"search": "pbt", "space": '["optim.lr=loguniform(1e-3,1)"]'}
    objective = {"objective.metric": "val/accuracy", "objective.mode": mode}
    runs = [a_run("sweep", "sweep", params=about | objective)]
    for (member, epoch), rate in RATES.items():
        source = "a" if member == "b" else member
        params = {"trial.optim.lr": f"{rate:g}", "length": "2epochs" if epoch == 2 else "1of2epochs"}
        params |= {"member": f"member={member}", "epoch": str(epoch)}
        params |= {"start": f"/study/sweep/{source}1" if epoch > 1 else "", "seed": "0"}
        done = (member, epoch) not in lost
        metrics = {"val/accuracy": REACHED[member, epoch]} if done else {}
        status = "FINISHED" if done else "FAILED"
        out = f"sweep/{member}{epoch}"
        runs.append(a_run("trial", out, params=params, metrics=metrics, parent_run="sweep", status=status))
    return runs


def test_the_schedule_is_that_of_the_weights_of_the_best_member() -> None:
    trials, schedule = sweep_tables(population())
    assert [row[0] for row in trials.rows] == ["0.08", "0.1", "0.01"]
    assert not trials.figures
    assert schedule.header == ("epochs", "member", "optim.lr", "val/accuracy")
    assert schedule.rows == (("up to 1", "a", "0.1", "0.500"), ("up to 2", "b", "0.08", "0.700"))
    (figure,) = schedule.figures
    assert figure.drawing.png.startswith(b"\x89PNG")
    assert "mathdefault" not in figure.drawing.svg


def test_the_best_of_errors_is_the_lowest() -> None:
    _, schedule = sweep_tables(population(mode="min"))
    assert [row[1] for row in schedule.rows] == ["c", "c"]


def test_members_that_were_lost_are_left_out() -> None:
    _, schedule = sweep_tables(population(lost=(("b", 2), ("c", 1))))
    assert [row[1] for row in schedule.rows] == ["a", "a"]
    assert len(sweep_tables(population(lost=(("a", 2), ("b", 2), ("c", 2))))) == 1
