"""The stages on Ray, tracked in MLflow: `python -m pipelines STAGE`."""
