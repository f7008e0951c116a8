"""Checkpoints of a training run: all that a step needs to go on as if it had never stopped.

::

    folder/<step>/state/   Orbax: TrainState
    folder/<step>/notes/   JSON: where the data stands, what was best, how much was written

Orbax writes a step beside the others and renames it when it is complete, so whatever is found is whole.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora.core.errors import complain
from jlora.training.checkpoint import writing
from jlora.training.step import TrainState


class RunCheckpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
        folder: where they are; made if it isn't there.
        keep: how many are kept, the newest.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: TrainState, notes: dict[str, Any]) -> None:
        """Saves a step; the arrays are copied before this comes back, and written after.

        Args:
            step: its number.
            state: the state after it.
            notes: anything that JSON holds.

        Raises:
            OSError: this one or the one before can't be written.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), notes=ocp.args.JsonSave(notes))
        with self._writing():
            self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read; newer ones, being damaged, are deleted once it has been.

        Args:
            like: a state of the same structure; each leaf is restored with its shape, dtype and sharding.

        Returns:
            The state and its notes; None where there is none.

        Raises:
            ValueError: there are checkpoints and none of them can be read, with each one's reason.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        reasons = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            items = ocp.args.Composite(state=ocp.args.StandardRestore(template), notes=ocp.args.JsonRestore())
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:
                reasons.append(f"step {step}: {next(iter(str(error).splitlines()), type(error).__name__)}")
                continue
            # They would keep their places from the states that are to come.
            for damaged in [number for number in self._manager.all_steps() if number > step]:
                self._manager.delete(damaged)
            return _typed(found["state"], like), found["notes"]
        if reasons:
            fix = "start the run anew, or put the files back."
            raise ValueError(complain("resume", f"no checkpoint in {self.folder} can be read.", reasons, fix))
        return None

    def close(self) -> None:
        """Waits for what is being written, and frees what the writing needed.

        Raises:
            OSError: the last one can't be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        problem = f"a checkpoint can't be written to {self.folder}; those before it are there."
        fix = "make room on the disk or mend it; the same command then goes on from the last one."
        return writing("checkpoint", problem, fix)


def _plain(state: TrainState) -> dict[str, Any]:
    """A state as the kinds that Orbax keeps: a PRNG key as its bits."""
    values = {name: getattr(state, name) for name in ("step", "adapters", "opt_state", "skipped")}
    return values | {"key": jax.random.key_data(state.key)}


def _typed(values: dict[str, Any], like: TrainState) -> TrainState:
    key = jax.random.wrap_key_data(values["key"], impl=jax.random.key_impl(like.key))
    return TrainState(**values | {"key": key})
