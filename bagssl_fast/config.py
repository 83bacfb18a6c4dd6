"""The configuration of a run: frozen dataclasses whose defaults a recipe and the flags override.

`check` refuses what cannot work with a sentence that names the fix; `bagssl_fast.cli` reads
command lines and yaml. Neither imports torch: `--help`, a wrong flag, a wrong path answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal

from bagssl_fast.augment import Augment


@dataclass(frozen=True)
class BagConfig:
    """How an image becomes a bag of patches.

    Args:
        patches: Crops per image and step: patches, each with its own augmentation, or whole views
            where `dense` is set.
        dense: Cut whole views and encode every patch of a view on a grid in one pass (an encoder
            with a dense form: patchnet). A step then sees patches x grid positions slots.
        stride: Pixels between neighboring patches of a dense view.
        image_size: 0 takes `augment.scale` as it is; n > 0 makes a patch `augment.size` pixels of
            an image imagined at n x n: the scale becomes (augment.size / n) squared.
    """

    patches: int = 20
    dense: bool = False
    stride: int = 4
    image_size: int = 0


@dataclass(frozen=True)
class LoaderConfig:
    """The data path.

    Args:
        num_threads: Decoding threads; 0 shares the cores with torch (see `threads`).
        batches_ahead: Batches prepared in advance.
        on_error: What a broken image does: raise stops the run naming file and reason, skip takes
            another image instead, counts it and lists it in skipped.txt.
        dtype: Type of the pixels that the encoder gets: auto (bfloat16 under bf16 precision on
            CUDA, else float32), float32, bfloat16 or float16.
        views: Where patches are cut from the decoded images, the same ones to within 1/255: host
            (the loader's threads), device (which is sent the images), or auto (device on CUDA where
            Triton is installed, else host).
    """

    num_threads: int = 0
    batches_ahead: int = 2
    on_error: Literal["raise", "skip"] = "raise"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    views: Literal["auto", "host", "device"] = "auto"


@dataclass(frozen=True)
class EncoderConfig:
    """The backbone that turns a patch into an embedding.

    Args:
        name: patchnet, patchmlp, resnet18, resnet50 or any timm model name.
        patch_size: Side of the patch it takes, in pixels; 0 takes `augment.size`.
        width: Channels of the first stage; 0 leaves the encoder's own default.
        pretrained: Start from published weights (timm and torchvision models only).
        options: Further keyword arguments of the encoder, e.g. --encoder.options.depth 4.
    """

    name: str = "patchnet"
    patch_size: int = 0
    width: int = 0
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadConfig:
    """The projector, where the loss lives.

    Args:
        name: projector (VICReg's: Linear-BN-ReLU blocks, last Linear without bias), emp (EMP-SSL's
            pre_feature, which becomes the embedding, and a normalized projection).
        hidden: Width of the hidden layers.
        out: Width of the projection.
        num_layers: Number of Linear layers (projector only).
        momentum: For the loss byol: share of the target network, a moving average of the trained
            one, that each step keeps (0.99 suits a thousand steps, BYOL's 0.996 longer runs); 0
            for no target.
        options: Further keyword arguments of the head, e.g. --head.options.normalize true.
    """

    name: Literal["projector", "emp"] = "projector"
    hidden: int = 2048
    out: int = 2048
    num_layers: int = 3
    momentum: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossConfig:
    """The objective over the projections [P, B, D].

    Args:
        name: vicreg, emp_ssl (total coding rate), spectral, barlow_twins, info_nce, byol or sigreg
            (LeJEPA).
        options: Keyword arguments of the loss, e.g. --loss.options.sim_coeff 25.
    """

    name: str = "vicreg"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; the schedule moves every step.

    Args:
        name: adamw, sgd, lars (as VICReg: eta 0.001, vectors free of decay and adaptation) or
            sgd_lars (as EMP-SSL: SGD with nesterov momentum inside a clipped LARS of eta 0.005).
        lr: Learning rate at its peak.
        lr_batch: 0 takes `lr` as it is; n > 0 takes it as the rate for n images and multiplies it
            by batch_size / n.
        weight_decay: Weight decay (decoupled in adamw); vectors (biases, norms) get none.
        momentum: Momentum of sgd, lars and sgd_lars.
        eta: Trust coefficient of the two LARS; 0 takes each one's published value.
        betas: Decay rates of adamw's moments.
        schedule: cosine or constant, after the warmup.
        warmup_epochs: Epochs of linear warmup, a fraction allowed.
        final_lr: Where the cosine ends, as a fraction of the peak.
        clip_grad: Largest norm of the gradient; 0 does not clip.
    """

    name: Literal["adamw", "sgd", "lars", "sgd_lars"] = "adamw"
    lr: float = 1e-3
    lr_batch: int = 0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    eta: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    clip_grad: float = 0.0


@dataclass(frozen=True)
class EvalConfig:
    """What `evaluate` measures, after training where `enabled` is set.

    Args:
        enabled: Evaluate at the end of training.
        patches: Numbers of patches per bag, squares: each is a grid over the image.
        view: Side to which a whole image is brought for its dense bag; 0 takes the side at which a
            patch covers what it covered in training, for dense bags `augment.size`.
        random: Measure the same network at its random initialization beside it.
        random_patches: Largest bag of the random network (each costs as much as a trained one's).
        grid: Read the largest bag of which it divides the patches per side a second time: the mean
            of each of grid x grid regions, side by side, in so many times the memory of the mean; 1
            for the bag's mean alone.
        projection_patches: Largest bag whose projection z is measured beside the embedding h (the
            head runs on every patch); 0 for the central crop only, -1 for none.
        max_train_images: Training images the probes see; 0 takes all.
        max_test_images: Test images; 0 takes all.
        batch_size: Images per forward pass; 0 takes 32 on a CPU (for its caches), else 256.
        probe: Linear probe: ridge (closed form, seconds) or logistic (L-BFGS, slower).
        knn_k: Neighbors of the weighted kNN, clamped to the training images.
        knn_t: Its temperature.
        knn_space: What a second kNN beside it reads of the embeddings h: whitened (decorrelated by
            the training images' covariance), rooted (square roots, then whitened), standardized
            (each feature by itself), centered, or plain for no second one.
        test_fraction: Fraction of the images kept for testing where there is no test set.
    """

    enabled: bool = False
    patches: tuple[int, ...] = (1, 4, 16, 64, 256)
    view: int = 0
    random: bool = True
    random_patches: int = 64
    grid: int = 1
    projection_patches: int = 16
    max_train_images: int = 0
    max_test_images: int = 0
    batch_size: int = 0
    probe: Literal["ridge", "logistic"] = "ridge"
    knn_k: int = 20
    knn_t: float = 0.07
    knn_space: Literal["rooted", "whitened", "standardized", "centered", "plain"] = "rooted"
    test_fraction: float = 0.2


@dataclass(frozen=True)
class Config:
    """Train a bag-of-patches model; without any option, on the built-in demo images.

    Args:
        data: Training images: demo, a folder, a .tar (a list, glob or folder of them), .npy/.npz,
            or a torchvision CIFAR/MNIST root.
        test_data: Images for the evaluation; by default the `-test` sibling of a `-train` data
            path, else a held-out part of `data`.
        labels: auto takes the classes that the data has (names of folders, say), none ignores them;
            training never looks at them, evaluation does.
        name: First part of the run directory's name; by default the recipe's.
        run_dir: Run directory; by default runs/<name>-<time>.
        resume: auto resumes from the newest checkpoint of `run_dir` if there is one (more `epochs`
            extend the run), never starts a new run, a path names a checkpoint or a run directory.
        overwrite: Delete what a non-empty `run_dir` holds.
        epochs: Passes over the training images, unless `max_steps` is given.
        batch_size: Images per step, over all ranks together.
        max_steps: Steps of the whole run and its schedule, however many epochs they make; 0 leaves
            that to `epochs`.
        max_images: Train on so many of the images, drawn by the seed; 0 takes all.
        seed: Seed of the initial weights, of the order of the images and of every bag.
        device: auto (CUDA where there is one), cpu or cuda.
        precision: fp32, bf16, fp16 or auto (bf16 on GPUs, and CPUs found faster by it; else fp32).
        channels_last: Keep convolution weights and patches channels-last.
        compile: Use torch.compile: true, false or auto (runs of 1000 steps and more, except for
            patchnet and ResNets on a CPU, whose ops it leaves as they are).
        cuda_graph: Replay forward, loss and backward of a step as one CUDA graph: for steps of many
            small kernels, on one GPU. Not with losses that keep a state (sigreg).
        threads: CPU threads of torch; 0 takes every core this process may use.
        impl: Implementation of the ops: auto, reference, cpu or cuda.
        sync_bn: Share batch-norm statistics between ranks.
        ema: Decay of a moving average of the weights, which is then what is exported and
            evaluated; 0 for none.
        on_nonfinite: What a loss or gradient does that is not finite: stop ends the run; skip
            leaves out the step, and stops after ten in a row (on CUDA with a copy of the state).
        ranks_timeout: Minutes that a process waits for the others before it ends the job, which has
            lost one of them then; longer than a checkpoint takes to be written.
        log_every: Steps between two lines of metrics.jsonl.
        checkpoint_every: Epochs between two checkpoints, a fraction allowed; 0 only at the end.
        keep_checkpoints: Checkpoints to keep, the newest ones, at least 2: one may be damaged.
        tensorboard: Write TensorBoard events too (needs the extra `tensorboard`).
        bag: How an image becomes a bag.
        augment: The augmentation of a patch, or of a view where `bag.dense` is set.
        augment_odd: The augmentation of every second slot, where it differs (VICReg's second view);
            fields left out take the defaults, not those of `augment` (yaml's `<<: *anchor` helps).
        loader: The data path.
        encoder: The backbone.
        head: The projector.
        loss: The objective.
        optim: Optimizer and schedule.
        eval: The evaluation.
    """

    data: str = "demo"
    test_data: str | None = None
    labels: Literal["auto", "none"] = "auto"
    name: str = ""
    run_dir: str | None = None
    resume: str = field(default="never", metadata={"bare": "auto"})
    overwrite: bool = False
    epochs: int = 10
    batch_size: int = 128
    max_steps: int = 0
    max_images: int = 0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    compile: bool | Literal["auto"] = field(default="auto", metadata={"bare": "true"})
    cuda_graph: bool = False
    threads: int = 0
    impl: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    sync_bn: bool = False
    ema: float = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    ranks_timeout: float = 10.0
    log_every: int = 20
    checkpoint_every: float = 1.0
    keep_checkpoints: int = 2
    tensorboard: bool = False
    bag: BagConfig = field(default_factory=BagConfig)
    augment: Augment = field(default_factory=Augment)
    augment_odd: Augment | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def resolve(config: Config) -> Config:
    """The configuration with the scale that follows from `bag.image_size` filled in.

    Raises:
        ValueError: If the patch is larger than the image.
    """
    n, size = config.bag.image_size, config.augment.size
    if n == 0:
        return config
    if size > n:
        raise ValueError(
            f"--augment.size {size} is larger than the image, --bag.image_size {n}: take a smaller "
            "patch, or image_size 0 and an --augment.scale"
        )
    scale = ((size / n) ** 2,) * 2
    odd = config.augment_odd
    return replace(
        config,
        augment=replace(config.augment, scale=scale),
        augment_odd=replace(odd, scale=scale, size=size) if odd is not None else None,
    )


def check(config: Config) -> None:
    """Refuses a configuration that cannot train, before anything heavy starts.

    Raises:
        ValueError: Naming the option, what came, what is expected and how to fix it.
    """
    c = config
    _at_least("bag.patches", c.bag.patches, 1)
    _at_least("bag.stride", c.bag.stride, 1)
    _at_least("epochs", c.epochs, 1)
    _at_least("augment.size", c.augment.size, 1)
    _at_least("max_steps", c.max_steps, 0)
    _at_least("max_images", c.max_images, 0)
    _at_least("log_every", c.log_every, 1)
    _at_least("keep_checkpoints", c.keep_checkpoints, 2)
    _at_least("loader.batches_ahead", c.loader.batches_ahead, 1)
    if c.batch_size < 2:
        raise ValueError(
            f"--batch_size {c.batch_size}: the losses compare images of one batch; "
            "take 2 or more (100 and more is usual)"
        )
    slots = number_of_slots(c)
    if slots < 2:
        raise ValueError(
            f"--bag.patches {c.bag.patches} gives {slots} slot per image, and {c.loss.name} pulls "
            "the patches of one image together: take at least 2 (or --bag.dense true)"
        )
    for option, a in (("augment", c.augment), ("augment_odd", c.augment_odd or c.augment)):
        low, high = a.scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"--{option}.scale [{low}, {high}]: a crop's share of the image's area is in "
                "(0, 1], lowest first; a patch cannot be larger than the image"
            )
    if c.augment_odd is not None and c.augment_odd.size != c.augment.size:
        raise ValueError(
            f"--augment_odd.size {c.augment_odd.size} differs from --augment.size "
            f"{c.augment.size}: all slots share one tensor, give both the same size"
        )
    momentum = c.head.momentum
    if not 0.0 <= momentum < 1.0 or (c.loss.name == "byol") != (momentum > 0.0):
        raise ValueError(
            f"--loss.name {c.loss.name} with --head.momentum {momentum}: byol needs targets, "
            "a momentum between 0 and 1 such as 0.99, and no other loss takes them, 0"
        )
    if not 0.0 <= c.ema < 1.0:
        raise ValueError(f"--ema {c.ema}: the decay must be in [0, 1), 0 for no average")
    if not 0.0 < c.ranks_timeout < float("inf"):
        raise ValueError(
            f"--ranks_timeout {c.ranks_timeout}: minutes to wait for other processes, must be "
            "greater than 0"
        )
    if c.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard true needs a package: pip install tensorboard")
    check_eval(c.eval)


