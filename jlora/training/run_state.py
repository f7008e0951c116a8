"""Checkpoints of a training run: everything that a run needs to resume as if it had never stopped.

::

    folder/<step>/state/       Orbax: TrainState
    folder/<step>/notes/       JSON: position in the data, best metric, sizes of the log files
    folder/<step>/files.json   a digest of every file

Orbax writes a step under a temporary name and renames it when it is complete, so a killed process leaves no partial
step. The digests detect files that a disk or a copy changed later, and such files are not passed to Orbax.
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
    """The contents of a checkpoint.

    Attributes:
        state: the state of the run.
        notes: the values that were saved with it.
        damaged: newer checkpoints that can't be used, each with its step and the reason.
    """

    state: TrainState
    notes: dict[str, Any]
    damaged: list[str]


class RunCheckpoints:
    """The checkpoints of one run, written in the background.

    Args:
        folder: the folder of the checkpoints; created if it doesn't exist.
        keep: number of checkpoints to keep, the newest ones.

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
        """Saves a step. The arrays are copied before this method returns, and written afterwards.

        Args:
            step: number of the step.
            state: the state after the step.
            notes: values to save with it, as JSON.

        Raises:
            OSError: this checkpoint or the previous one can't be written.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(_to_arrays(state)), notes=ocp.args.JsonSave(notes))
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> RestoredState | None:
        """Restores the newest undamaged checkpoint, and then deletes the newer, damaged ones.

        A checkpoint of an earlier version has no digests; it counts as undamaged if Orbax can read it.

        Args:
            like: a state of the same structure; each leaf is restored with its shape, dtype and sharding.

        Returns:
            The state, its notes and the damaged checkpoints; None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints, but none can be read; each is listed with its reason.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_arrays(like))
        reasons: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            items, reason = self._read(step, template)
            if reason is not None:
                reasons.append(f"step {step}: {reason}")
                continue
            # Orbax doesn't save a step whose number is not above that of its newest checkpoint.
            for damaged in [number for number in self._manager.all_steps() if number > step]:
                self._manager.delete(damaged)
            return RestoredState(_to_state(items["state"], like), items["notes"], reasons)
        if reasons:
            fix = "start the run again from the beginning, or restore the files."
            raise JloraValueError("resume", f"no checkpoint in {self.folder} can be read.", reasons, fix)
        return None

    def _record_files(self) -> None:
        """Writes the digests of the step that Orbax is saving."""
        if jax.process_index() == 0:
            (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            # Only the files of the items: Orbax writes to the files beside them again.
            items = [item for item in folder.iterdir() if item.is_dir()]
            files = [
                path.relative_to(folder).as_posix() for item in items for path in item.rglob("*") if path.is_file()
            ]
            write_digests(folder, files)

    def _read(self, step: int, template: Any) -> tuple[Any, str | None]:
        """The items of a step, and the reason why they can't be used, or None."""
        reason = _share_reason(_describe_damage(self.folder / str(step)))
        if reason is not None:
            return None, reason
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template), notes=ocp.args.JsonRestore())
        try:
            restored, reason = self._manager.restore(step, args=items), None
        except Exception as error:  # Orbax, TensorStore and others raise errors of different kinds
            restored, reason = None, next(iter(str(error).splitlines()), type(error).__name__)
        return restored, _share_reason(reason)

    def close(self) -> None:
        """Waits until the last checkpoint is written, and releases the resources.

        Raises:
            OSError: the last checkpoint can't be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        problem = f"a checkpoint can't be written to {self.folder}; the earlier checkpoints are intact."
        fix = "free disk space, then rerun the same command to resume from the last checkpoint."
        return writing("checkpoint", problem, fix)


def _to_arrays(state: TrainState) -> dict[str, Any]:
    """A state in the types that Orbax can store: the PRNG key becomes its data."""
    values = {name: getattr(state, name) for name in ("step", "adapters", "opt_state", "skipped")}
    return values | {"key": jax.random.key_data(state.key)}


def _to_state(values: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `_to_arrays`."""
    key = jax.random.wrap_key_data(values["key"], impl=jax.random.key_impl(like.key))
    return TrainState(**values | {"key": key})


def _describe_damage(folder: Path) -> str | None:
    """The files of a checkpoint that differ from their digests; None if all are intact, or there are no digests."""
    damaged = find_damage(folder)
    return f"{count(len(damaged), 'file')} damaged or missing: {', '.join(damaged)}" if damaged else None


def _share_reason(reason: str | None) -> str | None:
    """A reason not to use a checkpoint if any process of the run has one, so that all processes use the same one."""
    if jax.process_count() == 1:
        return reason
    refused = multihost_utils.process_allgather(np.int32(reason is not None)).max()
    return reason or ("another process of the run can't read it" if refused else None)
