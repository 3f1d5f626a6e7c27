"""The program of a registered model, which MLflow stores with it and runs wherever the model is loaded.

Beside MLflow it needs the package `s5`, which is stored too, and the checkpoint. A row of the input is the path of a
video (column `video`); the output has a row for each.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]

import s5
from s5.errors import VideoError


class ServedModel(PythonModel):
    """Predicts videos by their paths."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint, onto a GPU where there is one."""
        self.trained = s5.load_model(context.artifacts["checkpoint"])
        self.trained.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return label and probability, or the value, of each video and, as JSON, over time; or why there are none."""
        # Else pandas would write NaN, which JSON lacks, for what a row lacks.
        return pd.DataFrame([self.row(str(video)) for video in model_input["video"]], dtype=object)

    def row(self, video: str) -> dict[str, Any]:
        """Return the output of one video."""
        empty = {"label": None, "probability": None, "value": None, "seconds": None, "over_time": "[]", "reason": None}
        try:
            found = self.trained.predict(video)
        except VideoError as error:
            return {"video": video, **empty, "reason": str(error)}

        def said(part: Any) -> dict[str, Any]:
            if part.classes:
                return {"label": part.label, "probability": part.probability}
            return {"value": part.value}

        over_time = [{"start_s": part.start_s, "end_s": part.end_s, **said(part)} for part in found.over_time]
        return {"video": video, **empty, **said(found), "seconds": found.end_s, "over_time": json.dumps(over_time)}


set_model(ServedModel())
