"""The main job on a real model, without any question: prune, store, pack, time, generate, and show it beside dense."""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pumice.analyze.masks import choose_layers, pictures
from pumice.analyze.record import Column, Point, Run, Sentences
from pumice.core.errors import PumiceError
from pumice.engine.bench import bench
from pumice.engine.data import consecutive_windows, default_text, random_windows, tokenize
from pumice.engine.evaluate import agreement, perplexity
from pumice.engine.generate import generate
from pumice.engine.models import LoadedModel, demo_model, load_model
from pumice.engine.pack import describe, pack
from pumice.engine.prune import prune
from pumice.engine.store import load
from pumice.engine.zeroshot import run_tasks
from pumice.kernels.features import machine_stamp
from pumice.prune.run import PruneResult, peak_memory_bytes
from pumice.report import disk_bytes, write_report

DENSITIES = (0.8, 0.7, 0.6, 0.5)
ACCEPTABLE = 1.15
"""The demo takes the sparsest model whose perplexity is within 15 % of dense."""
PROMPT = "Explain in one sentence why the sky is blue."
TASKS = ("piqa", "arc_easy")
QUESTIONS = 60


@dataclass
class Settings:
    """How much the demo calibrates on and evaluates."""

    out: Path
    method: str = "sparsegpt"
    samples: int = 32
    seqlen: int = 512
    windows: int = 16
    tasks_dir: Path | None = None


