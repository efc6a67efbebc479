"""PERP: retrain what is small, and merge it into the weights that are left. Shapes: O outputs, I inputs, R rank."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pumice.core.errors import PumiceError
from pumice.core.registry import repair
from pumice.prune.repair.base import Job, train
from pumice.prune.repair.objective import Objective


class MaskedAdapter(nn.Module):
    """W + s·M∘(B A), or W∘(B A) with `multiply`: zeros of W stay zero whatever A and B become."""

    def __init__(self, weight: Tensor, rank: int, scale: float, multiply: bool, generator: torch.Generator) -> None:
        super().__init__()
        o, i = weight.shape[0], weight[0].numel()
        self.scale, self.multiply = scale, multiply
        self.register_buffer("mask", weight != 0, persistent=False)
        if multiply:
            down, up = torch.full((rank, i), rank**-0.5), torch.full((o, rank), rank**-0.5)
            # Equal rows would get equal gradients for ever.
            down += 0.01 * torch.randn(rank, i, generator=generator)
        else:
            down, up = torch.randn(rank, i, generator=generator) * i**-0.5, torch.zeros(o, rank)
        self.down, self.up = nn.Parameter(down.to(weight.device)), nn.Parameter(up.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            product = (self.up @ self.down).view_as(weight)
            return (
                weight * product
                if self.multiply
                else torch.addcmul(weight, self.get_buffer("mask"), product, value=self.scale)
            )


@repair("perp", key="perp", paper="arXiv:2312.15230", minutes=5.0)
def perp(
    model: nn.Module,
    job: Job,
    *,
    rank: Annotated[int, "rank of the adapters; 0 trains biases and norms only"] = 16,
    scale: Annotated[float, "what the adapters' product is multiplied with"] = 2.0,
    mode: Annotated[str, "lora adds M∘(BA) to the weights, scale multiplies them with BA"] = "lora",
    lr: Annotated[float, "highest learning rate"] = 1e-3,
    distil: Annotated[
        float, "weight of the divergence from the dense model, where it is given, beside the task's loss"
    ] = 1.0,
    logits: Annotated[float, "share of a window's positions whose logits are computed and compared"] = 1.0,
    steps: Annotated[int, "most optimizer steps"] = 100_000,
    batch: Annotated[int, "windows per step"] = 2,
) -> dict[str, Any]:
    """Train biases, norms and masked low-rank adapters end to end, then merge them: the mask does not change (PERP).

    A few per cent of the parameters are trained (the result says how many), so that optimizer states cost little memory.
    With the dense model at hand its logits are a second target (the paper trains on the task's loss alone).
    """
    if mode not in ("lora", "scale"):
        raise PumiceError(f"mode={mode!r} must be lora or scale.")
    if rank < 0:
        raise PumiceError(f"rank={rank} must not be negative.")
    generator = torch.Generator().manual_seed(job.seed)
    small = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    adapters: list[Tensor] = []
    wrapped: list[nn.Module] = []
    try:
        for view in job.views if rank else ():
            if view.expert is not None or parametrize.is_parametrized(view.module, view.parameter):
                continue
            adapter = MaskedAdapter(view.tensor.detach(), rank, scale, mode == "scale", generator)
            parametrize.register_parametrization(view.module, view.parameter, adapter)
            wrapped.append(view.module)
            adapters += [adapter.down, adapter.up]
        if rank and len(wrapped) < len(job.views):
            job.notes.append(f"{len(job.views) - len(wrapped)} experts of fused tensors got no adapters")
        parameters = [*small, *adapters]
        if not parameters:
            raise PumiceError(f"rank={rank}: the model has no biases or norms to train; give a rank of at least 1.")
        facts = train(
            model,
            parameters,
            Objective(model, job, distil, logits=logits),
            job,
            lr=lr,
            steps=steps,
            batch=batch,
            name="perp",
        )
    finally:
        for module in wrapped:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    total = sum(p.numel() for p in model.parameters())
    return {**facts, "trained": sum(p.numel() for p in parameters), "parameters": total}
