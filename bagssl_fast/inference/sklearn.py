"""Bag embeddings as a step of a scikit-learn pipeline."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagssl_fast.inference.bag_encoder import BagEncoder

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ImportError as error:
    raise ImportError(
        "bagssl_fast.inference.sklearn is a transformer for scikit-learn, which is not installed: "
        "pip install scikit-learn, or use bagssl_fast.inference.BagEncoder without it"
    ) from error


class BagFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turns images into bag embeddings, `BagEncoder.from_run(run, ...)` as a transformer.

    There is nothing to fit: the encoder is trained. It is read on first use and left out of
    pickles, which read it again from `run`.

    Args:
        run: A run directory, or a folder that `bagssl_fast.export` wrote.
        patches, layer, grid, normalize, device, precision, batch_size, num_threads: As `BagEncoder`
            has them.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        patches: int | str = 16,
        layer: str = "embedding",
        grid: int = 1,
        normalize: bool = False,
        device: str = "auto",
        precision: str = "fp32",
        batch_size: int = 0,
        num_threads: int = 0,
    ) -> None:
        self.run = run
        self.patches = patches
        self.layer = layer
        self.grid = grid
        self.normalize = normalize
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.num_threads = num_threads

    def fit(self, X: Any, y: Any = None) -> BagFeatures:
        """Reads the encoder, so that a wrong path fails here; X and y are not used."""
        self._read()
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Images, in any form that `BagEncoder` accepts, to float32 [N, dim]."""
        return np.asarray(self._read()(X).numpy())

    def _read(self) -> BagEncoder:
        """The encoder of the current parameters."""
        options = self.get_params()
        if getattr(self, "_options", None) != options:
            rest = {name: value for name, value in options.items() if name != "run"}
            self._encoder = BagEncoder.from_run(self.run, **rest)
            self._options = options
        return self._encoder

    @property
    def _n_features_out(self) -> int:
        return self._read().dim

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_encoder", "_options")}
