"""A manifest as MLflow lists it among what a run reads."""

from __future__ import annotations

import pyarrow as pa

from pipelines import storage
from pipelines.data.manifest import description
from pipelines.tracking import DataSet


def data_set(videos: pa.Table, manifest: str, digest: str, context: str) -> DataSet:
    """Return the data set of some videos of a manifest.

    Args:
        videos: rows of the manifest, with its metadata.
        manifest: path or URI of the manifest.
        digest: of the whole manifest.
        context: what they are read for, such as `train`.
    """
    about = description(videos)
    own = videos["dataset"][0].as_py() if len(videos) else ""
    return DataSet(
        name=" ".join(filter(None, (about.dataset or own, about.task))) or "videos",
        digest=digest,
        source=storage.absolute(manifest),
        context=context,
        about={"benchmark": about.dataset, "task": about.task, "videos": len(videos)},
    )
