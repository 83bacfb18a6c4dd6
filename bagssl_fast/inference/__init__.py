"""Using a trained encoder: images to bag embeddings, scikit-learn, graphs for other runtimes."""

from bagssl_fast.inference.bag_encoder import BagEncoder

__all__ = ["BagEncoder"]
