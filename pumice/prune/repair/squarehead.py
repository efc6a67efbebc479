"""SquareHead: sparse fine-tuning that follows the dense model's features."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from pumice.core.registry import repair
from pumice.prune.repair.base import Job, train
from pumice.prune.repair.objective import Objective


@repair("squarehead", key="squarehead", paper="arXiv:2310.06927", minutes=10.0)
def squarehead(
    model: nn.Module,
    job: Job,
    *,
    lr: Annotated[float, "highest learning rate"] = 1e-4,
    task: Annotated[float, "weight of the task's loss"] = 1.0,
    distil: Annotated[float, "weight of the divergence from the dense model's logits"] = 1.0,
    features: Annotated[
        float, "weight of the relative distance from the dense model's features, summed over blocks"
    ] = 1.0,
    logits: Annotated[float, "share of a window's positions whose logits are computed and compared"] = 1.0,
    steps: Annotated[int, "most optimizer steps"] = 100_000,
    batch: Annotated[int, "windows per step"] = 2,
) -> dict[str, Any]:
    """Fine-tune every kept weight of the pruned layers, biases and norms, mask fixed, towards the dense model's features.

    Loss = task + KL to the dense model's logits + Σ over blocks MSE(f_dense, f)/MSE(f_dense, 0) on tokens that are no
    padding. Embeddings and whatever was not pruned stay. AdamW keeps two more copies of what it trains.
    """
    job.need_teacher("squarehead")
    sparse = {id(view.tensor) for view in job.views}
    parameters = [p for p in model.parameters() if p.is_floating_point() and (id(p) in sparse or p.dim() == 1)]
    objective = Objective(model, job, distil, features, task, logits)
    facts = train(model, parameters, objective, job, lr=lr, steps=steps, batch=batch, name="squarehead")
    trained = sum(int(masked.mask.sum()) for masked in job.masks) + sum(p.numel() for p in parameters if p.dim() == 1)
    return {**facts, "trained": trained, "parameters": sum(p.numel() for p in model.parameters())}
