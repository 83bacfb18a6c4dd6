"""Do the fused ops train as the reference does? `python bench/convergence.py --data CIFAR.tar`

Trains PatchNet on dense bags for 200 steps twice for each loss, once with the reference of every op
and once with the implementation of this device, from the same weights on the same bags, and plots
both loss curves. Rounding differs, and training amplifies it: the curves must agree to a per mille
of the loss's range at the start and to a per cent throughout, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bagssl_fast.train import main as train

LOSSES = {"vicreg": "VICReg", "emp_ssl": "EMP-SSL (TCR)"}
ROOT = Path(__file__).resolve().parent.parent


def curve(loss: str, impl: str, data: Path, steps: int, folder: Path) -> list[float]:
    """The loss of every step of one training."""
    run = folder / f"{loss}-{impl}"
    code = train(
        f"--config {ROOT}/configs/cifar10_cpu.yaml --data {data} --run_dir {run} --impl {impl} "
        f"--loss.name {loss} --loss.options {{}} --head.options.normalize {loss == 'emp_ssl'} "
        f"--encoder.width 32 --batch_size 64 --max_steps {steps} --log_every 1 "
        "--eval.enabled false".split(" ")
    )
    if code != 0:
        raise SystemExit(f"training {loss} with --impl {impl} failed with code {code}")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--impl", default="auto", help="what is compared with the reference")
    parser.add_argument("--plot", type=Path, help="write the curves as PNG")
    parser.add_argument("--json", type=Path, help="write the curves as JSON")
    options = parser.parse_args()
    curves: dict[str, dict[str, list[float]]] = {}
    apart = []
    with tempfile.TemporaryDirectory() as folder:
        for loss, title in LOSSES.items():
            both = {
                impl: curve(loss, impl, options.data, options.steps, Path(folder))
                for impl in ("reference", options.impl)
            }
            curves[loss] = both
            truth, ours = both["reference"], both[options.impl]
            span = max(truth) - min(truth)
            gaps = [abs(a - b) / span for a, b in zip(truth, ours, strict=True)]
            print(f"{title}: largest gap {max(gaps):.2e} of the range, first {gaps[0]:.1e}")
            if max(gaps) > 1e-2 or gaps[0] > 1e-3:
                apart.append(title)
    if options.json:
        options.json.write_text(json.dumps(curves) + "\n")
    if options.plot:
        plot(curves, options.plot)
    if apart:
        print(f"the curves part: {', '.join(apart)}", file=sys.stderr)
    return int(bool(apart))


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Both curves of each loss, the fused one dashed on top of the reference's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4), layout="constrained")
    for axis, (loss, both) in zip(axes, curves.items(), strict=True):
        styles = ({"color": "0.7", "linewidth": 4}, {"color": "#c03", "linestyle": "--"})
        for (impl, values), style in zip(both.items(), styles, strict=True):
            label = impl if impl == "reference" else "fused"
            axis.plot(range(1, len(values) + 1), values, label=label, **style)
        axis.set(title=LOSSES[loss], xlabel="step", ylabel="loss")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
