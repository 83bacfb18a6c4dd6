"""z in bfloat16, as autocast leaves it: the losses read it as it is and sum in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, HeadConfig
from bagssl_fast.distributed.ranks import Ranks
from bagssl_fast.losses import LOSSES, build_loss
from bagssl_fast.models.bag_model import build_model
from bagssl_fast.training.run import example
from bagssl_fast.training.step import objective

OPTIONS: dict[str, dict[str, Any]] = {"sigreg": {"num_directions": 7}}
HALF_UNIT = 2.0**-8  # what rounding to the 8 bits of bfloat16 changes, of a number


def rounded(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16()


def evaluate(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value, _ = build_loss(name, **OPTIONS.get(name, {}))(z)
    value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)], ids=["B < D", "D < B"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_bfloat16_are_those_of_its_numbers(name, shape, impl):
    """Against float64: the loss lost 8 bits where it was summed in bfloat16 itself."""
    z = rounded(*shape)
    with ops.use_impl(impl):
        value, dz = evaluate(name, z)
        truth, dtruth = evaluate(name, z.double())
        single, _ = evaluate(name, z.float())
    assert value.dtype == torch.float32 and dz.dtype == torch.bfloat16
    assert abs(value - single) <= 1e-6 * abs(single)
    # SIGReg's directions are drawn in float32 and normalized in z's own precision.
    assert abs(value - truth) <= 1e-5 * abs(truth)
    error = (dz.double() - dtruth).abs()
    assert (error <= 1.01 * HALF_UNIT * dtruth.abs() + 1e-5 * dtruth.abs().max()).all()


def test_the_loss_gets_what_autocast_made():
    """It got a float32 copy: the kernels' bfloat16 paths were never reached in training."""
    config = Config(
        batch_size=4,
        bag=BagConfig(patches=3),
        augment=Augment(size=16),
        encoder=EncoderConfig("patchnet", width=8),
        head=HeadConfig(hidden=16, out=8, num_layers=2),
    )
    seen = []

    class Spy(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(z)
            return build_loss("vicreg")(z)

    patches = example(config, Ranks(), torch.float32)
    value, _, _, z = objective(build_model(config), Spy(), patches, torch.bfloat16)
    value.backward()
    assert seen[0] is z and z.dtype == torch.bfloat16 and value.dtype == torch.float32
