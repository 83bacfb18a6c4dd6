"""Do the fused ops train as the reference does? `python bench/convergence.py --data CIFAR.tar`

Trains PatchNet for 200 steps three times for each loss, from the same weights on the same bags
(dense ones by default): with the reference of every op, with the implementation for this device,
and, as a control, with the reference on one thread, whose sums are rounded differently. Training
amplifies rounding: no implementation can be expected to be closer to the reference than the
control is. The exit code is 1 if the fused curve, a mean over 10 steps, is farther from the
reference's than three times the control's largest distance, or 1% of the loss's range, whichever
is more; or if the first loss differs by more than 1e-5, in bf16 1e-3.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bagssl_fast.train import main as train

LOSSES = {"vicreg": "VICReg", "emp_ssl": "EMP-SSL (TCR)"}
FIRST = {"fp32": 1e-5, "bf16": 1e-3}  # how far apart the first loss may be
ROOT = Path(__file__).resolve().parent.parent


def curve(
    loss: str, impl: str, options: argparse.Namespace, folder: Path, threads: int = 0
) -> list[float]:
    """The loss of every step of one training."""
    run = folder / f"{loss}-{impl}-{threads}"
    code = train(
        f"--config {ROOT}/configs/{options.config}.yaml --data {options.data} --run_dir {run} "
        f"--impl {impl} --precision {options.precision} --compile false "
        f"--threads {threads} --loss.name {loss} --loss.options {{}} --encoder.width 32 "
        f"--head.options.normalize {loss == 'emp_ssl'} --batch_size 64 "
        f"--max_steps {options.steps} "
        "--log_every 1 --eval.enabled false".split(" ")
    )
    if code != 0:
        raise SystemExit(f"training {loss} with --impl {impl} failed with code {code}")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", default="cifar10_dense", help="recipe, by its name")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--impl", default="auto", help="what is compared with the reference")
    parser.add_argument("--plot", type=Path, help="write the curves as PNG")
    parser.add_argument("--json", type=Path, help="write the curves as JSON")
    options = parser.parse_args()
    curves: dict[str, dict[str, list[float]]] = {}
    apart = []
    with tempfile.TemporaryDirectory() as folder:
        for loss, title in LOSSES.items():
            both = {
                name: curve(loss, impl, options, Path(folder), threads)
                for name, impl, threads in (
                    ("reference", "reference", 0),
                    ("reference, one thread", "reference", 1),
                    ("fused", options.impl, 0),
                )
            }
            curves[loss] = both
            truth, control, ours = both.values()
            first = abs(ours[0] - truth[0]) / abs(truth[0])
            gap, least = distance(ours, truth), distance(control, truth)
            print(
                f"{title}: the fused curve is at most {gap:.1%} of the loss's range from the "
                f"reference's, the control {least:.1%}; the first loss differs by {first:.0e}"
            )
            if gap > max(3 * least, 0.01) or first > FIRST[options.precision]:
                apart.append(title)
    if options.json:
        options.json.write_text(json.dumps(curves) + "\n")
    if options.plot:
        plot(curves, options.plot)
    if apart:
        print(f"the curves differ: {', '.join(apart)}", file=sys.stderr)
    return int(bool(apart))


def distance(curve: list[float], truth: list[float], window: int = 10) -> float:
    """Largest distance of two curves' moving means, as a share of the loss's range."""

    def smooth(values: list[float]) -> list[float]:
        size = min(window, len(values))
        return [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]

    gaps = [abs(a - b) for a, b in zip(smooth(curve), smooth(truth), strict=True)]
    return max(gaps) / (max(truth) - min(truth))


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The curves of each loss, the fused one dashed over the reference's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4), layout="constrained")
    for axis, (loss, both) in zip(axes, curves.items(), strict=True):
        styles = (
            {"color": "0.75", "linewidth": 4},
            {"color": "0.3", "linewidth": 1},
            {"color": "#c03", "linestyle": "--"},
        )
        for (name, values), style in zip(both.items(), styles, strict=True):
            axis.plot(range(1, len(values) + 1), values, label=name, **style)
        axis.set(title=LOSSES[loss], xlabel="step", ylabel="loss")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
