"""The command `jlora`: what it was told, and how it ends.

Exit codes: 0 all went well, 1 a fault of jlora's own (with a traceback), 2 something to be mended by the user
(with the message alone), 130 stopped by Ctrl-C.
"""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlora.core.errors import complain
from jlora.recipes import config as configs
from jlora.recipes.config import Config

DONE, FAULT, MISTAKE, STOPPED = 0, 1, 2, 130


@dataclass(frozen=True)
class Train:
    """Fine-tune a model as a TOML file says; every key of it is a flag too, and the flag wins.

    Attributes:
        config: the TOML file; its paths are relative to it, those of flags to the working directory
        settings: the job
    """

    config: tyro.conf.Positional[Path]
    settings: Annotated[Config, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Trains, shows the result and writes it."""
        from jlora.cli.train import train

        train(configs.check(self.settings))


@dataclass(frozen=True)
class Predict:
    """Answer questions with what `jlora train` wrote.

    Attributes:
        folder: the run's folder
        questions: what to ask; left out, every line of the standard input is a question
        top: best entries to show for each question
        json: print JSON lines
        model: folder or hub name of the base model, if it is not where it was
    """

    folder: tyro.conf.Positional[Path]
    questions: tyro.conf.Positional[tuple[str, ...]] = ()
    top: int = 1
    json: bool = False
    model: str | None = None

    def run(self) -> None:
        """Prints the answers."""
        from jlora.cli.predict import predict

        predict(self.folder, self.questions, top=self.top, as_json=self.json, model=self.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Raises:
        SystemExit: `--help` was asked for (0), or a flag is wrong (2).
    """
    try:
        parse(sys.argv[1:] if argv is None else list(argv)).run()
    except KeyboardInterrupt:
        print("jlora: stopped.", file=sys.stderr)
        return STOPPED
    except (ValueError, TypeError, OSError) as error:
        if not is_mistake(error):
            traceback.print_exc()
            return FAULT
        print(error, file=sys.stderr)
        return MISTAKE
    except Exception:
        traceback.print_exc()
        return FAULT
    return DONE


def is_mistake(error: Exception) -> bool:
    """Whether the user can mend it: the system refused, or the message names its fix, as only ours do."""
    return isinstance(error, OSError) or "\nFix: " in str(error)


def parse(argv: list[str]) -> Train | Predict:
    """The command that a command line asks for.

    Raises:
        SystemExit: `--help` was asked for (0), or a flag is wrong (2).
        ValueError: the config file is not given first, or can't be used.
        OSError: it can't be read.
    """
    train = tyro.conf.subcommand("train")
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv[1:2]):
        # The file makes the flags' defaults, so it has to be known before they are.
        if len(argv) == 1 or argv[1].startswith("-"):
            fix = "name it first: jlora train CONFIG.toml [--flag value ...]."
            raise ValueError(complain("jlora train", "no config file was given.", [], fix))
        path = Path(argv[1])
        train = tyro.conf.subcommand("train", default=Train(path, configs.read(path)))
    commands = Annotated[Train, train] | Annotated[Predict, tyro.conf.subcommand("predict")]
    return tyro.cli(commands, prog="jlora", args=argv, description="LoRA fine-tuning for JAX and Flax.")
