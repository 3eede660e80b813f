"""The command line: `tandem <folder> <verb>`, and `tandem quickstart`.

Each folder's verbs live in its cli.py. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import sys

import typer

from cluster.cli import app as cluster_app
from jobs.cli import app as jobs_app
from serve.cli import app as serve_app
from tracking.cli import app as tracking_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Carry a model from its first random weight to its thousandth concurrent user, on one Ray cluster.",
    epilog="Start with: tandem quickstart",
)
app.add_typer(cluster_app, name="cluster")
app.add_typer(jobs_app, name="jobs")
app.add_typer(serve_app, name="serve")
app.add_typer(tracking_app, name="tracking")


def main() -> None:
    """Run the command line; a user's mistake ends with one clear message and exit code 2, never a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
