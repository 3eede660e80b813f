"""What this machine keeps of a model on the Hugging Face hub, and what the hub tells of it before it is loaded."""

from __future__ import annotations

from pathlib import Path

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.vocab", "additional_chat_templates/*", "custom_generate/*")
"""All but weights: configs, tokenizers and templates."""


def cached(repository: str) -> Path | None:
    """Return the folder where this machine keeps a model of the hub, or a part of it, if it does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def fetched(repository: str) -> Path | None:
    """Return the folder with a model's small files, fetched where they are not there.

    None where they cannot be had: whoever loads the model next says why.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(SMALL)))
    except Exception:  # the client's kinds of errors are many, and that of loading is the one to show
        return None


def file_names(repository: str) -> list[str]:
    """Return the names of all files of a model on the hub; none where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository)
    except Exception:  # as above
        return []
