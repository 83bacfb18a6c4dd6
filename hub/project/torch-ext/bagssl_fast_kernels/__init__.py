"""Kernels for bag-of-patches self-supervised learning; all bags are slot-major, [P, B, ...]."""

from . import layers
from .bag_pool import bag_pool
from .linear_bn_relu import linear_bn_relu
from .patch_embed import patch_embed
from .patch_views import patch_views
from .tcr import tcr
from .vicreg import vicreg

__all__ = [
    "bag_pool",
    "layers",
    "linear_bn_relu",
    "patch_embed",
    "patch_views",
    "tcr",
    "vicreg",
]
