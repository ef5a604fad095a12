"""A repository of the Hub as a push sees it, and the one commit that changes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..messages import say


__all__ = ["Repository", "State", "retrying"]

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
LONGEST = 300  # that the Hub may ask to wait
TRANSIENT = (408, 429, 500, 502, 503, 504)
MODEL = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
RECIPE = ("hf_reg.json", "hf_reg.safetensors")

Result = TypeVar("Result")


def retrying(action: Callable[[], Result]) -> Result:
    """What `action` returns, which is called again while the Hub is busy or the connection breaks.

    huggingface_hub does so by itself for uploads, but neither for commits nor for what it asks before them.
    """
    for wait in WAITS:
        try:
            return action()
        except HTTPError as error:
            response = getattr(error, "response", None)
            asked = "0" if response is None else response.headers.get("Retry-After", "0")
            pause = max(wait, float(asked)) if asked.isdigit() else wait
            if (response is not None and response.status_code not in TRANSIENT) or pause > LONGEST:
                raise
            found = type(error).__name__ if response is None else response.status_code
            say(f"The Hub: {found}. Trying again in {pause:g} s.")
            time.sleep(pause)
    return action()


@dataclass(frozen=True)
class State:
    """What a branch holds, at a commit; what it would start from where it does not exist yet."""

    head: str
    files: frozenset[str]
    private: bool
    exists: bool


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub, at a branch."""

    api: HfApi
    id: str
    branch: str

    def look(self) -> State | None:
        """What is there; None without a repository."""
        exists = True
        try:
            info = self.api.model_info(self.id, revision=self.branch)
        except RevisionNotFoundError:
            info, exists = self.api.model_info(self.id), False
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        return State(str(info.sha), files, bool(info.private), exists)

    def read(self, path: str, state: State, cache: Path) -> bytes:
        """A file as it is at `state`."""
        download = self.api.hf_hub_download
        return Path(retrying(lambda: download(self.id, path, revision=state.head, cache_dir=cache))).read_bytes()

    def create(self, state: State | None, private: bool | None) -> str:
        """See that the repository and its branch exist, and return the commit that the branch is at."""
        if state is None:
            retrying(lambda: self.api.create_repo(self.id, private=private, exist_ok=True))
            state = retrying(self.look)
        if state is None:
            raise RuntimeError(f"{self.id} was created, but is not there")
        head = state.head
        if not state.exists:
            retrying(lambda: self.api.create_branch(self.id, branch=self.branch, revision=head, exist_ok=True))
        return head

    def commit(self, folder: Path, files: Iterable[str], parent: str, message: str) -> CommitInfo:
        """Send `files` of `folder`, then change the branch at once, if it is still at `parent`.

        A further try begins anew: what arrived is not sent again, and where only the answer to the commit was lost,
        nothing is left to change and the commit is returned.
        """
        sent = list(files)

        def attempt() -> CommitInfo:
            state = self.look()
            present = frozenset() if state is None else state.files
            return self.api.create_commit(
                self.id,
                [
                    *(CommitOperationAdd(path, str(folder / path)) for path in sent),
                    *(CommitOperationDelete(path) for path in outdated(present, sent)),
                ],
                commit_message=message, revision=self.branch, parent_commit=parent,
            )  # fmt: skip

        return retrying(attempt)


def outdated(present: Iterable[str], sent: Iterable[str]) -> list[str]:
    """The files of the last push that a reader would take instead of, or with, those of this one: shards of a model
    that is now one file, or the recipe of an adapter that has none any more."""
    sent = set(sent)
    patterns: tuple[str, ...] = ()
    if any(fnmatchcase(path, pattern) for path in sent for pattern in MODEL):
        patterns += MODEL
    if "adapter_config.json" in sent:
        patterns += RECIPE
    gone = set(present) - sent
    return sorted(path for path in gone if any(fnmatchcase(path, pattern) for pattern in patterns))
