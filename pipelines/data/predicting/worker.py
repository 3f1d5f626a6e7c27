"""Predict videos one after another: a child process reads each, so that a decoder that hangs costs that video alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipelines import storage
from pipelines.data.decoding.decode_tasks import retried_once
from pipelines.data.decoding.video_process import VideoProcess
from pipelines.data.decoding.video_requests import FramesRequest
from pipelines.data.predicting.rows import reject_of, row_of
from s5.errors import VideoError
from s5.evaluation.prediction import Predictor, VideoPrediction
from s5.evaluation.streaming import Seconds
from s5.video.reader import FloatArray, FrameArray
from s5.video.reading import VideoFacts

OnFrames = Callable[[str, float, float], None]
"""Called with a video, how many of its seconds have been read, and how many there are."""
OnPrediction = Callable[[str, VideoFacts, VideoPrediction], None]
"""Called with a video, its facts and what is predicted of it; may raise `VideoError`."""


class PredictWorker:
    """A model and a process that reads videos for it.

    Args:
        predictor: the model.
        timeout_s: time limit of one request to the process, in seconds.
        on_frames: told how far a video is.
        on_prediction: told what is predicted.
    """

    def __init__(
        self,
        predictor: Predictor,
        timeout_s: float,
        on_frames: OnFrames | None = None,
        on_prediction: OnPrediction | None = None,
    ) -> None:
        self._predictor, self._timeout_s = predictor, timeout_s
        self._on_frames, self._on_prediction = on_frames, on_prediction
        self._process = VideoProcess()

    def rows(self, videos: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the row (`rows.PREDICTED`) of each video."""
        for video in videos:
            try:
                row = row_of(video, self._predict(video))
            except VideoError as error:
                row = reject_of(video, storage.redacted(str(error)))
            yield row

    def _predict(self, video: str) -> VideoPrediction:
        uri, seconds = storage.absolute(video), Seconds()
        with seconds.of("total"), seconds.of("decode"):
            facts = retried_once(partial(self._process.probe, uri, self._timeout_s))

        def read(times_F: FloatArray) -> list[FrameArray]:
            display_size = facts.width, facts.height
            request = FramesRequest(times_F, self._predictor.frame_size, display_size, facts.decoder)
            frames = retried_once(partial(self._process.frames, uri, request, self._timeout_s))
            if self._on_frames:
                self._on_frames(video, float(times_F[-1]), facts.duration_s)
            return list(frames)

        found = self._predictor.predict(facts, read, seconds)
        if self._on_prediction:
            self._on_prediction(video, facts, found)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.close()