def check_eval(options: EvalConfig, prefix: str = "eval.") -> None:
    """Refuses an evaluation that makes no sense; `prefix` stands before the names of its options.

    Raises:
        ValueError: Naming the option and how to fix it.
    """
    for count in options.patches:
        if count < 1 or round(count**0.5) ** 2 != count:
            raise ValueError(
                f"--{prefix}patches {count}: bags are n x n grids, take squares such as 1, 4, 16"
            )
    if not options.patches:
        raise ValueError(f"--{prefix}patches is empty: name at least one number, such as 1")
    _at_least(f"{prefix}grid", options.grid, 1)
    if all(math.isqrt(count) % options.grid for count in options.patches):
        fits = (2 * options.grid) ** 2
        raise ValueError(
            f"--{prefix}grid {options.grid} divides no bag of --{prefix}patches "
            f"{','.join(map(str, options.patches))}: the patches per side are to be a multiple of "
            f"it; add a bag such as {fits}"
        )
    _at_least(f"{prefix}view", options.view, 0)
    _at_least(f"{prefix}batch_size", options.batch_size, 0)
    _at_least(f"{prefix}knn_k", options.knn_k, 1)
    if options.knn_t <= 0:
        raise ValueError(f"--{prefix}knn_t {options.knn_t}: must be greater than 0")
    if not 0 < options.test_fraction < 1:
        raise ValueError(f"--{prefix}test_fraction {options.test_fraction}: must be in (0, 1)")


def patch_size(config: Config) -> int:
    """Side of the patch that the encoder takes, in pixels."""
    return config.encoder.patch_size or config.augment.size


def number_of_slots(config: Config) -> int:
    """Slots P that the loss sees: patches, or views x grid positions of a dense bag.

    Raises:
        ValueError: If no patch of the encoder's size fits, or sizes disagree.
    """
    view, patch = config.augment.size, patch_size(config)
    if not config.bag.dense:
        if patch != view:
            raise ValueError(
                f"--encoder.patch_size {patch} differs from --augment.size {view}: leave "
                "encoder.patch_size at 0 to take the loader's patches as they come, or set "
                "--bag.dense true to encode all patches of a larger view"
            )
        return config.bag.patches
    if patch > view:
        raise ValueError(
            f"--encoder.patch_size {patch} is larger than the view, --augment.size {view}: "
            "no patch fits; enlarge the view or shrink the patch"
        )
    per_side = (view - patch) // config.bag.stride + 1
    return config.bag.patches * per_side * per_side


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{option} {value}: must be {least} or more")
