"""What is shown of a run while it trains, on a terminal and elsewhere."""

import io
import re

from rich.console import Console

from jlora.cli.show import Monitor, result_table
from jlora.runs.engine import Evaluation, Step


def follow(terminal: bool) -> str:
    """What is printed of nine steps, logged every four, with an evaluation at the end."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160, color_system=None)
    monitor = Monitor(console, steps=9, epochs=3, log_every=4, measure="accuracy", unit="examples")
    with monitor.running():
        for step in (4, 8, 9):
            monitor.show(Step(step, 9, -(-step // 3), 20, 10, 1 / step, 1e-3, 1.0, 0))
        monitor.show(Evaluation(9, 3, 0.1, {"accuracy": 0.75}, True, None))
    return stream.getvalue()


def test_without_a_terminal_a_line_is_printed_every_log_every_steps_and_at_each_evaluation():
    lines = follow(terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 4/9", "step 8/9", "epoch 3/3"]
    assert re.fullmatch(r"step 8/9  epoch 3/3  loss 0\.125  [\d,]+ examples/s  lr 1\.0e-03", lines[1])
    assert re.fullmatch(
        r"epoch 3/3  step 9  loss 0\.111  validation accuracy 0\.750  [\d,]+ examples/s  best", lines[2]
    )


def test_a_terminal_shows_the_steps_in_all_and_the_time_left():
    shown = follow(terminal=True)
    assert "9/9" in shown and "validation accuracy 0.750" in shown
    assert re.search(r"(\d+:\d\d:\d\d|-:--:--)", shown)
    assert "step 4/9" not in shown


def test_a_path_with_brackets_is_shown_as_it_is():
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table([("data", "a[v1]/[/b].jsonl")]))
    assert "a[v1]/[/b].jsonl" in stream.getvalue()
