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

from pumice.analyze.knee import sweep
from pumice.analyze.masks import choose_layers, stored_pictures
from pumice.analyze.measure import measure_run, model_facts, pruned_run
from pumice.analyze.record import Point, Run
from pumice.core.errors import PumiceError
from pumice.engine.data import consecutive_windows, default_text, random_windows, tokenize
from pumice.engine.evaluate import perplexity
from pumice.engine.models import LoadedModel, demo_model, load_model
from pumice.engine.prune import prune
from pumice.prune.run import PruneResult, peak_memory_bytes
from pumice.recipe import find
from pumice.report import disk_bytes, write_report

DENSITIES = (0.7, 0.6, 0.5, 0.4)
ACCEPTABLE = 1.15
"""The demo takes the sparsest model whose perplexity is within 15 % of dense."""
SCOUT = "sparsegpt"
"""A fast recipe that finds how sparse this model may be; the best recipe then tries the next density."""
PROMPT = "Explain in one sentence why the sky is blue."
TASKS = ("piqa", "arc_easy")
QUESTIONS = 24


@dataclass
class Settings:
    """How much the demo calibrates on and evaluates."""

    out: Path
    method: str = "auto"
    samples: int = 16
    seqlen: int = 512
    windows: int = 12
    tasks_dir: Path | None = None


class Demo:
    """One run of the demo; each step prints one line and keeps what the report needs."""

    def __init__(self, settings: Settings) -> None:
        from rich.console import Console

        self.settings, self.console = settings, Console(stderr=True, highlight=False)
        self.start = time.perf_counter()

    def say(self, text: str) -> None:
        """One line with the time so far."""
        self.console.print(f"[dim]{time.perf_counter() - self.start:5.0f} s[/]  {text}")

    def run(self) -> Run:
        """Everything, in order; returns what the report shows."""
        source, settings = demo_model(), self.settings
        self.say(f"loading {source.name} ({source.stat().st_size / 1e6:.0f} MB, 4-bit GGUF) as bf16")
        loaded = load_model(source)
        tokenizer = loaded.need_tokenizer()
        calibration = random_windows(
            tokenize(default_text("calibration"), tokenizer), settings.samples, settings.seqlen
        )
        evaluation = consecutive_windows(
            tokenize(default_text("evaluation"), tokenizer), settings.seqlen, settings.windows
        )
        base = perplexity(loaded.model, evaluation)
        self.say(f"dense: perplexity {base:.2f} on {len(evaluation)} windows of {settings.seqlen} tokens")
        result, curve = self._sweep(loaded.model, tokenizer, calibration, evaluation, base)
        return self._measure(loaded, result, evaluation, curve)

    def _sweep(
        self, dense: nn.Module, tokenizer: Any, calibration: torch.Tensor, evaluation: torch.Tensor, base: float
    ) -> tuple[PruneResult, list[Point]]:
        """Prune to falling densities with the scout, and to the first that is too much for it with the best recipe.

        The sparsest model whose quality is acceptable stays as `OUT/model`.
        """
        curve, best, final = [Point(1.0, base, label="dense", series=SCOUT)], None, self.settings.out / "model"
        folder, result = self.settings.out / "next", None
        best_recipe = find(self.settings.method).name

        def measure(density: float, method: str = SCOUT) -> float:
            nonlocal result
            model = copy.deepcopy(dense)
            result = prune(model, method, density=density, data=calibration, tokenizer=tokenizer, out=folder)
            return perplexity(model, evaluation)

        def settle(density: float, quality: float, method: str) -> bool:
            nonlocal best
            accepted, label = quality <= ACCEPTABLE * base, f"{method} at {density:g}"
            curve.append(Point(density, quality, disk_bytes=disk_bytes(folder), label=label, series=method))
            verdict = "accepted" if accepted else f"more than {ACCEPTABLE - 1:.0%} worse than dense"
            self.say(f"{method}, density {density:g}: perplexity {quality:.2f}, {verdict}")
            if accepted or best is None:
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
                best = result
            else:
                shutil.rmtree(folder)
            return accepted

        density, accepted = 1.0, True
        for density, quality, _ in sweep(DENSITIES, measure, lambda quality: quality <= ACCEPTABLE * base):
            accepted = settle(density, quality, SCOUT)
        if best_recipe != SCOUT and not accepted:
            self.say(f"{best_recipe}, the best recipe, at the density that was too much for {SCOUT}")
            settle(density, measure(density, best_recipe), best_recipe)
        assert best is not None
        return best, curve

    def _measure(self, loaded: LoadedModel, result: PruneResult, evaluation: torch.Tensor, curve: list[Point]) -> Run:
        out, settings = self.settings.out / "model", self.settings
        self.say("loading the stored model, timing every layer, measuring quality and speed beside dense")
        run = pruned_run(result, out, source=loaded.path, command=" ".join(["python -m pumice.demo", *sys.argv[1:]]))
        run.title = f"{result.recipe['name']} at density {result.density:.2f}"
        run.model = model_facts(loaded.path, "SmolLM2-135M-Instruct")
        # The demo's report is for anybody's eyes; where the package lies on this machine is nobody's business.
        run.model["source"] = loaded.path.name
        run.curve, run.masks = curve, stored_pictures(out, choose_layers(run.layers))
        run.kept = [{"name": "model.embed_tokens = lm_head", "reason": "embeddings and head are kept by default"}]
        sparse = load_model(out).model
        tasks = TASKS if settings.tasks_dir is not None else ()
        measure_run(
            run,
            loaded.model,
            sparse,
            loaded.tokenizer,
            data=evaluation,
            tasks=tasks,
            tasks_dir=settings.tasks_dir,
            seqlen=settings.seqlen,
            limit=QUESTIONS,
            prompts=[PROMPT],
            best_dense=True,
        )
        run.notes += [
            *loaded.notes,
            *result.notes,
            f"calibrated on {settings.samples} windows of {settings.seqlen} tokens from one half of Python's help texts, "
            "evaluated on the other half",
            f"the whole demo took {time.perf_counter() - self.start:.0f} s and {peak_memory_bytes() / 1e9:.1f} GB at its peak",
        ]
        return run


def main() -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pumice-demo"), help="folder to write (replaced)")
    parser.add_argument("--method", default="auto", help="recipe for the last step; sparsegpt finds the density")
    parser.add_argument("--tasks-dir", type=Path, default=None, help="folder with zero-shot questions (piqa.jsonl, …)")
    args = parser.parse_args()
    if args.out.exists() and not (args.out / "report.json").exists() and any(args.out.iterdir()):
        print(f"error: out={str(args.out)!r} exists and is no demo folder: name another with --out.", file=sys.stderr)
        return 2
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    from rich.console import Console

    from pumice.analyze.summary import summarise
    from pumice.cli.pages import summary_table

    try:
        demo = Demo(Settings(args.out, args.method, tasks_dir=args.tasks_dir))
        run = demo.run()
        html, _ = write_report(args.out, [run])
    except PumiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(summary_table(summarise([run])))
    for sentences in run.generations:
        console.print(f"\n[bold]{sentences.prompt}[/]")
        for name, text in sentences.texts.items():
            console.print(f"[dim]{name}:[/] {' '.join(text.split())}", highlight=False)
    model = args.out / "model"
    print(f'\nreport: {html}\nmodel:  {model}   (pumice generate {model} "Hello")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
