"""Secrets that no file, no log, no command line and no stranger's answer may have, and where to look for them."""

from __future__ import annotations

from pathlib import Path

DATABASE = "zq7canary9database"
"""The password of the database of keys, in PGPASSWORD."""
HUB = "hf_zq7canary9hub"
"""In HF_TOKEN."""
PROMPT = "zq7canary9prompt"
"""Every prompt begins with it."""
SESSION = "zq7canary9session"
WRONG_KEY = "tandem-zq7canary9key"
ENVIRONMENT = {"PGPASSWORD": DATABASE, "HF_TOKEN": HUB}
"""What the tests' cluster is started with."""
ALL = (DATABASE, HUB, PROMPT, SESSION, WRONG_KEY)
BLOCK_BYTES = 1 << 22


def holders(folder: Path, secrets: tuple[str, ...]) -> list[str]:
    """Return which files below a folder have which of the secrets."""
    wanted = [(secret, secret.encode()) for secret in secrets]
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            found += [f"{path}: {secret}" for secret, raw in wanted if _has(path, raw)]
        except OSError:  # gone meanwhile
            continue
    return found


def _has(path: Path, secret: bytes) -> bool:
    kept = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if secret in kept + block:
                return True
            kept = block[-len(secret) :]
    return False
