"""The command `jlora`: what it was told, and how it ends.

Exit codes: 0 all went well, 1 a fault of jlora's own (with a traceback), 2 something to be mended by the user
(with the message alone), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import jlora
from jlora.cli.streams import describe_error, discard_output, flush_output, prepare_streams, report
from jlora.errors import JloraError, JloraValueError
from jlora.runs import config as configs
from jlora.runs.config import Config, Sampling, TaskName
from jlora.runs.plan import Settings

DESCRIPTION = "LoRA fine-tuning for JAX and Flax. `jlora --version` prints the version."
DONE, FAULT, MISTAKE, SIGNALLED, STOPPED = 0, 1, 2, 128, 130


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
class Sweep:
    """Train a job at many ranks at once, and say which of them will do, with the evidence.

    Attributes:
        config: the TOML file of the job; its rank, learning rate and seed give way to the grid's
        settings: the job
        ranks: ranks to try, with commas between them; a kernel without room for one has the highest it can
        lr: learning rates to try; left out, the job's own
        seeds: seeds to try each with; left out, the job's own
        metric: what decides, as accuracy, f1 or loss; left out, what the task chooses its best by
        tolerance: how much worse than the best a smaller rank may be; left out, one standard error of the best
        memory: what there is, as 24GB; left out, what the device has; what does not fit is trained in groups
        at_once: members computed side by side; left out, one on a CPU and as many as fit elsewhere
        out: folder to write; left out, the job's own with -sweep behind it
        overwrite: replace an earlier sweep that is there
    """

    config: tyro.conf.Positional[Path]
    settings: Annotated[Config, tyro.conf.arg(name="")]
    ranks: str = "4,8,16,32,64"
    lr: str | None = None
    seeds: str | None = None
    metric: str | None = None
    tolerance: float | None = None
    memory: str | None = None
    at_once: int | None = None
    out: Path | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Trains, writes the report and prints the recommendation."""
        from jlora.cli.sweep import sweep

        config = configs.check(self.settings)
        folder = config.output.folder
        sweep(
            config,
            folder.with_name(folder.name + "-sweep") if self.out is None else self.out.absolute(),
            ranks=self.ranks,
            learning_rates=self.lr,
            seeds=self.seeds,
            metric=self.metric,
            tolerance=self.tolerance,
            memory=self.memory,
            at_once=self.at_once,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class Predict:
    """Answer questions with what `jlora train` wrote.

    Attributes:
        folder: the run's folder
        questions: what to ask; left out, every line of the standard input is a question
        settings: how a language model answers
        input: JSON lines to read questions from: strings, or objects with the fields of the run's data
        output: file to write the answers to, as JSON lines in the order of the questions
        overwrite: replace an output file that is there
        top: best entries to show for each question
        json: print JSON lines
        model: folder or hub name of the base model, if it is not where it was
    """

    folder: tyro.conf.Positional[Path]
    questions: tyro.conf.Positional[tuple[str, ...]] = ()
    settings: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    input: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    top: int = 1
    json: bool = False
    model: str | None = None

    def run(self) -> None:
        """Prints or writes the answers."""
        from jlora.cli.predict import predict

        predict(
            self.folder,
            self.questions,
            source=self.input,
            output=self.output,
            overwrite=self.overwrite,
            top=self.top,
            as_json=self.json,
            model=self.model,
            sampling=self.settings,
        )


@dataclass(frozen=True)
class Eval:
    """Measure what `jlora train` or `jlora merge` wrote on other data.

    Attributes:
        folder: the run's folder, or that of a merged model
        data: a file of the run's task, or hub:owner/name; left out, the run's own test file
        task: the task of a merged model; a run has its own
        config: TOML file of a job, whose [data] says how a merged model's data are read; a run has its own
        max_length: tokens of an example that are read, for a merged model; a run has its own
        json: print one JSON object
        model: folder or hub name of the base model, if it is not where it was
    """

    folder: tyro.conf.Positional[Path]
    data: str | None = None
    task: TaskName | None = None
    config: Path | None = None
    max_length: int | None = None
    json: bool = False
    model: str | None = None

    def run(self) -> None:
        """Prints the measures."""
        from jlora.cli.evaluate import evaluate

        evaluate(
            self.folder,
            self.data,
            task=self.task,
            config=self.config,
            max_length=self.max_length,
            as_json=self.json,
            model=self.model,
        )


@dataclass(frozen=True)
class Generate:
    """Continue texts with a language model, and print them as they grow.

    Attributes:
        model: folder or hub name of the model
        prompts: texts to continue; left out, the whole standard input is one
        adapter: folder of an adapter, jlora's or PEFT's, or of a run
        merge: fold the adapter into the base first: faster tokens, for the memory of a second copy of its kernels
        dtype: of the parameters and of the computation
        chat: each prompt is a message: put it into the tokenizer's chat template, and print the reply alone
        settings: how the texts are continued
        untie: give a tied output head its own copy of the input embedding; some adapters need it
        vocab_size: number of tokens to grow or cut the embedding and the output head to; left out, the checkpoint's
    """

    model: tyro.conf.Positional[str]
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    adapter: Path | None = None
    merge: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: bool = False
    settings: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    untie: bool = False
    vocab_size: int | None = None

    def run(self) -> None:
        """Prints the texts."""
        from jlora.cli.generate import generate

        generate(
            self.model,
            self.prompts,
            adapter=self.adapter,
            merged=self.merge,
            dtype=self.dtype,
            chat=self.chat,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
            seed=self.settings.seed,
            untie=self.untie,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Plan:
    """Say what a training step takes, and what would make it fit: from the model's shapes alone, without weights.

    Attributes:
        model: folder or hub name of the model; of it config.json alone is read
        settings: the step
        memory: what there is, as 24GB or 80GiB; where the step does not fit, what would make it fit is looked for
        json: print one JSON object
    """

    model: tyro.conf.Positional[str]
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    memory: str | None = None
    json: bool = False

    def run(self) -> None:
        """Prints the plan."""
        from jlora.cli.plan import show

        show(self.model, self.settings, memory=self.memory, as_json=self.json)


@dataclass(frozen=True)
class Advise:
    """Name a rank to begin with, a range to look in, and why, before any run.

    Attributes:
        config: a job's TOML file, which tells what the flags leave out
        task: what is learnt
        examples: to train on; left out, those of the job's data
        difficulty: of the task; left out, what it most often is
        model: folder or hub name of the model; of it config.json alone is read
        memory: what there is, as 24GB; a rank is advised whose step fits
        json: print one JSON object
    """

    config: Path | None = None
    task: TaskName | None = None
    examples: int | None = None
    difficulty: Literal["simple", "medium", "complex"] | None = None
    model: str | None = None
    memory: str | None = None
    json: bool = False

    def run(self) -> None:
        """Prints the advice."""
        from jlora.cli.advise import show

        show(
            self.config,
            task=self.task,
            examples=self.examples,
            difficulty=self.difficulty,
            model=self.model,
            memory=self.memory,
            as_json=self.json,
        )


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter holds: targets, ranks, scalings, sizes, the norm of each update, and its base.

    Attributes:
        folder: a run's folder, an adapter's, or one of PEFT
        model: folder or hub name of the base; with it each update is held against its kernel
        spectrum: say how much of its rank each adapter used, and draw the singular values: spectrum.png in the folder
        json: print one JSON object
        untie: give a tied output head of the base its own copy of the input embedding; some PEFT adapters need it
        vocab_size: number of tokens that a PEFT adapter's base was resized to
    """

    folder: tyro.conf.Positional[Path]
    model: str | None = None
    spectrum: bool = False
    json: bool = False
    untie: bool = False
    vocab_size: int | None = None

    def run(self) -> None:
        """Prints the table."""
        from jlora.cli.adapters import inspect

        inspect(
            self.folder,
            model=self.model,
            spectrum=self.spectrum,
            as_json=self.json,
            untie=self.untie,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Merge:
    """Fold an adapter into its base, and write that as a Hugging Face folder.

    Attributes:
        folder: a run's folder, an adapter's, or one of PEFT
        out: folder to write
        model: folder or hub name of the base; needed where the folder does not name it
        dtype: of the parameters that are written; left out, that of the base
        overwrite: write into a folder that is not empty
        untie: give a tied output head of the base its own copy of the input embedding; some PEFT adapters need it
        vocab_size: number of tokens that a PEFT adapter's base was resized to
    """

    folder: tyro.conf.Positional[Path]
    out: Path
    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    untie: bool = False
    vocab_size: int | None = None

    def run(self) -> None:
        """Writes the model."""
        from jlora.cli.adapters import merge

        merge(
            self.folder,
            self.out,
            model=self.model,
            dtype=self.dtype,
            overwrite=self.overwrite,
            untie=self.untie,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Export:
    """Write an adapter for PEFT, or for vLLM.

    Attributes:
        folder: a run's folder, an adapter's, or one of PEFT
        out: folder to write
        format: who will read it
        model: folder or hub name of the base; needed where the folder does not name it
        overwrite: write into a folder that is not empty
        untie: give a tied output head of the base its own copy of the input embedding; some PEFT adapters need it
        vocab_size: number of tokens that a PEFT adapter's base was resized to
    """

    folder: tyro.conf.Positional[Path]
    out: Path
    format: Literal["peft", "vllm"] = "peft"
    model: str | None = None
    overwrite: bool = False
    untie: bool = False
    vocab_size: int | None = None

    def run(self) -> None:
        """Writes the adapter."""
        from jlora.cli.adapters import export

        export(
            self.folder,
            self.out,
            target=self.format,
            model=self.model,
            overwrite=self.overwrite,
            untie=self.untie,
            vocab_size=self.vocab_size,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Raises:
        SystemExit: `--help` was asked for (0), or a flag is wrong (2).
    """
    prepare_streams()
    try:
        run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        report("jlora: stopped.")
        return STOPPED
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        discard_output()
    except (ValueError, TypeError, OSError) as error:
        message = message_of(error)
        report(traceback.format_exc() if message is None else message)
        return FAULT if message is None else MISTAKE
    except Exception as error:
        # Only an error waits for this import.
        from jlora.runs.engine import Interrupted

        interrupted = isinstance(error, Interrupted)
        report(f"jlora: {error}" if interrupted else traceback.format_exc())
        return SIGNALLED + error.signal if isinstance(error, Interrupted) else FAULT
    return DONE


def run(argv: list[str]) -> None:
    """Runs one command, and writes out all that it printed."""
    try:
        parse(argv).run()
    except SystemExit:
        flush_output()
        raise
    flush_output()


def message_of(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a fault of jlora."""
    if isinstance(error, OSError | UnicodeError) and not isinstance(error, JloraError):
        error = describe_error(error)
    return str(error) if isinstance(error, JloraError) else None


def parse(argv: list[str]) -> Any:
    """The command that a command line asks for.

    Raises:
        SystemExit: `--help` or `--version` was given (0), or a flag is wrong (2).
        ValueError: the config file is not given first, or can't be used.
        OSError: it can't be read.
    """
    if argv == ["--version"]:
        print(f"jlora {jlora.__version__}")
        raise SystemExit(DONE)
    # The file makes the flags' defaults, so it has to be known before they are.
    jobs: dict[str, Any] = {"train": Train, "sweep": Sweep}
    commands: Any = None
    for name, command in jobs.items():
        found = tyro.conf.subcommand(name)
        if argv[:1] == [name] and not {"-h", "--help"} & set(argv[1:2]):
            if len(argv) == 1 or argv[1].startswith("-"):
                fix = f"name it first: jlora {name} CONFIG.toml [--flag value ...]."
                raise JloraValueError(f"jlora {name}", "no config file was given.", [], fix)
            path = Path(argv[1])
            found = tyro.conf.subcommand(name, default=command(path, configs.read(path)))
        commands = Annotated[command, found] if commands is None else commands | Annotated[command, found]
    others = {"eval": Eval, "predict": Predict, "generate": Generate}
    others |= {"advise": Advise, "plan": Plan, "inspect": Inspect, "merge": Merge, "export": Export}
    for name, command in others.items():
        commands = commands | Annotated[command, tyro.conf.subcommand(name)]
    return tyro.cli(commands, prog="jlora", args=argv, description=DESCRIPTION)
