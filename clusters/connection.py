"""Reach a cluster's job server with its token, and say in one sentence why that fails."""

from __future__ import annotations

import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipelines.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_S = 10.0
PATIENCE_S = 120.0
POLL_S = 1.0
TOKEN_REMEDY = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it, or write it to ~/.ray/auth_token"


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server at a dashboard's URL.

    Raises:
        UserError: it is no URL, nothing answers there, the token is missing or wrong, or Ray is another one there.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address is {address!r}: give the URL of the cluster's dashboard, such as http://HOST:8265")
    address = address.rstrip("/")
    use_token()
    _check_reachable(address)
    # Ray takes both of these over the address that it is given.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise UserError(_sentence(address, error)) from None
    there, here = client._server_ray_version or "", ray.__version__
    if there.split(".")[:2] != here.split(".")[:2]:
        raise UserError(
            f"the cluster at {address} runs Ray {there or 'of an unknown version'}, and here is {here}: jobs need the "
            "same; use an image with the packages of constraints.txt there, or its Ray here"
        )
    return client


def use_token() -> None:
    """Switch Ray's token authentication on where the user has a token and has not said otherwise.

    Raises:
        UserError: RAY_AUTH_TOKEN_PATH names no file with a token.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not os.environ.get("RAY_AUTH_TOKEN") and path and not _holds_text(Path(path)):
        raise UserError(f"RAY_AUTH_TOKEN_PATH is {path!r}: there is no token in such a file; give the file that has it")
    if "RAY_AUTH_MODE" not in os.environ and has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def has_token() -> bool:
    """Return whether there is a token in one of the places where Ray looks."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return _holds_text(Path("~/.ray/auth_token").expanduser())


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that Ray's client raises where the cluster does not answer or refuses."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    return (OSError, RuntimeError, AuthenticationError, aiohttp.ClientError)


def sentence(client: JobSubmissionClient, error: Exception) -> str:
    """Return in one sentence why a cluster refused or did not answer, with the remedy."""
    return _sentence(client.get_address(), error)


def _sentence(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Missing authentication token" in text or "couldn't find an authentication token" in text:
        if has_token():
            return f"the cluster at {address} wants its token and RAY_AUTH_MODE is not 'token' here; set it to that"
        return f"the cluster at {address} wants its token and there is none here; {TOKEN_REMEDY}"
    if "Invalid authentication token" in text:
        return f"the cluster at {address} refuses the token; {TOKEN_REMEDY}"
    return f"the cluster at {address} does not do what was asked: {text[:400]}"


def _check_reachable(address: str) -> None:
    """Raise `UserError` unless a Ray dashboard answers; Ray's client itself would wait for minutes."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_S):
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        reason = f"HTTP status {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise UserError(
        f"--address is {address!r}: no Ray dashboard answers there ({reason}); check the URL, that the cluster runs, "
        "and that its port is forwarded to this machine"
    )


def _holds_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False


def main(run: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command line, and exit with its status; 130 where Ctrl-C ends it.

    Args:
        run: takes the arguments and returns the status; a `UserError` is status 2.
    """
    logging.disable(logging.INFO)  # Ray's client tells each of its steps.
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
