"""Saving from a trainer: files take their places when all are written, at once; hf_reg.json beside adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy

from ..checkpoints.block import block_of
from ..checkpoints.writing import replacing_checkpoint
from ..distributed import GATHER
from ..messages import say
from ..resuming import last_checkpoint


__all__ = ["SavingMixin"]

if TYPE_CHECKING:
    from transformers import Trainer as _Base  # what it is mixed into
else:
    _Base = object


def _write_training(model: Any, folder: Path) -> None:
    """hf_reg.json for plain adapters in training with patches or penalties; SVD adapters write their own."""
    from peft import PeftModel

    from ..adapters.config import SvdAdapterConfig
    from ..adapters.storage import write_settings

    if not isinstance(model, PeftModel) or block_of(model.get_base_model()) is None:
        return
    for name, config in model.peft_config.items():
        place = folder if name == "default" else folder / name
        if place.is_dir() and not isinstance(config, SvdAdapterConfig):
            write_settings(model, place)


@contextmanager
def _without_token(args: Any) -> Iterator[None]:
    """`training_args.bin` would hold it in clear, and `Trainer` uploads that file."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


class SavingMixin(_Base):
    """What a trainer writes takes the place of an earlier checkpoint when it is complete, at once; what it pushes is
    what [`~hf_reg.push_to_hub`] pushes."""

    bare_model: Any

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """[`~hf_reg.push_to_hub`] to `args.hub_model_id`: verified and with its card, in one commit.

        Args:
            commit_message, token, revision, private: as there; by default `args.hub_token` and the like.
            blocking (`bool`, *optional*, defaults to `True`): must be so.
            facts: of the card, as in `create_model_card`.

        Raises:
            `ValueError`: for `blocking=False`; see [`~hf_reg.push_to_hub`] for others.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False): a push is verified and one commit. Leave blocking out.")
        from ..cards.of_trainer import card_facts
        from ..hub import push_to_hub

        args, found = self.args, card_facts(**facts)
        self.callback_handler.on_push_begin(args, self.state, self.control)
        return push_to_hub(
            self, getattr(self, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).resolve().name,
            private=args.hub_private_repo if private is None else private, token=token or args.hub_token,
            revision=revision or args.hub_revision, commit_message=commit_message or "End of training",
            base_model=found.pop("base_model", None), **found,
        )  # fmt: skip

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value!r} would push the pickled states of the optimizer and of "
                "the random streams, which hf_reg does not. Expected 'every_save' or 'end'."
            )
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """In place of that of `Trainer`, which sends the token in `training_args.bin`. Every process calls it."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        from ..hub import PushError

        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except PushError as error:
            say(f"Step {self.state.global_step} is saved, but not pushed, and training goes on: {error}")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`]; `True` goes on from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir)) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _gathers(self) -> bool:
        """Whether what is saved is the whole model, where it is sharded."""
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        engine: Any = self.deepspeed
        if engine is None or engine.zero_optimization_stage() < 3 or hasattr(self.bare_model, "peft_config"):
            return True  # of an adapter `Trainer` gathers what was trained, whatever the setting
        return engine.zero_gather_16bit_weights_on_model_save()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`]; in one step, over an earlier checkpoint too.

        Raises:
            `ValueError`: for a sharded model that is not gathered: `Trainer` would write no weights, without a word.
        """
        if not (_internal_call or self._gathers()):
            raise ValueError(f"save_model would write no weights: they stay in their shards. {GATHER}")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:  # takes part in gathering
            with _without_token(self.args):
                super()._save(str(folder), state_dict)
            return
        with replacing_checkpoint(folder) as unfinished:
            with _without_token(self.args):
                super()._save(str(unfinished), state_dict)
            _write_training(self.bare_model, unfinished)
