"""`tandem cluster`: start, inspect and end the local cluster."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.local import LocalCluster

NOTHING_RUNS = 3

app = typer.Typer(
    no_args_is_help=True,
    help="Where work runs: a Ray head and an MLflow server on this machine, or the cluster that RAY_ADDRESS names.",
)


def _port(what: str, usual: int) -> Any:
    shown = f"{usual} or the next free one"
    return typer.Option(min=1024, max=65535, help=f"Port of {what}; an error if it is in use.", show_default=shown)


@app.command()
def up(
    nodes: Annotated[int, typer.Option(min=0, help="Ray nodes besides the head, all on this machine.")] = 0,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that the head offers.", show_default="all")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that the head offers.", show_default="all")] = None,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="CPUs that each further node offers.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs that each further node offers.")] = 0,
    ray_port: Annotated[int | None, _port("the Ray head", 6379)] = None,
    dashboard_port: Annotated[int | None, _port("Ray's dashboard", 8265)] = None,
    mlflow_port: Annotated[int | None, _port("MLflow", 5000)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON.")] = False,
) -> None:
    """Start a Ray head and an MLflow server on loopback; what runs already is left as it is.

    Ray is not started where RAY_ADDRESS names a cluster, nor MLflow where
    MLFLOW_TRACKING_URI names a server. CPUs may be more than the machine
    has: they say how much work Ray puts side by side.

    Example: tandem cluster up --nodes 2 --cpus-per-node 2
    """
    from rich.console import Console

    from cluster import local

    console = Console(stderr=True)
    with console.status("starting …") as spinner:

        def report(message: str) -> None:
            console.print(message)
            spinner.update(message)

        cluster = local.up(
            nodes=nodes,
            cpus=cpus,
            gpus=gpus,
            cpus_per_node=cpus_per_node,
            gpus_per_node=gpus_per_node,
            ray_port=ray_port,
            dashboard_port=dashboard_port,
            mlflow_port=mlflow_port,
            progress=report,
        )
    _print_addresses(cluster, as_json)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Show addresses, nodes, CPUs, GPUs, memory and what runs; exit with 3 when there is no cluster.

    Example: tandem cluster status --json
    """
    from cluster import activity, daemons, local, node_report, topology, vitals
    from cluster.connect import connection, job_client

    if not _is_there_a_cluster():
        typer.echo("no cluster runs: `tandem cluster up` starts one, RAY_ADDRESS names another", err=True)
        raise typer.Exit(NOTHING_RUNS)
    found = connection()
    report = {
        "ray_address": found.ray_address,
        "dashboard_url": job_client().get_address(),
        "mlflow_url": found.tracking_uri,
        "mlflow_answers": local.is_mlflow_up(found.tracking_uri),
        "mlflow_refuses_name": daemons.is_unknown_name(found.tracking_uri),
        "is_local": found.is_local,
    }
    kept = node_report.kept(local.state()) if found.is_local else []
    nodes, jobs, applications = topology.nodes(), activity.running_jobs(), activity.serve_applications()
    machines = vitals.vitals()
    if as_json:
        _print_json(
            {
                **report,
                "nodes": nodes,
                "jobs": jobs,
                "applications": applications,
                "supervisors": kept,
                "vitals": machines,
            }
        )
        return
    node_report.show(report, nodes, machines, jobs, applications, kept)


@app.command()
def down(
    job_grace_s: Annotated[float, typer.Option(min=0, help="How long running jobs may take to stop.")] = 10.0,
) -> None:
    """End everything that `up` started, and nothing else: jobs are asked to stop first.

    Metrics, models and the registry stay in Tandem's home; `up` finds them again.

    Example: tandem cluster down --job-grace-s 60
    """
    from rich.console import Console

    from cluster import local

    with Console(stderr=True).status("stopping …"):
        ended = local.down(job_grace_s)
    typer.echo(f"ended {ended} processes" if ended else "nothing to stop", err=True)


def _is_there_a_cluster() -> bool:
    import os

    from cluster import local

    cluster = local.state()
    return bool(os.environ.get("RAY_ADDRESS")) or bool(cluster and cluster.ray_address)


def _print_addresses(cluster: "LocalCluster", as_json: bool) -> None:
    import os

    ray_address = cluster.ray_address or os.environ["RAY_ADDRESS"]
    mlflow_url = cluster.mlflow_url or os.environ["MLFLOW_TRACKING_URI"]
    if as_json:
        addresses = {"ray_address": ray_address, "dashboard_url": cluster.dashboard_url, "mlflow_url": mlflow_url}
        _print_json({**addresses, "token_path": str(cluster.token_path), "nodes": cluster.nodes})
        return
    typer.echo(f"Ray        {ray_address}{'' if cluster.ray_address else ' (from RAY_ADDRESS)'}")
    if cluster.dashboard_url:
        typer.echo(f"Dashboard  {cluster.dashboard_url} (token: {cluster.token_path})")
    typer.echo(f"MLflow     {mlflow_url}{'' if cluster.mlflow_url else ' (from MLFLOW_TRACKING_URI)'}")


def _print_json(value: Any) -> None:
    import dataclasses
    import json

    typer.echo(json.dumps(value, default=dataclasses.asdict, indent=2))
