"""What every stage does around its work: run.json, result.json, the tracked run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import storage
from pipelines.command_line import parse
from pipelines.config import EvaluateConfig, FinetuneConfig, PretrainConfig, TrackingConfig, override
from pipelines.errors import StageError, StoppedError, UserError
from pipelines.running.stage import finished, stage_run
from pipelines.tracking.history import read_runs
from s5.errors import Failure


def pretraining(out: Path, uri: str = "off") -> PretrainConfig:
    return PretrainConfig(out=str(out), tracking=TrackingConfig(uri=uri))


def test_result_says_what_was_done_and_with_what(tmp_path: Path) -> None:
    config = pretraining(tmp_path / "out")
    with stage_run("pretrain", config) as stage:
        stage.metrics["train/loss"] = 0.5
        stage.counts["videos"] = 3
        stage.details["checkpoint"] = "somewhere"
    result = storage.read_json(str(tmp_path / "out" / "result.json"))
    assert result == stage.result
    assert (result["metrics"], result["counts"]) == ({"train/loss": 0.5}, {"videos": 3})
    assert {"torch", "ray", "mlflow", "python"} <= result["versions"].keys()
    assert result["commit"] != ""
    assert result["config"]["optim"]["lr"] == config.optim.lr
    assert finished("pretrain", config) == result


def test_a_failed_run_leaves_no_result_of_an_earlier_one(tmp_path: Path) -> None:
    config = EvaluateConfig(out=str(tmp_path / "out"), tracking=TrackingConfig(uri="off"))
    with stage_run("evaluate", config):
        pass
    with pytest.raises(StageError), stage_run("evaluate", config):
        raise StageError("no")
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (StageError("no"), "FAILED"), (StoppedError("stopped", 130), "KILLED")]
)
def test_mlflow_learns_how_a_run_ended(tmp_path: Path, error: Exception | None, status: str) -> None:
    uri = f"sqlite:///{tmp_path}/runs.db"
    config = pretraining(tmp_path / "out", uri)
    if error is None:
        with stage_run("pretrain", config):
            pass
    else:
        with pytest.raises(StageError), stage_run("pretrain", config):
            raise error
    (run,) = read_runs(uri, "s5")
    assert (run.status, run.stage, run.out) == (status, "pretrain", str(tmp_path / "out"))


def test_a_folder_belongs_to_one_stage(tmp_path: Path) -> None:
    with stage_run("pretrain", pretraining(tmp_path / "out")):
        pass
    config = EvaluateConfig(out=str(tmp_path / "out"), tracking=TrackingConfig(uri="off"))
    with (
        pytest.raises(UserError, match="holds a run of stage 'pretrain': give another folder"),
        stage_run("evaluate", config),
    ):
        pass
    assert storage.read_json(str(tmp_path / "out" / "run.json"))["stage"] == "pretrain"


def test_other_settings_or_inputs_are_refused_once_something_is_trained(tmp_path: Path) -> None:
    config = pretraining(tmp_path / "out")
    other = override(config, {"optim.lr": 0.5})
    inputs = {"manifest": "a"}
    with pytest.raises(StageError), stage_run("pretrain", config, inputs=inputs):
        raise StageError("before the first checkpoint")
    assert finished("pretrain", other, inputs) is None
    (tmp_path / "out" / "checkpoints").mkdir()
    assert finished("pretrain", config, inputs) is None
    with pytest.raises(UserError, match=r"holds a run with optim.lr 0.00015, not 0.5: give another --out"):
        finished("pretrain", other, inputs)
    with pytest.raises(UserError, match="holds a run on another manifest"):
        finished("pretrain", config, {"manifest": "b"})
    assert finished("pretrain", override(config, {"scale.num_workers": 2, "loop.log_every": 1}), inputs) is None


def test_a_run_without_a_choice_had_what_was_before(tmp_path: Path) -> None:
    config = FinetuneConfig(out=str(tmp_path / "out"), tracking=TrackingConfig(uri="off"))
    with stage_run("finetune", config):
        pass
    path = str(tmp_path / "out" / "run.json")
    saved = storage.read_json(path)
    del saved["model"]["decoder"]["selection"]["noise"]
    storage.write_json(path, saved)
    assert finished("finetune", override(config, {"model.decoder.selection.noise": "training"}), {}) is not None
    with pytest.raises(UserError, match=r"a run with model.decoder.selection.noise 'training', not 'always'"):
        finished("finetune", config, {})


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Its run.json lacks settings that came later: it had what is their default."""
    config = pretraining(tmp_path / "out")
    with stage_run("pretrain", config):
        pass
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "out" / "result.json").unlink()
    path = str(tmp_path / "out" / "run.json")
    saved = storage.read_json(path)
    del saved["features"], saved["lsmcl"]["mask_on"]
    # Colour jitter was the only view.
    saved["lsmcl"]["jitter"] = saved.pop("views")["jitter"]
    storage.write_json(path, saved)
    assert finished("pretrain", config, {}) is None
    with pytest.raises(UserError, match=r"holds a run with lsmcl.mask_on 'patches', not 'tokens'"):
        finished("pretrain", override(config, {"lsmcl.mask_on": "tokens"}), {})
    with pytest.raises(UserError, match=r"holds a run with views.flip 0.0, not 0.5"):
        finished("pretrain", override(config, {"views.flip": 0.5}), {})
    assert parse(["pretrain", "--config", path])[1] == config
    saved["lsmcl"]["jitter"] = 0.1
    storage.write_json(path, saved)
    assert parse(["pretrain", "--config", path])[1] == override(config, {"views.jitter": 0.1})
    with pytest.raises(UserError, match=r"holds a run with views.jitter 0.1, not 0.4"):
        finished("pretrain", config, {})


@pytest.mark.parametrize("uri", ["file:runs", "sqlite:////dev/null/runs.db"])
def test_a_store_that_cannot_be_used_is_said_at_once(tmp_path: Path, uri: str) -> None:
    config = pretraining(tmp_path / "out", uri)
    with pytest.raises(UserError, match=r"tracking.uri"), stage_run("pretrain", config):
        pytest.fail("the stage ran")


def test_damaged_run_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"holds a damaged run.json"):
        finished("pretrain", pretraining(tmp_path))


def test_rejects_are_listed_once_and_survive_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pretraining(tmp_path / "out")
    first, second = (Failure(name, f"{name}.mp4", "truncated") for name in "ab")
    with stage_run("pretrain", config) as stage:
        stage.reject([first, first])
        stage.reject([first])
    with stage_run("pretrain", config) as stage:
        stage.load_rejects()
        stage.reject([second, first])
    rows = storage.read_table(str(tmp_path / "out" / "rejects.parquet")).to_pylist()
    assert [row["video_id"] for row in rows] == ["a", "b"]
    assert capsys.readouterr().out.count("cannot read 'a': truncated") == 1


def test_writes_are_whole_or_not_at_all(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "file.json")
    storage.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(path, {1j: 1})
    assert storage.read_json(path) == {"a": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file.json"]
