"""A run's events for TensorBoard."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator

import jax

from jlora.runs.config import Config
from jlora.runs.engine import Evaluation, Step, can_be_written
from jlora.runs.folder import EVENTS

WriteEvent = Callable[[Step | Evaluation], None]


@contextlib.contextmanager
def open_event_files(config: Config) -> Iterator[WriteEvent]:
    """Opens the event files if the config asks for them; a resumed run writes the events of its past again."""
    if not config.output.tensorboard or jax.process_index() != 0:
        yield lambda event: None
        return
    # Its SummaryWriter writes in a separate thread, which a full disk ends without an error.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    folder = config.output.folder / EVENTS

    @functools.cache
    def writer() -> EventsWriter:
        # The folder belongs to an earlier run until there is something to write.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return EventsWriter(str(folder / "events"))

    def write(event: Step | Evaluation) -> None:
        values: dict[str, float] = {"validation/loss": event.loss}
        if isinstance(event, Step):
            names = ("loss", "learning_rate", "grad_norm")
            values = {f"train/{name}": getattr(event, name) for name in names}
        else:
            values |= {f"validation/{name}": value for name, value in event.metrics.items()}
        with can_be_written(folder):
            for name, value in values.items():
                writer().write_event(Event(wall_time=time.time(), step=event.step, summary=scalar(name, value)))
            writer().flush()

    try:
        yield write
    finally:
        if writer.cache_info().currsize:
            with can_be_written(folder):
                writer().close()
