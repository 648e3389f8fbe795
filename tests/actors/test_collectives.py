"""What ranks do together without their GPUs: real processes over gloo."""

from __future__ import annotations

import multiprocessing
import socket
import time
from datetime import timedelta
from typing import Any

import psutil
import pytest

from actors.collectives import interface_to
from actors.learner_setup import open_store


def rank(number: int, store_address: tuple[str, int], found: Any) -> None:
    """Collectives of tensors may take a second, and rank 0's disk takes three."""
    from actors import learner_setup
    from actors.collectives import gathered, is_so_anywhere, on_rank_zero, wait_for_all

    learner_setup.COLLECTIVE_TIMEOUT = timedelta(seconds=1)
    learner_setup.join_process_group(store_address, rank=number, world_size=2, local_rank=0)

    def slowly() -> str:
        time.sleep(3)
        return "written"

    result = on_rank_zero(slowly)
    time.sleep(3 * number)
    flags = is_so_anywhere(number == 1, False)
    time.sleep(3 * number)
    wait_for_all()
    time.sleep(3 * number)
    found.put((result, flags, gathered(number)))


@pytest.mark.component
def test_ranks_wait_for_anothers_disk_for_longer_than_a_collective_of_tensors_may_take() -> None:
    processes = multiprocessing.get_context("spawn")
    found = processes.Queue()
    _store, store_address = open_store()
    ranks = [processes.Process(target=rank, args=(number, store_address, found)) for number in range(2)]
    for process in ranks:
        process.start()
    try:
        assert [found.get(timeout=60) for _ in ranks] == [("written", [True, False], [0, 1])] * 2
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_nobody_can_take_the_port_where_ranks_will_meet() -> None:
    store, (_, port) = open_store()
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind(("", port))
    del store


def test_the_interface_is_the_one_that_leads_to_an_address() -> None:
    (loopback,) = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    }
    assert interface_to("127.0.0.1") == loopback
    assert interface_to("no-such-host.invalid") is None
