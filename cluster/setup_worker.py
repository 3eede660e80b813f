"""What a raylet of the local cluster runs before each worker: it sets variables and becomes the worker.

    python cluster/setup_worker.py default_worker.py ARGUMENTS… --serialized-runtime-env-context={…} --language=PYTHON

Ray's own setup_worker.py does the same, and imports all of Ray for it: half a second of CPU before every process,
besides what that one imports itself. This one needs the standard library. Whatever it does not know, it leaves to
Ray's. The name is the raylet's: it looks for it in its command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
KNOWN = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"}
"""What Ray's RuntimeEnvContext holds."""


def line_of(arguments: Sequence[str]) -> tuple[str, Mapping[str, str]] | None:
    """Return the shell's line that becomes the worker, and the variables to set before. Pure.

    As RuntimeEnvContext.exec_worker of ray/_private/runtime_env/context.py (2.60) has it.

    None: it is not a plain Python worker's, so that Ray has to do it.
    """
    contexts = [argument.removeprefix(CONTEXT) for argument in arguments if argument.startswith(CONTEXT)]
    languages = [argument.removeprefix(LANGUAGE) for argument in arguments if argument.startswith(LANGUAGE)]
    if languages != ["PYTHON"] or len(contexts) > 1:
        return None
    try:
        context = json.loads(contexts[0] or "{}") if contexts else {}
    except ValueError:
        return None
    if not isinstance(context, dict) or context.keys() - KNOWN or context.get("override_worker_entrypoint"):
        return None
    passed = [argument for argument in arguments if not argument.startswith((CONTEXT, LANGUAGE))]
    if any(argument in (CONTEXT[:-1], LANGUAGE[:-1]) for argument in passed):
        return None
    # Both are parts of a shell's line, as with Ray: the prefix goes to the job's folder.
    before, executable = context.get("command_prefix") or [], context.get("py_executable") or sys.executable
    return " ".join([*before, "exec", executable, *map(shlex.quote, passed)]), context.get("env_vars") or {}


def set_variables(wanted: Mapping[str, str]) -> None:
    """Set variables in order; `${X}` in one stands for what X is by then, and for nothing where there is none."""
    for name, value in wanted.items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


def main(arguments: list[str]) -> None:
    """Become the worker."""
    found = line_of(arguments) if sys.platform == "linux" else None
    if found is None:
        ray = importlib.util.find_spec("ray")
        assert ray is not None, "a raylet runs this by the Python that has Ray"
        assert ray.origin is not None
        own = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
        os.execv(sys.executable, [sys.executable, own, *arguments])
    line, variables = found
    set_variables(variables)
    os.execvp("bash", ["bash", "-c", line])


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]  # whose modules have common names
    main(sys.argv[1:])
