"""A registered model is champion where it is due, runs without this repository, and is read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import s5
from pipelines import tracking
from pipelines.config import EvaluateConfig, TrackingConfig, override
from pipelines.errors import StageError, UserError
from pipelines.running import registered
from pipelines.tracking.registry import Evaluated, _logging_to, register, registered_checkpoint
from s5.checkpoints.checkpoint import Meta, digest
from tests.s5.evaluation.test_prediction import trained
from tests.s5.videos import write_coded

ALONE = """
import sys, json, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/videos@champion")
found = model.predict(pd.DataFrame({"video": sys.argv[2:]}))
import s5
print(json.dumps({"rows": found.to_dict("records"), "s5": s5.__file__, "ours": "pipelines" in sys.modules}))
"""


def test_the_better_model_is_champion_and_runs_alone(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "checkpoints")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = tracking.start(config, stage="evaluate", out=str(tmp_path / "evaluate"), params={})

    def registering(value: float, manifest: str = "m", larger: bool = True, name: str = "videos") -> str:
        on = {"manifest": manifest, "metric": "test/accuracy"}
        return register(tracker.uri, tracker.run_id, name, checkpoint, Evaluated(on, value, larger))

    assert registering(0.5).endswith("version 1 is registered and is the first champion: test/accuracy 0.5")
    assert registering(0.5).endswith("test/accuracy 0.5 against 0.5 of version 1, the champion, which stays")
    assert "version 3 is registered and is champion now: test/accuracy 0.6 against 0.5" in registering(0.6)
    assert "not compared with version 3, the champion: its manifest is 'm', not 'n'" in registering(0.9, "n")
    assert "is champion now" in (registering(0.4, larger=False, name="e") and registering(0.3, larger=False, name="e"))
    tracker.finish("FINISHED")
    assert tracking.VARIABLE not in os.environ

    with registered_checkpoint("models:/videos@champion", config, str(tmp_path)) as folder:
        assert digest(folder) == digest(checkpoint)
        assert not (folder / "optimizer.safetensors").exists()
    with (
        pytest.raises(UserError, match=r"checkpoint is 'models:/none@champion': MLflow at sqlite.* has no such model"),
        registered_checkpoint("models:/none@champion", config, str(tmp_path)),
    ):
        pass

    video = write_coded(tmp_path / "a.mp4", frames=86, fps=4)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ALONE, config.uri, video, "gone.mp4"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = found["rows"]
    expected = s5.load_model(checkpoint).predict(video)
    assert first["label"] == expected.label
    assert first["probability"] == pytest.approx(expected.probability, abs=1e-5)
    assert len(json.loads(first["over_time"])) == len(expected.over_time) == 6
    assert (second["label"], second["reason"]) == (None, "file not found")
    assert found["s5"].endswith("code/s5/__init__.py")
    assert not found["ours"]


def test_a_model_of_another_architecture(tmp_path: Path) -> None:
    import mlflow

    script = tmp_path / "other.py"
    script.write_text(
        "from mlflow.models import set_model\nfrom mlflow.pyfunc import PythonModel\n"
        "class Other(PythonModel):\n    def predict(self, context, model_input, params=None):\n        return 1\n"
        "set_model(Other())\n"
    )
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = tracking.start(config, stage="evaluate", out=str(tmp_path / "evaluate"), params={})
    with _logging_to(tracker.uri), mlflow.start_run(run_id=tracker.run_id):
        mlflow.pyfunc.log_model(name="model", python_model=str(script), registered_model_name="other")
    tracker.finish("FINISHED")
    with (
        pytest.raises(UserError, match="is of another architecture, it holds no checkpoint of s5"),
        registered_checkpoint("models:/other/1", config, str(tmp_path)),
    ):
        pass


def test_what_cannot_be_registered_says_so(tmp_path: Path) -> None:
    config = override(EvaluateConfig(), {"register": "videos", "tracking.uri": "off"})
    with pytest.raises(UserError, match=r"register is 'videos': tracking.uri is 'off'"):
        registered.check(config, Meta(kind="class", step=1, model={}))
    with pytest.raises(UserError, match="register is 'videos': a pretrained encoder predicts nothing"):
        registered.check(config, Meta(kind="lsmcl", step=1, model={}))
    with pytest.raises(StageError, match="does not answer, so the model is not registered"):
        register("http://nowhere", None, "videos", tmp_path, Evaluated({}, 0.0, True))


def test_a_result_that_is_no_number_makes_no_champion(tmp_path: Path) -> None:
    tested = Evaluated({"metric": "test/mse"}, float("nan"), larger_is_better=False)
    with pytest.raises(StageError, match="not registered: its test/mse is nan"):
        register("sqlite:///a.db", "run", "model", tmp_path, tested)
