"""The simulation of many cores: it shares items out as the pool does, and they are those of the compiled drivers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benchmarks import scaling

from amalgam import _native
from amalgam.kernels.backends.cpu import extension

TINY = {
    **scaling.MODELS["shape S"],
    "vocab_size": 320,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_experts": 16,
    "moe_intermediate_size": 128,
}


def test_shares_of_items_that_follow_each_other_and_what_is_left_to_others() -> None:
    assert scaling.play([], 4) == 0
    assert scaling.play([1.0, 2.0, 3.0], 1) == 6
    assert scaling.play([1.0] * 8, 4) == 2
    assert scaling.play([1.0] * 9, 4) == 3
    assert scaling.play([4.0, 1.0, 1.0, 1.0], 2) == 4  # the second takes what the first has left
    assert scaling.play([1.0, 1.0, 1.0, 4.0], 2) == 5  # it begins with the short one


def test_all_work_is_there_whatever_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, use_threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(extension, "kernels", lambda: _native.kernels("counting"))
    monkeypatch.setattr(scaling, "STEPS", {"one": (1, 1), "prompt": (1, 140)})
    use_threads(1)  # and as before at the end
    rounds = scaling.record(dict(TINY), 2, (1, 2, 8, 64))

    def total(step: str, threads: int, kernel: str, figure: int) -> float:
        return sum(item[figure] for name, items in rounds[step, threads] if name == kernel for item in items)

    for threads in (1, 2, 8, 64):
        for kernel, figure in (("product", 0), ("product", 1), ("product", 2), ("gate_up", 0), ("norm", 4)):
            assert total("one", threads, kernel, figure) == total("one", 1, kernel, figure) > 0, (threads, kernel)
        assert total("prompt", threads, "product", 1) == total("prompt", 1, "product", 1)
        assert total("prompt", threads, "attend", 2) == total("prompt", 1, "attend", 2) > 0
    # Of two layers: gate and up of 8 experts, int4 with a scale for 128 inputs.
    assert total("one", 1, "gate_up", 0) == 2 * 8 * 2 * (128 * 256 // 2 + 128 * 2 * 2)
    assert len({len(items) for name, items in rounds["one", 64] if name == "gate_up"}) == 1
