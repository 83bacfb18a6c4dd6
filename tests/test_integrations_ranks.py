"""Two processes: the hosts' values and gradients on every rank, and the one that is corrected."""

import pytest
import torch
import two_ranks_hosts
from tolerances import assert_matches

from bagssl_fast.integrations import lightly, solo_learn

GATHERED = [
    "lightly VICReg",
    "lightly VICReg, not gathered",
    "lightly Barlow Twins",
    "vicreg",
    "solo-learn VICReg",
    "solo-learn Barlow Twins",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    world = two_ranks_hosts.WORLD
    torch.multiprocessing.spawn(two_ranks_hosts.main, args=(folder,), nprocs=world)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("case", two_ranks_hosts.SHAPES)
@pytest.mark.parametrize("name", GATHERED)
def test_every_rank_has_the_hosts_value_and_gradient(ranks, name, case):
    for results in ranks:
        theirs, ours = results[name, case]
        assert_matches(ours["value"], theirs["value"], torch.float64, "value")
        for mine, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert_matches(mine, expected, torch.float64, "gradient")


@pytest.mark.parametrize("case", two_ranks_hosts.SHAPES)
def test_solo_learns_barlow_gradient_is_half_of_its_values(ranks, case):
    for results in ranks:
        theirs, ours = results["solo-learn Barlow Twins, corrected", case]
        assert_matches(ours["value"], theirs["value"], torch.float64, "value")
        for mine, half in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert_matches(mine, 2 * half, torch.float64, "gradient")


@pytest.mark.parametrize("case", two_ranks_hosts.SHAPES)
def test_vicregs_mean_gradient_is_that_of_one_device(ranks, case):
    views = two_ranks_hosts.make_views(*two_ranks_hosts.SHAPES[case])
    for name, loss in (
        ("lightly VICReg", lightly.VICRegLoss()),
        ("solo-learn VICReg", solo_learn.vicreg_loss_func),
    ):
        expected = two_ranks_hosts.evaluate(loss, views)
        mean_value = sum(results[name, case][1]["value"] for results in ranks) / len(ranks)
        assert_matches(mean_value, expected["value"], torch.float64, "value")
        for rank, results in enumerate(ranks):
            for mine, whole in zip(
                results[name, case][1]["gradients"], expected["gradients"], strict=True
            ):
                part = whole.chunk(len(ranks))[rank]
                assert_matches(mine / len(ranks), part, torch.float64, "gradient")
