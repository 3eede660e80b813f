"""The doorkeeper of a gateway: keys from the store, remembered by serve/keys/directory.py."""

from __future__ import annotations

from serve.api.body import ApiError
from serve.api.callers import Caller, unauthorized
from serve.keys.directory import Directory, NotAdmitted, StoreAway


class KeyDoorkeeper:
    """Admits who has a valid key."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def admit(self, text: str | None) -> Caller:
        """Return whose key it is. Raises ApiError: 401 for no valid key, 503 where nobody can say."""
        try:
            key = await self._directory.identify(text or "")
        except NotAdmitted:
            raise unauthorized() from None
        except StoreAway as error:
            message = "whether this key is valid cannot be found out now; try again"
            raise ApiError(503, message, code="keys_unavailable", headers={"retry-after": "2"}) from error
        return Caller(key.name, key.limits)
