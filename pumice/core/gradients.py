"""Statistics of the whole model that come from a backward pass of its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    Takes the memory of the model, its gradients and one more copy of the weights per statistic. The model is in eval
    mode meanwhile; gradients that it already holds are kept.

    Raises:
        PumiceError: no loss can be had, or it or its gradient is not finite.
    """
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
    for view_name, stats in found.items():
        for name, value in stats.items():
            if not torch.isfinite(value).all():
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
