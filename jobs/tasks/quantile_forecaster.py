"""What makes quantiles of the steps that come: scaling, loss, metrics. What derives from it reads data and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Better, Columns, TaskOptions, forecast_scores
from jobs.tasks.finite import finite
from jobs.tasks.own_networks import OwnNetworks
from jobs.tasks.series import DRAWN

if TYPE_CHECKING:
    import torch


class QuantileForecaster(OwnNetworks):
    """Networks that see a scaled context and answer scaled quantiles."""

    unit: ClassVar[str] = "steps"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "mase": "min",
        "smape": "min",
        "coverage_error": "min",
    }
    """Seasonal naive's and the coverage itself are measured beside them, and are none to choose a model by."""

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.horizon = 1
        self.context_length = 1
        self.levels: list[float] = [0.5]
        """Of the quantiles, in order; the middle one is 0.5."""
        self.scaling = "mean-absolute"
        self.drawn: list[str] = []
        """The names of the series that are drawn."""

    def known(self) -> dict[str, Any]:
        """Return the lengths and the number of quantiles."""
        lengths = {"context_length": self.context_length, "horizon": self.horizon}
        return {**lengths, "num_quantiles": len(self.levels)}

    def placeholders(self) -> dict[str, Any]:
        """Return small ones."""
        return {"context_length": 8, "horizon": 1, "num_quantiles": 1}

    def collate(self, rows: Columns) -> Batch:
        """Return the columns (B, …): drawn int64, everything else fp32."""
        import torch

        return {
            key: torch.from_numpy(column.astype(np.int64 if key == "drawn" else np.float32))
            for key, column in rows.items()
        }

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the quantile loss of the known steps, in the scale of each context: a scalar () fp32; their number ()."""
        found, shift, scale = self._scaled(model, batch)
        future = (batch["future"] - shift) / scale
        total = forecast_scores.pinball(found, future, batch["known"], self._levels(found))
        return total, batch["known"].sum().long()

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss and targets, scalars; of ends also errors, ours and seasonal naive's, and what is drawn (S, …)."""
        import torch

        found, shift, scale = self._scaled(model, batch)
        future = (batch["future"] - shift) / scale
        total = forecast_scores.pinball(found, future, batch["known"], self._levels(found))
        sums = {"loss": total, "targets": batch["known"].sum().long()}
        if "naive" not in batch:
            return sums
        quantiles = (found * scale.unsqueeze(-1) + shift.unsqueeze(-1)).sort(-1).values
        ours = forecast_scores.sums(quantiles, batch["future"], batch["known"], self.levels, batch["scale"])
        naive = batch["naive"].unsqueeze(-1)
        theirs = forecast_scores.sums(naive, batch["future"], batch["known"], self.levels, batch["scale"])
        sums |= {**ours, **{f"naive_{name}": theirs[name] for name in ("mase", "smape")}}
        parts = [batch[name] for name in ("context", "observed", "future", "known")]
        rows = torch.cat([torch.ones_like(shift), *parts, quantiles.flatten(1)], -1).double()
        slots = torch.zeros(1 + max(DRAWN, len(self.drawn)), rows.shape[1], dtype=rows.dtype, device=rows.device)
        return {**sums, "drawn": slots.index_add_(0, batch["drawn"], rows)[1 : 1 + len(self.drawn)]}

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return loss, MASE, sMAPE (percent), seasonal naive's, and the share of what came within the band, if any."""
        summary = {"loss": sums["loss"] / max(sums["targets"], 1)}
        if "mase" not in sums:  # the rows were those to learn from
            return summary
        for name in ("mase", "smape"):
            rows = max(sums[f"{name}_rows"], 1)
            summary |= {name: sums[name] / rows, f"naive_{name}": sums[f"naive_{name}"] / rows}
        if not sums["nominal"]:  # the median alone is no band
            return summary
        coverage, nominal = (sums[name] / max(sums["targets"], 1) for name in ("within", "nominal"))
        return {**summary, "coverage": coverage, "coverage_error": abs(coverage - nominal)}

    def forecast(self, model: torch.nn.Module, contexts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return the quantiles of what follows, in order, float32 (B, H, Q), of B pairs of values and observed (C,).

        Raises:
            TaskError: a quantile is not finite.
        """
        import torch

        pairs = zip(*contexts, strict=True)
        context, observed = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in pairs)
        device = next(model.parameters()).device
        batch = {"context": context.to(device), "observed": observed.to(device)}
        with torch.inference_mode():
            found, shift, scale = self._scaled(model, batch)
            quantiles = (found * scale.unsqueeze(-1) + shift.unsqueeze(-1)).sort(-1).values
        answer: np.ndarray = finite(quantiles).cpu().numpy()
        return answer

    def _scaled(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scaled quantiles (B, H, Q) fp32, and shift and scale (B, 1) of each context.

        The scale is the mean absolute value of what is observed, as in DeepAR (Salinas et al. 2020), or the deviation.
        """
        import torch

        context, observed = batch["context"], batch["observed"]
        count = observed.sum(-1, keepdim=True).clamp(min=1)
        shift = torch.zeros_like(count)
        if self.scaling == "standard":
            shift = (context * observed).sum(-1, keepdim=True) / count
        distance = (context - shift) * observed
        power = distance.abs() if self.scaling == "mean-absolute" else distance**2
        scale = power.sum(-1, keepdim=True) / count
        scale = scale if self.scaling == "mean-absolute" else scale.sqrt()
        scale = torch.where(scale > 1e-5 * shift.abs(), scale, 1.0)  # else all values are one
        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        scaled = distance / scale
        middle = scaled.sum(-1, keepdim=True) / count  # what is missing is as the others are
        values = torch.where(observed > 0, scaled, middle)
        found = model(values=values.to(dtype), observed=observed.to(dtype)).float()
        return found, shift, scale

    def _levels(self, like: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.tensor(self.levels).to(like.device, non_blocking=True)
