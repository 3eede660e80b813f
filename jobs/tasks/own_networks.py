"""What tasks with networks of ours share: in the Hugging Face layout, these are saved, loaded and served like others.

A network is a class that derives from `jobs.tasks.own_model.OwnModel`, with a config of its own; a task names those it
has in `networks`. What their configs must know of the data (how many items, how many columns) the task says.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.tasks import Task, TaskError
from jobs.tasks.architectures import check_builds, check_entries, close, last_line

if TYPE_CHECKING:
    import torch


class OwnNetworks(Task):
    """A task whose models are ours."""

    networks: ClassVar[Mapping[str, str]] = {}
    """`model.architecture` → `module:Class`."""

    def known(self) -> dict[str, Any]:
        """Return the entries of a config that follow from what the task has learned of the data, or was told."""
        return {}

    def placeholders(self) -> dict[str, Any]:
        """Return small values for `known`, of which a network can be made before anything is learned."""
        return {}

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        from transformers import AutoModel

        source = self._class(architecture)
        self._check_entries(architecture, source.config_class(), config, self.placeholders())
        whole = self._config(architecture, source.config_class, {**self.placeholders(), **config})
        check_builds(AutoModel, architecture, whole)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that is none of the task's networks, or an entry that its config has not."""
        from transformers import AutoConfig

        for architecture in self.networks:
            self._class(architecture)  # makes it known to transformers
        try:
            own = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # transformers validates configs with several kinds of exception
            raise TaskError(f"cannot load a model from {str(directory)!r}: {last_line(error)}") from error
        if own.model_type not in self.networks:
            names = ", ".join(self.networks)
            raise TaskError(f"{str(directory)!r} is a {own.model_type}; task {self.name} has {names}")
        self._check_entries(own.model_type, own, config, self.placeholders())

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make one of the task's networks with fresh weights in fp32."""
        source = self._class(architecture)
        known = self.known()
        self._check_entries(architecture, source.config_class(), config, known)
        whole = self._config(architecture, source.config_class, {**known, **config})
        try:
            model: torch.nn.Module = source(whole).float()
        except (ValueError, RuntimeError, TypeError) as error:
            raise TaskError(f"model.config for {architecture}: {last_line(error)}") from error
        return model

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao), in evaluation mode."""
        from transformers import AutoModel

        from jobs.tasks import loading

        for architecture in self.networks:
            self._class(architecture)
        model, self.said = loading.load(AutoModel, directory, dtype, config or {})
        found: torch.nn.Module = model
        return found

    def _class(self, architecture: str) -> Any:
        """Import a network and make it known to transformers' Auto classes."""
        from transformers import AutoConfig, AutoModel

        if architecture not in self.networks:
            hint = close(architecture, self.networks)
            raise TaskError(
                f"model.architecture: task {self.name} has {', '.join(self.networks)}, and no {architecture!r}{hint}"
            )
        module, _, name = self.networks[architecture].partition(":")
        source = getattr(importlib.import_module(module), name)
        AutoConfig.register(architecture, source.config_class, exist_ok=True)
        AutoModel.register(source.config_class, source, exist_ok=True)
        return source

    def _check_entries(
        self, architecture: str, default: Any, config: Mapping[str, Any], decided: Mapping[str, Any]
    ) -> None:
        check_entries(architecture, default, config)
        if wrong := [key for key in config if key in decided]:
            raise TaskError(f"model.config: {wrong[0]!r} is no entry for a job to set: it follows from the data")

    def _config(self, architecture: str, source: Any, entries: Mapping[str, Any]) -> Any:
        try:
            return source(**entries)
        except Exception as error:  # as above
            raise TaskError(f"model.config for {architecture}: {last_line(error)}") from error
