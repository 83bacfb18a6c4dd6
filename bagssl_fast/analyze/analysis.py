"""An analysis: the chosen studies in turn, their results kept, and the report of them all."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagssl_fast import cli, machine
from bagssl_fast.analyze import report
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.options import Analyze
from bagssl_fast.analyze.study import CLAIMS, MODULES, Result, Study
from bagssl_fast.config import Config
from bagssl_fast.files import write_atomic
from bagssl_fast.terminal import say

About = dict[str, Any]
# --quick: steps of a training, labeled images of a probe.
QUICK_STEPS, QUICK_BANK = 100, 1000


def studies(claims: Sequence[int]) -> list[Study]:
    """The studies of the chosen claims, in order."""
    names = [MODULES[claim - 1] for claim in sorted(set(claims))]
    found: list[Study] = [
        importlib.import_module(f"bagssl_fast.analyze.{name}").STUDY for name in names
    ]
    return found


def examine(study: Study, context: Context) -> Result:
    """The kept result of a study, or a new one, which is then kept.

    A kept one counts only if recipe, seeds and images are the same. What an interrupted study has
    cost so far is kept too; models and scores know themselves what they have cost.
    """
    path = study.result_path(context.out)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = context.settings()
    if kept.get("settings") != settings:
        kept = {"settings": settings, "seconds": 0.0}
    if "result" in kept:
        say(f"claim {study.claim}: kept result, {path}")
        return Result.from_json(kept["result"])
    report.check_packages()
    say(f"claim {study.claim}: {study.title}")
    started = time.monotonic()
    context.costs, context.spent = {}, 0.0
    try:
        result = study.run(context)
    finally:
        own = max(0.0, time.monotonic() - started - context.spent)
        kept["seconds"] = round(kept["seconds"] + own, 1)
        write_atomic(path, (json.dumps(kept) + "\n").encode())
    result = replace(result, seconds=kept["seconds"], costs=context.costs)
    text = json.dumps(kept | {"result": result.to_json()}, indent=1) + "\n"
    write_atomic(path, text.encode())
    say(f"claim {study.claim}: {result.verdict}; {result.took:.1f} s")
    return result


def make_context(options: Analyze) -> Context:
    """The context that a command line asks for."""
    base: Config = cli.load(cli.find_recipe(options.config))
    base = replace(
        base,
        data=options.data,
        test_data=options.test_data,
        device=options.device,
        threads=options.threads,
    )
    if options.quick:
        steps = min(base.max_steps or QUICK_STEPS, QUICK_STEPS)
        smaller = replace(base.eval, max_train_images=QUICK_BANK, max_test_images=QUICK_BANK // 2)
        base = replace(base, max_steps=steps, eval=smaller)
    seeds = range(1 if options.quick else options.seeds)
    return Context(base, options.out, tuple(seeds), options.quick)


def describe(options: Analyze, context: Context, results: Sequence[Result]) -> About:
    """What stands at the head of a report: command, data, seeds, time, machine."""
    flags = [f"--data {Path(context.base.data).name}", f"--seeds {len(context.seeds)}"]
    if options.claims != CLAIMS:
        flags.append(f"--claims {','.join(map(str, options.claims))}")
    if options.config != "analysis":
        flags.append(f"--config {Path(options.config).name}")
    if options.quick:
        flags.append("--quick")
    made_on = machine.report()
    made = {path: cost for result in results for path, cost in result.costs.items()}
    return {
        "command": " ".join(["bagssl analyze", *flags]),
        "data": Path(context.base.data).name,
        "recipe": Path(options.config).name,
        "seeds": len(context.seeds),
        "quick": context.quick,
        "seconds": round(sum(r.seconds for r in results) + sum(made.values()), 1),
        "machine": {key: made_on[key] for key in ("cpu", "cores", "gpus", "packages", "git")},
    }


def write(context: Context, results: Sequence[Result], about: About) -> None:
    """Writes results.json, README.md (the report for a repository) and report.html."""
    content = {"about": about, "results": [result.to_json() for result in results]}
    text = report.markdown(results, about)
    files = {
        "results.json": json.dumps(content, indent=1) + "\n",
        "README.md": text,
        "report.html": report.page(text, context.out),
    }
    for name, body in files.items():
        write_atomic(context.out / name, body.encode())
    say(f"written  {context.out / 'report.html'}")
