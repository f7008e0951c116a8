"""Checkpoints of a training run: all that a step needs to go on as if it had never stopped.

::

    folder/<step>/state/       Orbax: TrainState
    folder/<step>/notes/       JSON: where the data stands, what was best, how much was written
    folder/<step>/files.json   a digest of every file

Orbax writes a step beside the others and renames it when it is complete, so a killed process leaves no half of one.
The digests find what a disk or a copy changes afterwards, and keep Orbax from reading it.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jlora.errors import JloraValueError, count
from jlora.training.checkpoint import check_name, find_damage, write_digests, writing
from jlora.training.step import TrainState


class RestoredState(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        state: the state of the run.
        notes: what was saved with it.
        damaged: newer checkpoints that can't be used, each with its step and the reason.
    """

    state: TrainState
    notes: dict[str, Any]
    damaged: list[str]


class RunCheckpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
        folder: where they are; made if it isn't there.
        keep: how many are kept, the newest.

    Raises:
        ValueError: Orbax can't use a folder of this name.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        self.folder = Path(folder).absolute()
        check_name("checkpoint", self.folder)
        self._saving = 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            # Called when a step's files are complete, before the step gets its final name.
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._record_files),
        )
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
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> RestoredState | None:
        """The newest checkpoint that is whole; newer ones, being damaged, are deleted once it has been read.

        A checkpoint of an earlier version has no digests; it is taken for whole if Orbax can read it.

        Args:
            like: a state of the same structure; each leaf is restored with its shape, dtype and sharding.

        Returns:
            The state, its notes and the damaged checkpoints; None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints and none of them can be read, with each one's reason.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        reasons: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, reason = self._read(step, template)
            if reason is not None:
                reasons.append(f"step {step}: {reason}")
                continue
            # They would keep their places from the states that are to come.
            for damaged in [number for number in self._manager.all_steps() if number > step]:
                self._manager.delete(damaged)
            return RestoredState(_typed(found["state"], like), found["notes"], reasons)
        if reasons:
            fix = "start the run anew, or put the files back."
            raise JloraValueError("resume", f"no checkpoint in {self.folder} can be read.", reasons, fix)
        return None

    def _record_files(self) -> None:
        """Writes the digests of the step that is being saved."""
        if jax.process_index() == 0:
            (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            # Orbax writes to the files beside the items once more.
            items = [item for item in folder.iterdir() if item.is_dir()]
            files = [
                path.relative_to(folder).as_posix() for item in items for path in item.rglob("*") if path.is_file()
            ]
            write_digests(folder, files)

    def _read(self, step: int, template: Any) -> tuple[Any, str | None]:
        """The items of a step, and why they can't be used; None where they can."""
        reason = _agreed(_damage(self.folder / str(step)))
        if reason is not None:
            return None, reason
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template), notes=ocp.args.JsonRestore())
        try:
            found, reason = self._manager.restore(step, args=items), None
        except Exception as error:  # each library that takes part in reading has errors of another kind
            found, reason = None, next(iter(str(error).splitlines()), type(error).__name__)
        return found, _agreed(reason)

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


def _damage(folder: Path) -> str | None:
    """How the files of a checkpoint differ from those saved; None where they do not, or there are no digests."""
    damaged = find_damage(folder)
    return f"{count(len(damaged), 'file')} damaged or missing: {', '.join(damaged)}" if damaged else None


def _agreed(reason: str | None) -> str | None:
    """A reason not to use a checkpoint that any process of the run has; None where none has one."""
    if jax.process_count() == 1:
        return reason
    refused = multihost_utils.process_allgather(np.int32(reason is not None)).max()
    return reason or ("another process of the run can't read it" if refused else None)
