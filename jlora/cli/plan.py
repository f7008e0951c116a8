"""`jlora plan`: what a training step takes, before there are weights."""

import json

from jlora.runs.plan import Settings, plan


def show(model: str, settings: Settings, *, memory: str | None, as_json: bool) -> None:
    """Prints a plan.

    Args:
        model: folder or hub name; its config.json is all that is read.
        settings: what decides the step's memory.
        memory: what there is, as "24GB"; None to leave that open.
        as_json: print one JSON object.

    Raises:
        ValueError: settings, a memory or a model that can't be planned with.
        OSError: a file can't be read.
    """
    found = plan(model, memory=memory, **vars(settings))
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)
