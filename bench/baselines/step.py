"""What the training baselines share: the step itself, the plain model, the data, the optimizers.

A system is one way to run the training steps of a case. It defines four pieces: `batches` (its
data path), `encode`, `loss` and `optimizer`; the step that calls them is the same for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.cases import Case, Images
from harness.clock import Laps


@dataclass
class Setup:
    """The input of all systems of a case.

    Args:
        case: The work.
        images: The images of the case's corpus.
        weights: The initial weights, in the order in which a model's layers use them.
        steps: Steps of one turn; a turn is one pass over `steps` batches.
        device: "cpu" or "cuda".
        threads: CPU threads of torch, and as many of the data path.
        synthetic: No data path: one random batch is repeated.
        precision: fp32 or bf16, of everything under autocast.
        seed: Of the order of the images and of the augmentation, if a system draws them itself;
            others use torch's global generator.
    """

    case: Case
    images: Images
    weights: Sequence[Tensor]
    steps: int
    device: str = "cpu"
    threads: int = 1
    synthetic: bool = False
    seed: int = 0
    precision: str = "fp32"

    @property
    def indices(self) -> list[int]:
        """The images of a turn."""
        return [i % len(self.images) for i in range(self.steps * self.case.batch)]

    def autocast(self) -> Any:
        """The precision of the case, as a context."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class System:
    """A way to run training steps; subclasses define it."""

    name: ClassVar[str]
    losses: ClassVar[tuple[str, ...]] = ("emp_ssl", "vicreg")
    note: ClassVar[str] = ""
    compiled: ClassVar[bool] = False  # by torch.compile, at the first step of a shape

    def __init__(self, setup: Setup) -> None:
        self.setup, self.case = setup, setup.case
        self.model = self.build().to(setup.device)
        self.optimizer = self.build_optimizer()
        self._synthetic: Any = None

    @classmethod
    def supports(cls, case: Case) -> bool:
        return case.loss in cls.losses

    # What a system defines ------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The model, with the case's weights."""
        return PlainModel(self.case, self.setup.weights)

    def build_optimizer(self) -> Any:
        raise NotImplementedError

    def batches(self) -> Iterator[Any]:
        """`steps` batches on the device, as `encode` takes them."""
        raise NotImplementedError

    def adapt(self, patches: Tensor) -> Any:
        """Given patches [P, B, 3, h, w] as a batch of this system."""
        return patches.flatten(0, 1).contiguous()

    def encode(self, batch: Any) -> Tensor:
        """A batch -> projections z [P, B, D]."""
        patches = self.case.patches
        with self.setup.autocast():
            return self.model(batch).unflatten(0, (patches, -1))

    def loss(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Stops workers."""

    # What a bench does with it --------------------------------------------------------------------

    def turn(self, laps: Laps) -> None:
        """`steps` training steps, each phase of them a lap."""
        for _ in self.steps(laps):
            pass

    def steps(self, laps: Laps) -> Iterator[Tensor]:
        """The steps of a turn one by one: yields the loss after each."""
        batches = self.repeated() if self.setup.synthetic else self.batches()
        laps.start()
        for batch in batches:
            laps.lap("data wait")
            z = self.encode(batch)
            laps.lap("encode")
            loss = self.loss(z.float())
            laps.lap("loss")
            self.optimizer.zero_grad()
            loss.backward()
            laps.lap("backward")
            self.optimizer.step()
            laps.lap("optimizer")
            yield loss.detach()

    def repeated(self) -> Iterator[Any]:
        if self._synthetic is None:
            self._synthetic = self.adapt(self.example().to(self.setup.device))
        for _ in range(self.setup.steps):
            yield self._synthetic

    def example(self, batch: int | None = None) -> Tensor:
        """Random patches [P, B, 3, h, w]."""
        c = self.case
        generator = torch.Generator().manual_seed(1)
        shape = (c.patches, batch or c.batch, 3, c.patch, c.patch)
        return torch.randn(shape, generator=generator)


# --- the model, in plain torch --------------------------------------------------------------------


class PlainModel(nn.Module):
    """The case's encoder and projector in plain torch: [N, 3, h, w] -> z [N, D].

    Linear layers before a batch norm have no bias: the norm would subtract it again.
    """

    def __init__(self, case: Case, weights: Sequence[Tensor]) -> None:
        super().__init__()
        if case.encoder == "resnet18":
            self.encoder, dim = plain_resnet18()
        else:
            self.encoder, dim = plain_patchnet(case.patch, case.width or 64, len(weights[0]))
        head = case.head
        hidden, out = head["hidden"], head["out"]
        if head["name"] == "emp":
            last = nn.Linear(hidden, out)
            self.head = nn.Sequential(*block(dim, hidden), *block(hidden, hidden), last)
        else:
            sides = [dim] + [hidden] * (head["num_layers"] - 1)
            blocks = [m for i in range(len(sides) - 1) for m in block(sides[i], sides[i + 1])]
            self.head = nn.Sequential(*blocks, nn.Linear(hidden, out, bias=False))
        # EMP-SSL normalizes its projections, VICReg does not.
        self.normalize = case.loss == "emp_ssl"
        with torch.no_grad():
            for mine, given in zip(self.parameters(), weights, strict=True):
                mine.copy_(given)

    def forward(self, patches: Tensor) -> Tensor:
        z = self.head(self.encoder(patches))
        return F.normalize(z, dim=-1) if self.normalize else z


def block(in_dim: int, out_dim: int) -> list[nn.Module]:
    return [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(True)]


def plain_patchnet(patch: int, width: int, stem: int) -> tuple[nn.Module, int]:
    """PatchNet, see its docstring: valid convolutions, pointwise blocks, a mean."""

    def conv(cin: int, cout: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(cin, cout, kernel, stride, bias=False)
        return [layer, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]

    dim = 8 * width
    layers, side = [*conv(3, stem, 4, 2), *conv(stem, width, 1)], (patch - 4) // 2 + 1
    while side > 3:
        layers += [*conv(width, 2 * width, 3, 2), *conv(2 * width, 2 * width, 1)]
        width, side = 2 * width, (side - 3) // 2 + 1
    layers += conv(width, dim, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), dim


def plain_resnet18() -> tuple[nn.Module, int]:
    """torchvision's, with the stem for CIFAR."""
    from torchvision.models import resnet18

    net = resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    return net, 512


# --- data through a DataLoader --------------------------------------------------------------------


class Bags(Dataset):
    """P transformed patches per image."""

    def __init__(self, images: Images, patches: int, transform: Callable, tensor: bool) -> None:
        self.images, self.patches = images, patches
        self.transform, self.tensor = transform, tensor

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Any:
        """As a PIL image, or as a uint8 tensor [3, H, W]."""
        from PIL import Image

        if self.images.array is not None:
            array = self.images.array[index]
            return (
                torch.from_numpy(array).permute(2, 0, 1) if self.tensor else Image.fromarray(array)
            )
        if self.tensor:
            from torchvision.io import ImageReadMode, decode_jpeg, read_file

            return decode_jpeg(read_file(self.images.files[index]), mode=ImageReadMode.RGB)
        with open(self.images.files[index], "rb") as file:
            return Image.open(file).convert("RGB")

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.image(index)
        return [self.transform(image) for _ in range(self.patches)]


class ShuffledTurn:
    """The images of a turn in a new order each time, as with `shuffle=True`."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return (self.indices[i] for i in torch.randperm(len(self.indices)).tolist())

    def __len__(self) -> int:
        return len(self.indices)


def worker_loader(setup: Setup, dataset: Dataset, collate: Callable | None = None) -> DataLoader:
    """As many workers as threads of the data path, kept alive between turns."""
    return DataLoader(
        dataset,
        batch_size=setup.case.batch,
        sampler=ShuffledTurn(setup.indices),
        num_workers=setup.threads,
        persistent_workers=True,
        pin_memory=setup.device == "cuda",
        collate_fn=collate,
    )


def cpu_seconds_of_workers() -> float:
    """User and system seconds of the running child processes (0 without /proc)."""
    import multiprocessing

    ticks = 0
    for child in multiprocessing.active_children():
        try:
            with open(f"/proc/{child.pid}/stat") as file:
                words = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


# --- optimizers, as in the authors' scripts -------------------------------------------------------


class TensorwiseLARS:
    """SGD with LARS tensor by tensor, in both published forms (see `bagssl_fast.optim.LARS`).

    Args:
        model: Its parameters are optimized; vectors get neither decay nor adaptation.
        optim: The setting; "sgd_lars" is EMP-SSL's wrapper around torch's SGD, "lars" VICReg's.
    """

    def __init__(self, model: nn.Module, optim: Any) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optim = optim
        self.momentum: dict[Tensor, Tensor] = {}
        self.sgd: torch.optim.Optimizer | None = None
        if optim.name == "sgd_lars":
            self.sgd = torch.optim.SGD(
                self.parameters, lr=optim.lr, momentum=optim.momentum, nesterov=True
            )

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self.sgd is not None:
            self._wrap()
            self.sgd.step()
            return
        o = self.optim
        for p in self.parameters:
            update = p.grad
            if p.ndim > 1:
                update = update.add(p, alpha=o.weight_decay)
                norm, update_norm = torch.norm(p), torch.norm(update)
                one = torch.ones_like(norm)
                ratio = torch.where(update_norm > 0, o.eta * norm / update_norm, one)
                update = update.mul(torch.where(norm > 0, ratio, one))
            if p not in self.momentum:
                self.momentum[p] = torch.zeros_like(p)
            self.momentum[p].mul_(o.momentum).add_(update)
            p.add_(self.momentum[p], alpha=-o.lr)

    def _wrap(self) -> None:
        """EMP-SSL's wrapper: scales the gradients before SGD's step."""
        o = self.optim
        for p in self.parameters:
            if p.ndim > 1:
                norm, grad_norm = torch.norm(p), torch.norm(p.grad)
                if norm != 0 and grad_norm != 0:
                    ratio = o.eta * norm / (grad_norm + norm * o.weight_decay + 1e-8)
                    ratio = min(ratio / o.lr, 1)
                    p.grad.add_(p, alpha=o.weight_decay).mul_(ratio)
