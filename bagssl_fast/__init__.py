"""bagssl_fast: a fast training engine for bag-of-patches self-supervised learning."""

__version__ = "0.1.0"
