"""From images to bags of patches: `open_source` opens a data set, `BagLoader` makes batches."""

from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import Batch, ImageBatch
from bagssl_fast.data.decoding import MAX_PIXELS, ImageError
from bagssl_fast.data.folders import open_files
from bagssl_fast.data.loader import BagLoader
from bagssl_fast.data.open import open_source
from bagssl_fast.data.settings import Decoding, Order, Output, Share, Threads
from bagssl_fast.data.source import Source

__all__ = [
    "MAX_PIXELS",
    "Augment",
    "BagLoader",
    "Batch",
    "Decoding",
    "ImageBatch",
    "ImageError",
    "Order",
    "Output",
    "Share",
    "Source",
    "Threads",
    "open_files",
    "open_source",
]
