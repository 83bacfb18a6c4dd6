"""The paper's claims about what self-supervised learning learns, tested on your data.

`python -m bagssl_fast.analyze` trains what it needs, measures, and writes one directory with
`report.html`, the figures as PNG and `results.json`.

- `study.py`: the types: a `Study` tests one claim in a `Context` and returns a `Result`.
- `models.py`: train a model or reuse a finished one; its folder is named by its configuration.
- `verdict.py`: from numbers and their spread to "holds", "does not hold" or "undecided".
- `figures.py`: one style for all figures.
- one module per claim: `patches.py` (1), `aggregation.py` (2), `mean.py` (3), `locality.py` (4),
  `cooccurrence.py` (5), `epochs.py` (6).
- `report.py`: the report as Markdown, and the same rendered as one page.

The cost in CPU seconds per seed on one Zen 1 core, CIFAR-10, the recipe `analysis`: a training (600
steps of 64 images, two patches each) 66, of BYOL 100; reading 5,000 images with bags of 256 patches
20 to 30, or 120 where patches are a quarter of the side. Claim 1 takes 560, claim 2 another 500,
claim 3 15, claim 4 60, claim 5 90, claim 6 450: two seeds are an hour of CPU time, about 40 minutes
on two cores.
"""
