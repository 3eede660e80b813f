"""What the way to a replica raises when the replica, or the way, is no more."""

from __future__ import annotations

from serve.wire import Refused


class ReplicaLost(Exception):
    """The replica that worked on a request was lost, or sent the request away; another one may go on with it."""

    def __init__(self, replica_id: str, moved: bool = False, refused: Refused | None = None) -> None:
        """`moved`: the replica leaves and has given the request back itself, as it may.

        `refused`: its engine failed, and this is what the client is told where no other replica can go on.
        """
        super().__init__(f"replica {replica_id} " + ("gave the request back" if moved else "was lost"))
        self.replica_id, self.moved, self.refused = replica_id, moved, refused
