"""The entry point of a job: `python -m jobs.driver SPEC [--set KEY=VALUE]`."""

import importlib.util
import sys
from pathlib import Path

OURS = {"cluster": "errors.py", "tracking": "manifest.py"}
"""A file of each package that a job needs besides this one."""


def hidden() -> str | None:
    """Return the first of our packages that a file in the job's folder hides; `tandem jobs submit` sends none such."""
    for name, file in OURS.items():
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not any((Path(folder) / file).is_file() for folder in folders):
            return name
    return None


if __name__ == "__main__":
    if (package := hidden()) is not None:
        print(
            f"tandem: error: Tandem's package {package!r} is not found, or {package}.py or {package}/__init__.py in "
            "the job's folder hides it: rename that one, or send the job by `tandem jobs submit`",
            flush=True,
        )
        sys.exit(2)
    from jobs.driver.warm import shadow

    if (code := shadow("jobs.driver")) is not None:
        sys.exit(code)
    from jobs.driver.main import leave, main

    leave(main())
