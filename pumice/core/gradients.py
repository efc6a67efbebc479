"""Statistics of the whole model that come from a backward pass of its loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.stats import evaluating
from pumice.core.view import WeightView

Loss = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The scalar loss of one batch: `loss(model, batch)` if given, else what the model returns for its labels.

    Where a batch has tokens but no labels, the tokens are the labels, padding left out. A plain module with class
    labels gets the cross-entropy.
    """
    if loss is not None:
        return loss(model, batch)
    value = None
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping) and "labels" in parameters:
        inputs = dict(batch)
        if "labels" not in inputs and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            ids = inputs["input_ids"]
            inputs["labels"] = ids if mask is None or mask.shape != ids.shape else ids.masked_fill(mask == 0, -100)
        value = getattr(model(**inputs), "loss", None)
    elif (
        isinstance(batch, Mapping) and isinstance(labels := batch.get("labels"), Tensor) and labels.dtype == torch.long
    ):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        value = F.cross_entropy(output, labels) if isinstance(output, Tensor) else None
    if value is None:
        raise PumiceError(
            "gradient statistics need a loss: pass loss=f(model, batch), or data whose batches hold labels for a model "
            "that takes them."
        )
    return value


def model_stats(
    model: nn.Module,
    views: Sequence[WeightView],
    batches: Iterable[Any],
    needs: frozenset[str],
    loss: Loss | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Gradient statistics of every view over the whole model, by view name.

    Takes the memory of the model, its gradients and one more copy of the weights per statistic; "gradients" takes one
    copy per batch. The model is in eval mode meanwhile; gradients that it already holds are kept.

    Raises:
        PumiceError: no loss can be had, it or its gradient is not finite, or "gradients" does not fit into memory.
    """
    kept: dict[str, Tensor] = {}
    if "gradients" in needs:
        batches = list(batches)
        check_room(views, len(batches))
        kept = {
            view.name: torch.zeros(view.shape_OI[0], len(batches), view.shape_OI[1], device=view.tensor.device)
            for view in views
        }
        needs = needs - {"gradients"}
    # Another view of the same fused tensor needs the same gradient, so sums are kept per parameter.
    parameters = {id(view.tensor): view.tensor for view in views}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in parameters)
        parameter.grad = None
    sums = {name: {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()} for name in needs}
    count = 0
    try:
        with torch.enable_grad(), evaluating(model):
            for batch in batches:
                value = loss_of(model, batch, loss)
                if not torch.isfinite(value):
                    raise PumiceError(
                        f"calibration: the loss is {value.item()}; look at the calibration data and the weights."
                    )
                value.backward()
                for view in views if kept else ():
                    if view.tensor.grad is not None:
                        kept[view.name][:, count] = view.as_matrix(view.tensor.grad)
                count += 1
                for key, parameter in parameters.items():
                    _add(sums, key, parameter)
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    found = {
        view.name: {name: view.as_matrix(sums[name][id(view.tensor)] / max(count, 1)) for name in needs}
        for view in views
    }
    for view_name, value in kept.items():
        found[view_name]["gradients"] = value
    for view_name, stats in found.items():
        for name, value in stats.items():
            # A sum is enough to see NaN or Inf and takes no copy of the gradients.
            if not torch.isfinite(value.sum(dtype=torch.float64)):
                raise PumiceError(
                    f"calibration: the {name} of layer {view_name} holds NaN or Inf; try --dtype float32."
                )
    return found


def _add(sums: dict[str, dict[int, Tensor]], key: int, parameter: Tensor) -> None:
    if parameter.grad is None:
        return
    gradient = parameter.grad.float()
    if "gradient" in sums:
        sums["gradient"][key] += gradient
    if "fisher_diag" in sums:
        sums["fisher_diag"][key] += gradient.square()
    parameter.grad = None


def gradients_bytes(views: Sequence[WeightView], batches: int) -> int:
    """Memory of the statistic "gradients": one float32 per weight and batch."""
    return 4 * batches * sum(view.numel for view in views)


def check_room(views: Sequence[WeightView], batches: int) -> None:
    """PumiceError if the gradients of all batches do not fit into the memory that is free now."""
    wanted, free = gradients_bytes(views, batches), _free_bytes(views[0].tensor.device) if views else None
    if free is not None and wanted > free:
        raise PumiceError(
            f"the gradients of {batches} batches take {wanted:,} bytes (4 per weight and batch) and {free:,} are free: "
            f"take samples={max(1, int(batches * free // (2 * wanted)))}, or prune fewer layers at a time with targets."
        )


def _free_bytes(device: torch.device) -> int | None:
    """Memory that can be had now; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
