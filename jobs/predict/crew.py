"""The workers of a prediction as Ray's actors: started, given shards, and replaced when they are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cluster.errors import UserError
from cluster.results import result_of
from jobs.driver import storage
from jobs.predict.desk import Desk
from jobs.predict.parts import Entry
from jobs.predict.rows import Shard
from jobs.predict.worker import Watched, Work


class Crew:
    """Some workers, and what each of them has been given."""

    def __init__(self, work: Work, desk: Desk, size: int, env: dict[str, str], say: Callable[[str], None]) -> None:
        """Take how many there shall be, the environment of their processes, and who is told of losses."""
        self._work, self._desk, self._size, self._env, self._say = work, desk, size, env, say
        self._actors: dict[int, Any] = {}
        self._given: dict[Any, tuple[int, Shard | None]] = {}
        """A call's reference → worker, and the shard, or None for its start."""
        self._hired = 0

    def entries(self) -> Iterator[Entry]:
        """Have all shards done; yield what each came to, as it is done. In the end the workers are ended.

        Raises:
            UserError: a worker has found that the job cannot go on.
            TooOften: the same shard has failed too often, or the start of workers.
        """
        import ray

        try:
            for _ in range(self._size):
                self._hire()
            while not self._desk.finished:
                while (given := self._desk.next()) is not None:
                    worker, shard = given
                    self._given[self._actors[worker].do.remote(shard)] = given
                if self._desk.finished:
                    return
                (reference,), _ = ray.wait(list(self._given), num_returns=1)
                yield from self._take(reference)
        finally:
            for actor in self._actors.values():
                ray.kill(actor)

    def _hire(self) -> None:
        import ray

        wanted = self._work.spec.resources
        actor = ray.remote(
            num_cpus=wanted.cpus_per_worker, num_gpus=wanted.gpus_per_worker, runtime_env={"env_vars": self._env}
        )(Watched).remote(self._work, self._hired)
        self._actors[self._hired] = actor
        self._given[actor.start.remote()] = (self._hired, None)
        self._hired += 1

    def _take(self, reference: Any) -> Iterator[Entry]:
        worker, shard = self._given.pop(reference)
        try:
            result = result_of(reference)
        except UserError:
            raise
        except Exception as error:
            if storage.has_failed(error):
                raise
            self._replace(worker, error)
            return
        if shard is None:
            self._desk.hire(worker)
        else:
            self._desk.done(worker, shard)
            yield result

    def _replace(self, worker: int, error: Exception) -> None:
        """Take what a worker had back, and start another one in its place."""
        import ray

        ray.kill(self._actors.pop(worker))
        self._given = {ref: given for ref, given in self._given.items() if given[0] != worker}
        why = _reason(error)
        self._desk.lost(worker, why)
        self._say(f"worker {worker} is lost ({why}): what it had is done again by others")
        self._hire()


def _reason(error: Exception) -> str:
    """Return in a line what ended a worker: the last line of an error of its code, or the first of Ray's own."""
    import ray

    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0][:300]
