"""What the Hub, or the way to it, said no with, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled


__all__ = ["PushError", "explaining"]

ADVICE = {
    401: "the token is missing, wrong or expired. Log in with `hf auth login`, set HF_TOKEN or pass token=.",
    403: "the token may not write there. Push to a namespace of your own, or use a token that may write to this one.",
    404: "no repository or revision of that name that this token can see. Check repo_id, revision and token.",
    409: "something else is being done to the repository at this moment. Wait, and push again.",
    412: "another commit arrived while this push ran. Look at what it changed, then push again to put yours on top.",
    413: "it is too large, or the storage of the account is full. Save it in smaller shards (max_shard_size), delete "
    "what is not needed, or ask for more storage.",
    429: "too many requests. Wait some minutes, then push again.",
}
FAULT = "the Hub is out of order. Look at https://status.huggingface.co, and push again later."
BAD_CARD = "Invalid metadata in README.md"  # of huggingface_hub
FULL = ("storage limit", "quota", "too large", "exceeds the maximum")


class PushError(OSError):
    """The Hub did not take a push. `status` is its HTTP status, or None where it gave none; `__cause__` the original.

    A reader of the repository sees a complete revision all the same: the one before, or the one that was pushed.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def _response(error: BaseException | None) -> tuple[Any, str]:
    """The answer of the Hub that an exception, or what it was raised from, carries; and what it says."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response, getattr(error, "server_message", None) or response.reason_phrase
        error = error.__cause__
    return None, ""


def _reason(error: Exception, endpoint: str) -> tuple[int | None, str]:
    response, said = _response(error)
    if BAD_CARD in str(error):
        return 400, f"it refused the model card ({error}). Correct the metadata at the head of README.md."
    if response is not None:
        status = response.status_code
        full = any(word in said.lower() for word in FULL)
        advice = ADVICE[413] if full else ADVICE.get(status, FAULT if status >= 500 else "see what the Hub says.")
        return status, f"it answered {status} ({said}): {advice}"
    first = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    what = f"{type(first).__name__}: {first}"
    if isinstance(error, LocalTokenNotFoundError):
        return 401, ADVICE[401]
    if isinstance(error, OfflineModeIsEnabled):
        return None, "HF_HUB_OFFLINE is set, so nothing is sent. Unset it and push again."
    if isinstance(first, (HTTPError, FileNotFoundError)):
        return None, f"no connection to {endpoint} ({what}). Check the network, a proxy and HF_ENDPOINT; push again."
    if any(word in str(first).lower() for word in FULL):
        return 413, f"{first}: {ADVICE[413]}"
    return None, f"its answer was not understood ({what}). Update huggingface_hub, or push again later."


@contextmanager
def explaining(repo_id: str, endpoint: str) -> Iterator[None]:
    """Around what talks to the Hub.

    Raises:
        [`PushError`]: for everything that goes wrong there.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        status, reason = _reason(error, endpoint)
        raise PushError(
            f"{repo_id} was not pushed to {endpoint}: {reason} Readers see a complete revision, and a push that is "
            "repeated sends only the files that are missing.",
            status,
        ) from error
