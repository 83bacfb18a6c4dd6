"""Backbones by name: what turns patches into embeddings.

`backbone.py` defines what a backbone is. PatchNet and PatchMLP (`patchnet.py`) are patch-local and
so also encode every patch of a whole image in one pass; ResNets and timm models encode single
patches.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bagssl_fast.arguments import check_options
from bagssl_fast.models.fused import fuse, obstacle
from bagssl_fast.models.patchnet import PatchMLP, PatchNet

# Up to this patch size ResNets get the CIFAR stem (3x3, stride 1, no pooling).
CIFAR_STEM_MAX = 64


class ImageBackbone(nn.Module):
    """A network `[N, 3, h, w] -> [N, F]` with the attributes of a backbone."""

    def __init__(self, net: nn.Module, patch_size: int, feature_dim: int) -> None:
        super().__init__()
        self.net, self.patch_size = net, patch_size
        self.feature_dim = self.head_dim = feature_dim

    def forward(self, patches: Tensor) -> Tensor:
        """patches `[N, 3, h, w]` -> embeddings `[N, F]`."""
        if patches.dim() != 4 or patches.shape[1] != 3:
            raise ValueError(f"expected patches [N, 3, h, w], got {list(patches.shape)}")
        return cast(Tensor, self.net(patches))


def build_encoder(
    name: str,
    patch_size: int = 16,
    width: int | None = None,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a backbone by name.

    Args:
        name: "patchnet", "patchmlp", "resnet18", "resnet50" (both torchvision's), or a timm name.
        patch_size: side of the patches it will encode, in pixels.
        width: base width of PatchNet and PatchMLP; their default if not given.
        pretrained: start from published weights (resnet50 and timm models; may download).
        options: keyword arguments of the constructor, such as PatchNet's `depth` or the
            `patch_size` of a timm ViT's tokens.

    Raises:
        ValueError: for an unknown name, a missing package or settings that do not go together.
    """
    if patch_size < 1:
        raise ValueError(f"build_encoder: patch_size {patch_size} must be at least 1 pixel")
    options = dict(options or {})
    if "in_chans" in options:
        raise ValueError(
            f"build_encoder: in_chans {options['in_chans']}: patches have 3 channels, those of "
            "gray images too; leave it out"
        )
    if name in ("patchnet", "patchmlp"):
        if pretrained:
            raise ValueError(f"build_encoder: {name} has no published weights; pretrained=False")
        if width is not None:
            options["width"] = width
        network = PatchNet if name == "patchnet" else PatchMLP
        check_options(f"encoder {name}", options, network, hidden=("patch_size", "width"))
        return network(patch_size, **options)
    if width is not None:
        raise ValueError(
            f"build_encoder: width is for patchnet and patchmlp, {name!r} has fixed widths; "
            "leave it out"
        )
    if name in ("resnet18", "resnet50"):
        return _torchvision_resnet(name, patch_size, pretrained, options)
    return _timm_model(name, patch_size, pretrained, options)


def _torchvision_resnet(
    name: str, patch_size: int, pretrained: bool, options: dict[str, Any]
) -> ImageBackbone:
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"build_encoder: {name} comes from torchvision, which is not installed; "
            "pip install torchvision, or use the encoder 'patchnet'"
        ) from error
    small = patch_size <= CIFAR_STEM_MAX
    if small and pretrained:
        raise ValueError(
            f"build_encoder: {name} has the CIFAR stem for patches up to {CIFAR_STEM_MAX} "
            f"pixels, which published weights do not fit; set pretrained=False, or use patches "
            f"larger than {CIFAR_STEM_MAX} (now {patch_size})"
        )
    hidden = ("block", "layers", "num_classes")
    check_options(f"encoder {name}", options, models.ResNet, hidden)
    net = getattr(models, name)(weights="DEFAULT" if pretrained else None, **options)
    if small:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    return ImageBackbone(_fused_if_it_fits(net), patch_size, feature_dim)


def _fused_if_it_fits(net: nn.Module) -> nn.Module:
    """Other networks, ResNeXts and ViTs among them, run as they are."""
    return net if obstacle(net) else fuse(net)


def _timm_model(
    name: str, patch_size: int, pretrained: bool, options: dict[str, Any]
) -> ImageBackbone:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"build_encoder: unknown encoder {name!r}; expected patchnet, patchmlp, resnet18, "
            "resnet50, or a timm model (pip install timm)"
        ) from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        raise ValueError(
            f"build_encoder: unknown encoder {name!r}; expected patchnet, patchmlp, resnet18, "
            "resnet50 or a name that timm.list_models() lists"
            + (f", such as {', '.join(near)}" if near else "")
        )
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options.setdefault("img_size", patch_size)
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError:
        network = type(timm.create_model(name, num_classes=0))
        check_options(f"encoder {name}", options, network, hidden=("in_chans", "num_classes"))
        raise
    except Exception as error:  # of whatever library downloads weights
        if not pretrained:
            raise
        raise ValueError(
            f"build_encoder: no published weights of {name} ({str(error).splitlines()[0]}): run "
            "once with a network connection, which keeps them in the cache, or set "
            "pretrained=False"
        ) from error
    with torch.no_grad():  # timm has several names for the size of a model's output
        feature_dim = net.eval()(torch.zeros(1, 3, patch_size, patch_size)).shape[-1]
    return ImageBackbone(_fused_if_it_fits(net.train()), patch_size, feature_dim)
