"""The command `tandem doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="The folder or URI that your specs name as `storage`.",
            show_default="$TANDEM_STORAGE, or storage in Tandem's home",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out bandwidth and the disks' speed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts and findings as JSON.")] = False,
) -> None:
    """Look at every node for what would make a job fail there, or go wrong without a word.

    Versions, clocks, disks, ports, names and network interfaces, the network
    between all pairs of nodes, GPUs, MLflow, and whether the storage is one
    that all nodes share. What is wrong is named with its node, its reason
    and a way out. Nothing stays on any node. It takes about fifteen seconds
    and, while it measures, is in the way of what runs there; --quick is not.

    Exit codes: 0 nothing that a job would fail by; 1 something is; 2 it
    could not look.

    Example: tandem doctor --storage /mnt/shared/runs
    """
    from rich.console import Console

    from cluster import connect
    from cluster.doctor import examine, judge

    console = Console(stderr=True)
    with console.status("connecting …") as spinner:

        def report(message: str) -> None:
            if not console.is_terminal:
                console.print(message, highlight=False)
            spinner.update(message)

        connect.init_ray(runtime_env=connect.runtime_env())
        facts = examine.examined(storage, quick, report)
    findings = judge.verdicts(facts)
    _print(facts, findings, as_json)
    raise typer.Exit(judge.exit_code(findings))


def _print(facts: object, findings: object, as_json: bool) -> None:
    import dataclasses
    import json

    from rich.console import Console

    from cluster.doctor import table
    from cluster.doctor.facts import Facts

    assert isinstance(facts, Facts)
    assert isinstance(findings, list)
    if as_json:
        shown = {"findings": [dataclasses.asdict(one) for one in findings], **dataclasses.asdict(facts)}
        typer.echo(json.dumps(shown, indent=2))
        return
    console = Console()
    for part in table.rendered(facts, findings):
        console.print(part, highlight=False)
