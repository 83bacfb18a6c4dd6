"""Losses over ranks: equal to one process, by no more bytes than docs/scaling.md says."""

from pathlib import Path
from typing import Any

import pytest
import ranks_exchange
import torch
from ranks_exchange import DIRECTIONS, LOSSES, ONE_SLOT, POINTS, WORLD

SHARE = (WORLD - 1) / WORLD
WORD = 8  # of float64
NUMBER = 2 * SHARE * WORD  # an all-reduced scalar


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("exchange"))
    torch.multiprocessing.spawn(ranks_exchange.main, args=(folder,), nprocs=WORLD)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(WORLD)]


def joined(ranks: list[dict[str, Any]], case: str) -> torch.Tensor:
    """The gradient of the whole batch, as DDP's averaging leaves it."""
    return torch.cat([rank[case]["dz"] for rank in ranks], dim=1) / WORLD


@pytest.mark.parametrize("case", LOSSES)
def test_two_ranks_are_one(ranks, case):
    name, shape = LOSSES[case]
    one = ranks_exchange.evaluate(name, ranks_exchange.make(shape), None)
    for rank in ranks:
        torch.testing.assert_close(rank[case]["loss"], one["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined(ranks, case), one["dz"], rtol=1e-10, atol=1e-12)


def test_a_rank_without_a_slot_takes_part(ranks):
    """One slot on two ranks: the second one has nothing to compute, and waited for ever if it had
    left the way back to the first one."""
    one = ranks_exchange.rates(ranks_exchange.make(ONE_SLOT), None)
    for rank in ranks:
        torch.testing.assert_close(rank["one slot"]["loss"], one["loss"])
    torch.testing.assert_close(joined(ranks, "one slot"), one["dz"])


def test_half_precision_is_sent_as_it_is(ranks):
    """In float32 twice as much; the gradient is not summed in bfloat16, so that one rounding of
    each number is all that is lost."""
    z = ranks_exchange.make((3, 8, 18), torch.bfloat16)
    assert ranks[0]["bfloat16"]["bytes"] == SHARE * z.nbytes
    one = ranks_exchange.evaluate("vicreg", z, None)
    torch.testing.assert_close(joined(ranks, "bfloat16"), one["dz"], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("case", LOSSES)
def test_bytes_of_a_step_are_those_of_the_page(ranks, case):
    """Forward and backward, the rows of the table in docs/scaling.md."""
    name, (num_slots, batch, dim) = LOSSES[case]
    z = num_slots * batch * dim * WORD
    if name == "emp_ssl":  # there and back, of a rank's share of the slots
        for rank, received in enumerate(ranks):
            own = (num_slots + 1 - rank) // 2
            there, back = z * own / num_slots, z / WORLD
            rate = 2 * SHARE * num_slots * WORD
            assert received[case]["bytes"] == SHARE * (there + back) + rate + NUMBER
        return
    expected = {
        "byol": NUMBER,
        "sigreg": 2 * SHARE * 2 * POINTS * num_slots * DIRECTIONS * WORD + NUMBER,
        "vicreg": 2 * SHARE * num_slots * dim * (dim + 1) * WORD + NUMBER,
    }.get(name, SHARE * z)
    if name == "vicreg" and batch < dim:
        expected = SHARE * z
    assert {rank[case]["bytes"] for rank in ranks} == {expected}
