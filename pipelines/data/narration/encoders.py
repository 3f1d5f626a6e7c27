"""Sentences as vectors whose product is their similarity, and the vectors of all written steps.

`tfidf`       scikit-learn's TF-IDF, fitted to the steps: words in common, rarer ones counting more. It knows no
              synonyms, no word that no step has, and none that many steps have (`COMMON`).
a model       of sentence-transformers, by its name or folder: the extra `narration`, imported only here.

Shapes: R sentences, S steps, E numbers of a vector.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError

ScoreArray = npt.NDArray[np.float32]

TFIDF = "tfidf"
PACKAGE = "sentence_transformers"
COMMON = 0.2
"""A word is left out that more than this share of the steps have, and more than COMMON_STEPS of them: `the`, `to`, in
whatever language. scikit-learn's English stop words would do nothing for other languages, and among them are words that
steps need: `fill`, `move`, `top`, `thin`."""
COMMON_STEPS = 2
AT_ONCE = 64
"""Sentences that a sentence transformer sees at once."""


class SentenceEncoder(Protocol):
    """Makes vectors of sentences; it travels to workers."""

    def embed(self, sentences: Sequence[str]) -> Any:
        """Return a dense or sparse matrix (R, E) of unit rows; a row is zero where nothing is known of a sentence."""

    @property
    def digest(self) -> str:
        """What identifies the encoder."""


class TfidfEncoder:
    """TF-IDF of words, fitted to the steps."""

    def __init__(self, steps: Sequence[str]) -> None:
        """Fit it.

        Raises:
            UserError: no step has a word of two letters that few others have.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        most = max(COMMON_STEPS, int(COMMON * len(steps)))
        self._vectorizer = TfidfVectorizer(strip_accents="unicode", sublinear_tf=True, max_df=most, dtype=np.float32)
        try:
            self._vectorizer.fit(steps)
        except ValueError as error:
            raise UserError(
                f"encoder is {TFIDF!r}: no step has a word of at least two letters that at most {most} steps have "
                f"({error})"
            ) from None

    def embed(self, sentences: Sequence[str]) -> Any:
        """Return a sparse matrix (R, E); see `SentenceEncoder`."""
        return self._vectorizer.transform(sentences)

    @property
    def digest(self) -> str:
        """Name and version: the steps, which it is fitted to, have a digest of their own."""
        return f"{TFIDF} scikit-learn {metadata.version('scikit-learn')}"


@dataclass(frozen=True)
class TransformerEncoder:
    """A model of sentence-transformers, loaded where it is first used."""

    name: str
    """Its name on the hub, or its folder, which every worker has to reach."""
    device: str
    """Where it runs, such as `cuda`."""

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(self.name, device=self.device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"encoder is {self.name!r}: sentence-transformers cannot load it ({reason}); give {TFIDF}, a model's "
                "folder, or its name and go online once"
            ) from None

    def __getstate__(self) -> dict[str, str]:
        return {"name": self.name, "device": self.device}

    def embed(self, sentences: Sequence[str]) -> Any:
        """Return a dense matrix (R, E); see `SentenceEncoder`."""
        return self._model.encode(
            list(sentences),
            batch_size=AT_ONCE,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )

    @property
    def digest(self) -> str:
        """Name, version of the package, and digest of the weights."""
        from pipelines.storage.weights import weights_digest

        version = metadata.version(PACKAGE.replace("_", "-"))
        return f"{self.name} sentence-transformers {version} {weights_digest(self._model.state_dict())}"


@dataclass(frozen=True)
class StepIndex:
    """The vectors of all steps that have a text, with what made them."""

    encoder: SentenceEncoder
    vectors_SE: Any
    """Dense or sparse (S, E)."""
    digest: str
    """What identifies the encoder."""

    @property
    def blank(self) -> int:
        """How many steps have a vector of zeros: nothing is like them."""
        return int((abs(self.vectors_SE).sum(1) == 0).sum())

    def similarities(self, sentences: Sequence[str]) -> ScoreArray:
        """Return the cosine similarity (R, S) of each sentence and each step."""
        found = self.encoder.embed(sentences) @ self.vectors_SE.T
        return np.asarray(found.toarray() if hasattr(found, "toarray") else found, np.float32)


def index_steps(name: str, steps: Sequence[str], device: str) -> StepIndex:
    """Return the vectors of steps.

    Raises:
        UserError: the encoder cannot be loaded, or does not fit the steps.
    """
    encoder: SentenceEncoder = TfidfEncoder(steps) if name == TFIDF else TransformerEncoder(name, device)
    return StepIndex(encoder, encoder.embed(steps), encoder.digest)


def index_or_error(name: str, steps: Sequence[str], device: str) -> StepIndex | UserError:
    """Return what `index_steps` returns, or its error: raised in a task of Ray, that would come with a traceback."""
    try:
        return index_steps(name, steps, device)
    except UserError as error:
        return error


def check_encoder(name: str) -> None:
    """Raise `UserError` where the package that an encoder needs is missing."""
    if name != TFIDF and importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"encoder is {name!r}: the package sentence-transformers is missing; install the extra, "
            f"pip install 's5-video[narration]', or give {TFIDF}"
        )
