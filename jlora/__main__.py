"""The command `jlora`; `python -m jlora` is the same."""

import sys

from jlora.errors import JloraImportError


def main() -> int:
    """Runs the command line, which needs the extra `cli`, and returns its exit code."""
    try:
        from jlora.cli.main import main as run_command
    except JloraImportError as error:
        print(f"jlora: {error.problem} Fix: {error.fix}", file=sys.stderr)
        return 2
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
