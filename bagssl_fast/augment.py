"""The augmentation of a view: a plain record that configuration, loader and ops share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Not part of a view: whatever cuts many views at once takes one value for all of them.
SHARED = ("size", "interpolation", "blur_kernel", "mean", "std")


@dataclass(frozen=True)
class Augment:
    """How a patch (or a whole view) is cut and colored; words and pixels are torchvision's.

    The stages run in this order: crop and resize, flip, color jitter, grayscale, blur, solarize,
    normalize. The defaults are EMP-SSL's for CIFAR-10 (Tong et al. 2023, its main.py).

    Args:
        size: Side of the square result, in pixels.
        scale: Area of the crop as a fraction of the image's, (lowest, highest); equal ends make
            fixed-scale patches, the bag-of-patches setting.
        ratio: Aspect ratio of the crop, (lowest, highest).
        interpolation: bilinear or bicubic, antialiased.
        hflip: Probability of a horizontal flip.
        brightness: Strength of the brightness jitter; the factor lies in 1 +- strength.
        contrast: Strength of the contrast jitter.
        saturation: Strength of the saturation jitter.
        hue: Strength of the hue jitter, at most 0.5.
        jitter_prob: Probability of the color jitter.
        grayscale_prob: Probability of dropping the colors.
        blur_prob: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels, (lowest, highest).
        blur_kernel: Its width in pixels, odd; 0 chooses it from sigma and size.
        solarize_prob: Probability of inverting bright pixels.
        solarize_threshold: Pixels from this value on (0 to 255) are inverted.
        mean: Mean per channel to subtract, for pixels in 0..1.
        std: Standard deviation per channel to divide by.
    """

    size: int = 32
    scale: tuple[float, float] = (0.25, 0.25)
    ratio: tuple[float, float] = (1.0, 1.0)
    interpolation: str = "bilinear"
    hflip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: float = 0.1
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 0
    solarize_prob: float = 0.1
    solarize_threshold: float = 128.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def none(
        cls,
        size: int = 32,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        scale: tuple[float, float] = (1.0, 1.0),
        ratio: tuple[float, float] = (1.0, 1.0),
    ) -> Augment:
        """A crop and nothing else: no flip, no colors, no blur."""
        return cls(
            size=size,
            scale=scale,
            ratio=ratio,
            hflip=0.0,
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            hue=0.0,
            jitter_prob=0.0,
            grayscale_prob=0.0,
            blur_prob=0.0,
            solarize_prob=0.0,
            mean=mean,
            std=std,
        )


def differing(augments: Sequence[Augment]) -> list[str]:
    """The `SHARED` fields in which augmentations differ."""

    def values(name: str) -> set[object]:
        found = (getattr(augment, name) for augment in augments)
        return {tuple(value) if isinstance(value, list) else value for value in found}

    return [name for name in SHARED if len(values(name)) > 1]