def dense_bytes(model: nn.Module) -> int:
    """Bytes that the dense model takes on disk: every parameter once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Demo:
    """One run of the demo; each step prints one line and keeps what the report needs."""

    def __init__(self, settings: Settings) -> None:
        from rich.console import Console

        self.settings, self.console = settings, Console(stderr=True, highlight=False)
        self.start = time.perf_counter()

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.perf_counter() - self.start:5.0f} s[/]  {text}")

    def run(self) -> Run:
        """Everything, in order; returns what the report shows."""
        source = demo_model()
        self.say(f"loading {source.name} ({source.stat().st_size / 1e6:.0f} MB, 4-bit GGUF) as bf16")
        loaded = load_model(source)
        tokenizer = loaded.need_tokenizer()
        first = tokenize(default_text("calibration"), tokenizer)
        second = tokenize(default_text("evaluation"), tokenizer)
        settings = self.settings
        calibration = random_windows(first, settings.samples, settings.seqlen)
        evaluation = consecutive_windows(second, settings.seqlen, settings.windows)
        dense = loaded.model
        base = perplexity(dense, evaluation)
        self.say(f"dense perplexity {base:.2f} on {len(evaluation)} windows of {settings.seqlen} tokens")
        chosen, curve = self._sweep(dense, tokenizer, calibration, evaluation, base)
        result, folder = chosen
        return self._measure(loaded, folder, result, evaluation, curve)

    def _sweep(
        self, dense: nn.Module, tokenizer: Any, calibration: torch.Tensor, evaluation: torch.Tensor, base: float
    ) -> tuple[tuple[PruneResult, Path], list[Point]]:
        """Prune to falling densities until the quality is no longer acceptable; the last acceptable one is the demo's."""
        curve = [Point(1.0, base, label="dense")]
        best: tuple[PruneResult, Path] | None = None
        for density in DENSITIES:
            model, folder = copy.deepcopy(dense), self.settings.out / f"density-{density:g}"
            result = prune(
                model, self.settings.method, density=density, data=calibration, tokenizer=tokenizer, out=folder
            )
            quality = perplexity(model, evaluation)
            curve.append(Point(density, quality, disk_bytes=disk_bytes(folder), label=f"density {density:g}"))
            accepted = quality <= ACCEPTABLE * base
            verdict = "accepted" if accepted else f"more than {ACCEPTABLE - 1:.0%} worse than dense"
            self.say(f"{self.settings.method} at density {density:g}: perplexity {quality:.2f}, {verdict}")
            keep = accepted or best is None
            if keep and best is not None:
                shutil.rmtree(best[1])
            if keep:
                best = (result, folder)
            else:
                shutil.rmtree(folder)
            if not accepted and density <= 0.6:
                break
        assert best is not None
        return best, curve

    def _measure(
        self, loaded: LoadedModel, folder: Path, result: PruneResult, evaluation: torch.Tensor, curve: list[Point]
    ) -> Run:
        dense, tokenizer = loaded.model, loaded.need_tokenizer()
        out = self.settings.out / "model"
        folder.rename(out)
        result.path = str(out)
        sparse = load(out)
        masks = pictures(sparse, choose_layers(result.to_dict()["layers"]))
        self.say("timing every layer: dense against each sparse layout")
        packed_dense, sparse = pack(copy.deepcopy(dense), batch=(1,)), pack(sparse, batch=(1,))
        self.say("measuring quality of what runs: the packed model, beside dense")
        models = {"dense bf16": dense, "dense, packed": packed_dense, "sparse": sparse}
        columns = [Column(name) for name in models]
        for column, model in zip(columns, models.values(), strict=True):
            column.density = result.density if column.name == "sparse" else 1.0
            column.disk_bytes = disk_bytes(out) if column.name == "sparse" else dense_bytes(dense)
            column.seqlen, column.windows = evaluation.shape[1], len(evaluation)
        columns[0].perplexity = columns[1].perplexity = curve[0].perplexity
        columns[2].perplexity = perplexity(sparse, evaluation)
        for column, model in zip(columns[1:], (packed_dense, sparse), strict=True):
            same = agreement(model, dense, evaluation[: max(2, len(evaluation) // 4)])
            column.kl, column.top1 = same.kl, same.top1
        if self.settings.tasks_dir is not None:
            self._tasks({"dense bf16": dense, "sparse": sparse}, columns, tokenizer)
        self.say("timing prefill and decoding, the models in turns")
        speeds = bench(models, against=None, batch=1, tokenizer=tokenizer, repeats=5)
        for column in columns:
            column.add_speed(speeds, column.name)
        for column, model in zip(columns, models.values(), strict=True):
            column.memory_bytes = self._memory(model, column.memory_bytes)
        texts = {name: generate(model, tokenizer, PROMPT, 40).text for name, model in models.items()}
        description = describe(sparse).to_dict()
        return Run(
            command=" ".join(["python -m pumice.demo", *sys.argv[1:]]),
            title=f"SmolLM2-135M-Instruct, {self.settings.method} at density {result.density:.2f}",
            model={
                "name": "SmolLM2-135M-Instruct",
                "source": loaded.path.name,
                "input_bytes": loaded.input_bytes,
                "input_format": "GGUF, 4 bit",
                "kind": loaded.kind,
                "parameters": sum(p.numel() for p in dense.parameters()),
            },
            recipe=result.recipe,
            prune=result.to_dict(),
            columns=columns,
            curve=curve,
            kept=[{"name": "model.embed_tokens, lm_head (tied)", "reason": "embeddings and head are kept by default"}],
            packed=description["layers"],
            bench=speeds.settings,
            generations=[Sentences(PROMPT, texts)],
            masks=masks,
            notes=self._notes(loaded, result, speeds),
            machine=machine_stamp(),
        )

    @staticmethod
    def _memory(model: nn.Module, parameters: int | None) -> int | None:
        """Parameters and buffers, and the copies that oneDNN keeps of dense layers beside them."""
        copies = sum(layer.bytes - layer.dense_bytes for layer in describe(model).layers if layer.layout == "dense")
        return None if parameters is None else parameters + copies

    def _tasks(self, models: dict[str, nn.Module], columns: list[Column], tokenizer: Any) -> None:
        self.say(f"zero-shot: {QUESTIONS} questions each of {', '.join(TASKS)}")
        for column in columns:
            if column.name in models:
                column.tasks = run_tasks(
                    models[column.name], tokenizer, TASKS, tasks_dir=self.settings.tasks_dir, limit=QUESTIONS
                )

    def _notes(self, loaded: LoadedModel, result: PruneResult, speeds: Any) -> list[str]:
        return [
            *loaded.notes,
            *result.notes,
            f"calibrated on {self.settings.samples} windows of {self.settings.seqlen} tokens from one half of Python's "
            "help texts, evaluated on the other half",
            f"timed with {speeds.settings['threads']} threads; the whole demo took "
            f"{time.perf_counter() - self.start:.0f} s and {peak_memory_bytes() / 1e9:.1f} GB at its peak",
        ]


def main() -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pumice-demo"), help="folder to write (replaced)")
    parser.add_argument("--method", default="sparsegpt", help="recipe to prune with")
    parser.add_argument("--tasks-dir", type=Path, default=None, help="folder with zero-shot questions (piqa.jsonl, …)")
    args = parser.parse_args()
    if args.out.exists() and not (args.out / "report.json").exists() and any(args.out.iterdir()):
        print(f"error: out={str(args.out)!r} exists and is no demo folder: name another one with --out.", file=sys.stderr)
        return 2
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    try:
        run = Demo(Settings(args.out, args.method, tasks_dir=args.tasks_dir)).run()
        html, _ = write_report(args.out, [run])
    except PumiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from pumice.cli import print_summary

    print_summary([run])
    print(f"\nreport: {html}\nmodel:  {args.out / 'model'}   (try: pumice generate {args.out / 'model'} \"Hello\")")
    return 0


if __name__ == "__main__":
    sys.exit(main())
