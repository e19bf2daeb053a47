"""Which device a rank has, and that a host has enough of them, before anything is loaded."""

import pytest
import torch

from engine.config import ProcessOptions
from engine.errors import ConfigError
from engine.worker.start import choose_device


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_a_rank_has_the_device_of_its_place_on_the_host() -> None:
    devices = [choose_device(ProcessOptions(), rank=rank, ranks=4, hosts=2) for rank in range(4)]
    assert devices == [torch.device("cuda", rank) for rank in range(4)]


@pytest.mark.parametrize(
    ("hosts", "cause"),
    [
        (1, r"5 ranks \(--tp times --pp\) need 5 GPUs, and torch sees 4; say --tp and --pp of at most 4 ranks"),
        (
            2,
            "10 ranks over 2 hosts need 5 GPUs on each, and torch sees 4 on this one; say --tp and --pp of at most 8 "
            "ranks",
        ),
    ],
)
def test_more_ranks_than_devices_are_refused_with_both_numbers(hosts: int, cause: str) -> None:
    with pytest.raises(ConfigError, match=f"^{cause}$"):
        choose_device(ProcessOptions(), rank=0, ranks=5, hosts=hosts)
