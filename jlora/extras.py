"""The optional dependencies: which packages each extra installs, and the error where they are missing."""

import importlib.util

from jlora.errors import JloraImportError, count

# The modules that each extra installs beyond the base dependencies, as pyproject.toml lists their packages.
HF = ("huggingface_hub", "jinja2", "regex", "safetensors", "tokenizers", "transformers")
EXTRAS = {"hf": HF, "cli": (*HF, "grain", "matplotlib", "pyarrow", "rich", "tensorboardX", "tyro")}


def require_extra(extra: str, who: str) -> None:
    """Checks that every package of an extra can be imported, without importing it.

    Args:
        extra: the extra's name.
        who: the part of jlora that needs it.

    Raises:
        JloraImportError: some packages are not installed; all of them are listed.
    """
    missing = [module for module in EXTRAS[extra] if not is_installed(module)]
    if missing:
        verb = "are" if missing[1:] else "is"
        problem = f"{count(len(missing), 'package')} of the extra '{extra}' {verb} not installed."
        fix = f'install the extra: python -m pip install "jlora[{extra}]".'
        raise JloraImportError(who, problem, missing, fix)


def is_installed(module: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
