"""Before workers start: what they need for offload to NVMe is built on every node that may take one."""

from __future__ import annotations

from cluster import devices
from cluster.results import result_of
from jobs import progress
from jobs.spec import JobSpec
from jobs.worker import async_io


def build(spec: JobSpec) -> None:
    """Build it on all nodes at once, where the spec offloads to NVMe; nobody's limits run meanwhile.

    Raises:
        UserError: a node lacks a library or a compiler.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    training, wanted = spec.training, spec.resources
    if training is None or isinstance(training.deepspeed, str) or training.deepspeed.offload != "nvme":
        return
    nodes = devices.able_to_hold(wanted.cpus_per_worker, wanted.gpus_per_worker)
    share_of_gpu = 0.01 if wanted.gpus_per_worker else 0  # without one, what is built is for CPUs
    task = ray.remote(num_cpus=0, num_gpus=share_of_gpu, max_retries=2)(async_io.ready)
    progress.report("build", 0, len(nodes))
    begun = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    for done, reference in enumerate(begun, 1):
        result_of(reference)
        progress.report("build", done, len(nodes))
