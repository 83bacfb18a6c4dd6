"""Label probes of frozen features: a weighted kNN, in several spaces, and a linear classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Strengths of the L2 penalty that the held-out split chooses from, per image and on standardized
# features.
RIDGE_GRID = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
LOGISTIC_GRID = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
KNN_SPACES = ("rooted", "whitened", "standardized", "centered", "plain")
SHRINKAGE = 0.01  # bench/NOTES.md has the choice
HELD_OUT = 0.1  # share of the training rows that a classifier is scored on
ENOUGH = 500  # rows to choose by; where a tenth is fewer, more tenths take their turn


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> float:
    """Accuracy of the weighted nearest-neighbor vote of Wu et al. (2018).

    Each of the k training images with the largest cosine votes for its class with exp(cosine /
    temperature).

    Args:
        train: Features [N, F].
        train_labels: int64 [N].
        test: Features [M, F].
        test_labels: int64 [M].
        k: Neighbors, clamped to N.
        temperature: Of the votes.
        chunk: Test rows at a time; memory is chunk x N words.

    Returns:
        The fraction of test rows whose class wins the vote.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    bank = F.normalize(train.float(), dim=1)
    k = min(k, len(bank))
    correct = 0
    for rows, labels in zip(test.split(chunk), test_labels.split(chunk), strict=True):
        cosine, index = (F.normalize(rows.float(), dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        # A common factor per row changes no winner and keeps exp in range.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train_labels[index], weights)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test)


@torch.no_grad()
def knn_space(train: Tensor, test: Tensor, space: str) -> tuple[Tensor, Tensor]:
    """Features as a kNN may read them, by statistics of the training rows alone.

    Cosines between means over patches are dominated by their common direction and by the few of
    largest variance, which say little of the class. Whitening gives all directions one weight, but
    for those of hardly any variance: `SHRINKAGE` of the mean variance is added to each. Roots
    before that (sign(x) sqrt|x|) tell weak responses apart that strong ones would drown.

    Args:
        train: Features [N, F].
        test: Features [M, F].
        space: plain, centered, standardized, whitened or rooted.

    Returns:
        Both, in float32.

    Raises:
        ValueError: For an unknown space.
    """
    if space not in KNN_SPACES:
        raise ValueError(f"knn_space: space {space!r}; supported: {', '.join(KNN_SPACES)}")
    train, test = train.float(), test.float()
    if space == "plain":
        return train, test
    if space == "rooted":
        train, test = (x.abs().sqrt_().copysign_(x) for x in (train, test))
    mean = train.mean(dim=0)
    train, test = train - mean, test - mean
    if space == "standardized":
        variance = train.square().mean(dim=0)
        scale = (variance + 1e-6 * variance.mean()).clamp(min=1e-30).rsqrt()
        return train.mul_(scale), test.mul_(scale)
    if space in ("rooted", "whitened"):
        covariance = (train.T @ train).double() / len(train)
        variances = covariance.diagonal()
        variances += (SHRINKAGE * variances.mean()).clamp(min=1e-30)
        # Cosines are those of any other whitening: they differ by a rotation.
        root = torch.linalg.cholesky(covariance)
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        whitening = torch.linalg.solve_triangular(root, eye, upper=False).T.float()
        for rows in (*train.split(4096), *test.split(4096)):
            rows.copy_(rows @ whitening)  # regions side by side may be gigabytes
    return train, test


@dataclass(frozen=True)
class LinearResult:
    """What `linear_probe` found.

    Args:
        accuracy: On the test rows, of the classifier fitted on all training rows.
        held_out: Its classifiers' on the training rows that chose the penalty.
        penalty: The chosen one.
        correct: Which test rows it gets right, bool [M].
    """

    accuracy: float
    held_out: float
    penalty: float
    correct: Tensor


@torch.no_grad()
def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    method: str = "ridge",
    seed: int = 0,
) -> LinearResult:
    """Accuracy of a linear classifier on standardized features.

    Of the *training* rows a tenth chooses the penalty, or, where that were fewer than 500 rows, as
    many tenths as give these, one after the other, up to all ten; the classifier is then fitted on
    all of them, and the test rows are looked at once.

    Args:
        train: Features [N, F].
        train_labels: int64 [N].
        test: Features [M, F].
        test_labels: int64 [M].
        method: ridge (least squares on one-hot classes, in closed form) or logistic (multinomial,
            L-BFGS).
        seed: Of the split.

    Raises:
        ValueError: For an unknown method.
    """
    if method not in ("ridge", "logistic"):
        raise ValueError(f"linear_probe: method {method!r}; supported: ridge, logistic")
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.inf)  # drops dead ones
    train, test = (train - mean).div_(std), (test - mean).div_(std)
    train_labels = train_labels.clone()  # may come from inference mode, which autograd refuses
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1

    grid = RIDGE_GRID if method == "ridge" else LOGISTIC_GRID
    fit = _ridge_path if method == "ridge" else _logistic_path
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    order = order.to(train.device)
    tenth = max(1, round(HELD_OUT * len(train)))
    folds = order.split(tenth)[: max(1, min(-(-ENOUGH // tenth), len(order) // tenth))]
    hits = torch.zeros(len(grid), dtype=torch.int64)
    for i, held in enumerate(folds):
        kept = torch.cat([order[: i * tenth], order[i * tenth + len(held) :]])
        if len(kept) == 0:
            kept = held
        fits = fit(train[kept], train_labels[kept], classes, grid)
        hits += torch.tensor(
            [int(_correct(w, train[held], train_labels[held]).sum()) for w in fits]
        )
    scores = (hits.double() / sum(len(held) for held in folds)).tolist()
    best = max(range(len(grid)), key=scores.__getitem__)
    # The path up to the chosen penalty: logistic regression starts each from the one before.
    path = grid[best : best + 1] if method == "ridge" else grid[: best + 1]
    weights = fit(train, train_labels, classes, path)[-1]
    correct = _correct(weights, test, test_labels)
    return LinearResult(float(correct.double().mean()), scores[best], grid[best], correct)


def _correct(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Which rows weights [F + 1, K], the last row being the bias, get right."""
    logits = x @ weights[:-1] + weights[-1]
    return logits.argmax(dim=1) == labels


def _ridge_path(x: Tensor, y: Tensor, classes: int, grid: tuple[float, ...]) -> list[Tensor]:
    """Least squares on one-hot classes with an L2 penalty on all but the bias, per penalty."""
    mean = x.mean(dim=0)
    target = F.one_hot(y, classes).float()
    prior = target.mean(dim=0)
    # Of centered data: the bias then is the prior's, and is not penalized. The system to solve is
    # that of the rows where they are fewer than the features.
    rows = len(x) < x.shape[1]
    if rows:
        centered = (x - mean).double()
        gram, cross = centered @ centered.T / len(x), (target - prior).double() / len(x)
    else:
        gram = (x.T @ x).double() / len(x) - torch.outer(mean, mean).double()
        cross = (x.T @ target).double() / len(x) - torch.outer(mean, prior).double()
    paths = []
    for penalty in grid:
        damped = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
        weights = torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
        weights = (centered.T @ weights if rows else weights).float()
        paths.append(torch.cat([weights, (prior - mean @ weights)[None]]))
    return paths


def _logistic_path(x: Tensor, y: Tensor, classes: int, grid: tuple[float, ...]) -> list[Tensor]:
    """Multinomial logistic regression with an L2 penalty on all but the bias, per penalty."""
    weights = torch.zeros(x.shape[1] + 1, classes, device=x.device, requires_grad=True)
    path = []
    for penalty in grid:
        solver = torch.optim.LBFGS(
            [weights],
            max_iter=60,
            history_size=10,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def closure(solver: torch.optim.LBFGS = solver, penalty: float = penalty) -> Tensor:
            solver.zero_grad()
            with torch.enable_grad():
                logits = x @ weights[:-1] + weights[-1]
                loss = F.cross_entropy(logits, y) + penalty / 2 * weights[:-1].square().sum()
                loss.backward()
            return loss

        solver.step(closure)
        path.append(weights.detach().clone())
    return path
