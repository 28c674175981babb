"""How many threads the operators of a thread use that computes beside the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from amalgam.kernels.quiet import alone, be_quiet


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_thread(work: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_quiet_thread_computes_alone_and_the_others_go_on_as_before() -> None:
    def quiet() -> int:
        be_quiet()
        return torch.get_num_threads()

    assert in_a_thread(quiet) == 1
    assert torch.get_num_threads() == 2 and in_a_thread(torch.get_num_threads) == 2


def test_a_thread_computes_alone_for_a_while() -> None:
    with alone():
        assert torch.get_num_threads() == 1 and in_a_thread(torch.get_num_threads) == 2
        with alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2 and in_a_thread(torch.get_num_threads) == 2


def test_a_thread_computes_as_before_once_its_work_fails() -> None:
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
