"""The doorkeeper of a gateway: keys from the store, remembered by serve/keys/directory.py."""

from __future__ import annotations

import hmac

from serve.api.body import ApiError
from serve.api.callers import ANYONE, Caller, forbidden, unauthorized
from serve.keys.directory import Directory, NotAdmitted, StoreAway
from serve.keys.limits import Limits
from serve.keys.secret import digest

OPERATORS_PATHS = ("/status", "/metrics")
"""What the cluster's own commands and an operator's keys may read."""
ONLY_OPERATORS = ("/metrics",)
"""What shows all models and names all keys."""


class KeyDoorkeeper:
    """Admits who has a valid key."""

    def __init__(self, directory: Directory, operator: str | None = None) -> None:
        self._directory = directory
        self.operator = operator
        """The secret of the cluster's own commands, which read the state and call no model."""

    async def admit(self, text: str | None, path: str) -> Caller:
        """Return whose key it is.

        Raises:
            ApiError: 401 for no valid key, 403 for one that may not read this path, 503 where nobody can say.
        """
        if path in OPERATORS_PATHS and self.operator and hmac.compare_digest(digest(text or ""), digest(self.operator)):
            return ANYONE
        try:
            key = await self._directory.identify(text or "")
        except NotAdmitted:
            raise unauthorized() from None
        except StoreAway as error:
            message = "whether this key is valid cannot be found out now; try again"
            raise ApiError(503, message, code="keys_unavailable", headers={"retry-after": "2"}) from error
        if key.limits.operator:
            if path not in OPERATORS_PATHS:
                raise forbidden(f"an operator's key reads {' and '.join(OPERATORS_PATHS)}, and nothing else")
            return Caller(key.name, Limits())
        if path in ONLY_OPERATORS:
            raise forbidden(f"{path} needs an operator's key: `tandem serve keys make NAME --operator`")
        return Caller(key.name, key.limits)
