"""URIs of folders in object stores, as they are kept where others read them: openable again, and without a secret.

    s3://bucket/runs/x/model?endpoint_override=10.0.0.5:9000&scheme=http

What pyarrow is told of a server in the query (its address, its region) stays; credentials come from the environment.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

from cluster import stores
from cluster.errors import UserError

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_NO_STORES = ("file", "dir", "models")
KEPT = (
    *("scheme", "endpoint_override", "region", "allow_bucket_creation", "allow_bucket_deletion"),
    *("force_virtual_addressing", "check_directory_existence_before_creation", "allow_delayed_open"),
    *("tls_verify_certificates", "smart_defaults", "background_writes", "retry_limit_seconds", "project_id"),
    *("enable_tls", "blob_storage_authority", "dfs_storage_authority", "default_block_size", "replication"),
    *("buffer_size", "user"),
)
"""Names in a query that say where a store is and how it is spoken to. Others may be secrets."""


def is_store(place: str) -> bool:
    """Say whether a place is a URI of a store, and not a path, a hub id or a version in the registry. Pure."""
    found = _URI.match(place)
    return found is not None and found[1].lower() not in _NO_STORES


def checked(uri: str, what: str = "") -> str:
    """Return the URI of a folder as it may be kept: without a slash at its end. Pure.

    Args:
        what: stands before the sentence, where it is not clear what the URI is of.

    Raises:
        UserError: it names no folder, or holds what may be a secret, which is not repeated.
    """
    said = f"{what}: {stores.shown(uri)}" if what else stores.shown(uri)
    parts = urlsplit(uri)
    if _may_be_secret(parts.scheme.lower(), parts.netloc):
        raise UserError(
            f"{said}: the URI has a user's name or a password in it, and would be kept where others read it: leave "
            "them out; the store's credentials come from the environment"
        )
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if unknown := sorted(set(names) - set(KEPT)):
        raise UserError(
            f"{said}: {', '.join(unknown)} in the URI's query may be a secret, and the URI would be kept where others "
            f"read it: leave that to the environment; {', '.join(KEPT[:3])} and the like may stay"
        )
    path = parts.path.rstrip("/")
    if not path or parts.fragment or "#" in uri or {"", ".", ".."} & set(unquote(path).split("/")[1:]):
        raise UserError(f"{said} names no folder of a store: write s3://bucket/folder, without .., // and #")
    return f"{parts.scheme.lower()}://{parts.netloc}{path}{f'?{parts.query}' if parts.query else ''}"


def _may_be_secret(scheme: str, host: str) -> bool:
    """Say whether what stands before a host's @ is more than a container's name, or that nobody asks for a password."""
    user, mark, _ = host.rpartition("@")
    harmless = (scheme.startswith("abfs") and ":" not in user) or (scheme in ("gs", "gcs") and user == "anonymous")
    return bool(mark) and not harmless


def split(uri: str) -> tuple[str, str]:
    """Return the URI of the folder around a folder, and its name in there as pyarrow takes names. Pure.

    Args:
        uri: as `checked` returns it.
    """
    place, mark, query = uri.partition("?")
    around, _, name = place.rpartition("/")
    return f"{around}{mark}{query}", unquote(name)
