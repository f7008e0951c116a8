"""Renders chat templates for `jlora.hf.chat`: a script that runs in a separate process with separate limits.

A template is a program from outside. The sandbox of jinja2 stops it from reaching Python, but not from looping for
ever or filling the memory: nested loops, repeated strings and nested lists do both inside single calls. The operating
system limits both for this process, and the process that started it goes on.

Requests and replies are JSON, one per line.
"""

import json
import re
import resource
import signal
import sys
from typing import Any

OTHER_TEMPLATES = re.compile(r"\{%[-+]?\s*(include|import|extends|from)\b")


def limit_memory(extra: int) -> None:
    """Allows `extra` bytes of address space beyond those in use; without /proc only the time is limited."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))


def reply(request: dict[str, Any], limits: dict[str, int]) -> dict[str, str]:
    """The rendered text, or the kind of the failure ("chat", "template", "memory" or "length") and its reason."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
    from transformers.utils.chat_template_utils import render_jinja_template

    # The default action of the signal ends the process, also inside a call that never comes back.
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
    try:
        texts: Any = render_jinja_template(**request)[0]
    except SecurityError as error:
        return {"template": f"it is refused by the sandbox: {error}"}
    except TemplateSyntaxError as error:
        return {"template": f"line {error.lineno}: {error.message}"}
    except UndefinedError as error:
        return {"chat": f"fails: {error}"}
    except TemplateError as error:
        return {"chat": f"says: {error}"}
    except MemoryError:
        return {"memory": ""}
    except Exception as error:
        if OTHER_TEMPLATES.search(request["chat_template"]):
            return {"template": "it reads other templates (include, import or extends)"}
        return {"chat": f"fails: {type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"text": texts[0]} if len(texts[0]) <= limits["characters"] else {"length": ""}


def main() -> None:
    """Answers requests until the input ends; the first line holds the limits and the module search path."""
    replies, sys.stdout = sys.stdout, sys.stderr
    limits = json.loads(sys.stdin.readline())
    sys.path[:] = limits.pop("path")
    import transformers.utils.chat_template_utils  # noqa: F401

    limit_memory(limits["bytes"])
    for line in sys.stdin:
        replies.write(json.dumps(reply(json.loads(line), limits)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
