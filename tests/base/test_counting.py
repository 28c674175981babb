"""Numbers of things, as sentences have them."""

from __future__ import annotations

from amalgam.base.counting import counted


def test_one_is_no_plural() -> None:
    said = [counted(count, "weight") for count in (0, 1, 2, 1234)]
    assert said == ["0 weights", "1 weight", "2 weights", "1,234 weights"]
    assert [counted(count, "bias", "biases") for count in (1, 2)] == ["1 bias", "2 biases"]
