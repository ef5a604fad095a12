"""`push_to_hub`: a model, an adapter or a folder to the Hub, in one commit."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from ..files import finish_dead_saves
from ..messages import say
from .errors import explaining
from .files import refuse_secrets, select
from .processes import from_main_process
from .repository import Repository, State, retrying
from .staging import name_base, save, stage


__all__ = ["push_to_hub"]

CARD = "README.md"


def push_to_hub(
    source: Any,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Push with hf_reg",
    tokenizer: Any = None,
    base_model: str | None = None,
    **facts: Any,
) -> CommitInfo:
    """Push a checkpoint to the Hub: saved, verified, with its model card, in one commit.

    Whoever downloads meanwhile, or after a push that died, gets the revision before it, complete. A push that is
    repeated sends only the files that are missing; one that changes nothing makes no commit.

    Sent are `.safetensors`, `.json`, `.jinja`, `.md`, `.txt`, `.yaml`, `.png`, SentencePiece and tiktoken files,
    LICENSE and NOTICE. Left out, and named in a log message, is what a training run keeps for itself: checkpoint-*/,
    runs/, optimizer, scheduler and random states, trainer_state.json, training_args.bin (it holds `hub_token` in
    clear), and hidden files. Everything else is refused by name: pickles, scripts, links. Weights of the last push
    that would be read in place of the new ones are deleted in the same commit.

    With several processes every one must call it; the first pushes, and all return or raise the same.

    Args:
        source (`nn.Module`, [`~transformers.Trainer`], `str` or `PathLike`):
            A transformers model or `PeftModel`; a trainer, with its tokenizer; or a folder, which stays as it is.
        repo_id (`str`): `namespace/name`, or the name of a repository of your own; created if there is none.
        private (`bool`, *optional*): of a repository that is created; one that exists must already be so.
        revision (`str`, *optional*): a branch, created from the main one if there is none. By default `main`.
        token (`str` or `bool`, *optional*): an access token; by default that of `hf auth login` or HF_TOKEN. It is
            neither shown nor written anywhere.
        commit_message (`str`, *optional*, defaults to `"Push with hf_reg"`).
        tokenizer (*optional*): goes with a model.
        base_model (`str`, *optional*): the repository of the model that was fine-tuned, named by the card and, as its
            base, by a pushed adapter. Needed for an adapter whose base was loaded from a folder.
        facts: of the card, see [`~hf_reg.cards.Facts`]: `datasets=`, `license=`, `baseline=`, ...

    Returns:
        `CommitInfo`: of huggingface_hub; as a string, the URL of the commit.

    Raises:
        `ValueError`: for a checkpoint that fails [`verify_checkpoint`], files that are refused, a card whose metadata
            is wrong, an adapter without a known base, a text file with a token in it, a repository that is not as
            `private` says or holds an adapter where a model is pushed. Nothing is sent then.
        `TypeError`: for another source. [`PushError`]: if the Hub does not take it, or cannot be reached.

    Example:

    ```python
    push_to_hub(model, "me/bert-tlm", tokenizer=tokenizer)
    push_to_hub(trainer, "me/llama-rpo", private=True)
    push_to_hub("output/adapter", "me/llama-sorsa", base_model="meta-llama/Llama-3.2-1B", revision="sorsa-r16")
    ```
    """
    validate_repo_id(repo_id)
    if base_model is not None:
        validate_repo_id(base_model)
    with TemporaryDirectory(prefix="hf_reg-push-") as scratch:
        work, staged = Path(scratch), Path(scratch) / "staged"

        def send(saved: tuple[Path, Any]) -> CommitInfo:
            files = _staged(*saved, staged, base_model)
            api = HfApi(token=token)
            with explaining(repo_id, api.endpoint):
                name = repo_id if "/" in repo_id else f"{retrying(api.whoami)['name']}/{repo_id}"
                repository = Repository(api, name, revision or "main")
                state = retrying(repository.look)
            _check_target(repository, state, files, private)
            if state is not None and CARD in state.files - set(files):
                with explaining(name, api.endpoint):
                    (staged / CARD).write_bytes(repository.read(CARD, state, work / "cache"))  # what others wrote
            is_folder = isinstance(source, (str, os.PathLike))
            make_card(staged, None if is_folder else source, repo_id=name, base_model=base_model, **facts)
            files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
            refuse_secrets(staged, files, token if isinstance(token, str) else get_token())
            with explaining(name, api.endpoint):
                parent = repository.create(state, private)
                say(f"Pushing to {name}: {', '.join(files)}.")
                return repository.commit(staged, files, parent, commit_message)

        return from_main_process(lambda: save(source, work / "saved", tokenizer), send)


def _staged(folder: Path, model: Any, staged: Path, base_model: str | None) -> list[str]:
    """The files to push, verified and laid out in `staged`."""
    finish_dead_saves(folder)
    files, left_out = select(folder)
    if left_out:
        say(f"Not pushed: {', '.join(left_out)}.")
    stage(folder, set(files) - {CARD}, staged)  # the card is updated, then checked
    name_base(staged, files, base_model, where_none=True)
    verify(staged, model)  # on the base that it was trained on, wherever that is
    name_base(staged, files, base_model)
    stage(folder, set(files) & {CARD}, staged)
    return files


def _check_target(repository: Repository, state: State | None, files: list[str], private: bool | None) -> None:
    if state is None:
        return
    if private is not None and state.private != private:
        raise ValueError(
            f"{repository.id} exists and is {'private' if state.private else 'public'}, but private={private}. Push "
            f"to another repository, or change this one first: HfApi().update_repo_settings(repo_id, "
            f"private={private})."
        )
    for mine, other in (("config.json", "adapter_config.json"), ("adapter_config.json", "config.json")):
        if mine in files and other not in files and other in state.files:
            raise ValueError(
                f"{repository.id} holds {other} at {repository.branch}, and this push has {mine}: a model and an "
                "adapter in one place, of which readers would mix the two. Push to another repository or revision."
            )


def verify(folder: Path, model: Any) -> None:
    """
    Raises:
        `ValueError`: with what is wrong with the checkpoint in `folder`.
    """
    from hf_reg import verify_checkpoint

    result = verify_checkpoint(folder, model=model)
    if not result.passed:
        raise ValueError(
            f"The checkpoint fails its verification, so nothing was sent: {'; '.join(result.problems)}. Save it "
            "again, and see verify_checkpoint(folder)."
        )


def make_card(folder: Path, source: Any, **facts: Any) -> None:
    """Write or update README.md in `folder`, and what belongs to it.

    Raises:
        `ValueError`: for metadata that the Hub would refuse.
    """
    from ..cards import check_metadata, write_card

    path = write_card(folder, source=source, **{name: fact for name, fact in facts.items() if fact is not None})
    if problems := check_metadata(path.read_text(encoding="utf-8")):
        raise ValueError(
            f"The metadata of the model card (README.md) is wrong: {'; '.join(problems)}. Correct it: nothing was "
            "sent."
        )
