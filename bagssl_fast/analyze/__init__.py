"""The paper's claims about what self-supervised learning learns, tested on your data.

`python -m bagssl_fast.analyze` trains what it needs, measures, and writes one directory with
`report.html`, the figures as PNG and `results.json`.

- `study.py`: the words: a `Study` tests one claim in a `Context` and gives a `Result`.
- `models.py`: train a model or take the finished one; its folder is named by its configuration.
- `verdict.py`: from numbers and their spread to "holds", "does not hold" or "undecided".
- `figures.py`: one look for all figures.
- one module per claim: `patches.py` (1), `aggregation.py` (2), `mean.py` (3), `locality.py` (4),
  `cooccurrence.py` (5), `epochs.py` (6).
- `html.py`: the report.
"""
