"""A bound belongs to the values below it, as in Prometheus."""

from amalgam.base.histogram import Bins, Histogram


def test_values_are_counted_up_to_their_bound() -> None:
    bins = Bins((1.0, 2.0))
    assert bins.read().mean is None
    for value in (0.5, 1.0, 1.5, 7.0):
        bins.add(value)
    assert bins.read() == Histogram((1.0, 2.0), (2, 1, 1), 10.0)
    assert bins.read().mean == 2.5
