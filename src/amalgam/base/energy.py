"""What the processors have used, by the counters that Linux has for it (RAPL).

In: /sys/class/powercap. Out: joules. Must never know: what they were used for.

The counters are of whole packages: everything that the machine did meanwhile is in them. Since Linux 5.10 only root may
read them, unless the administrator allows it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyUse:
    """Between two readings.

    Attributes:
        joules: None: nothing could be read.
        why_not: why, in words.
    """

    seconds: float
    joules: float | None
    why_not: str = ""

    @property
    def watts(self) -> float | None:
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds


class EnergyMeter:
    """Counts from its making on. A counter that comes to its end begins anew: to be read at least every few minutes.

    Args:
        folder: where the counters are.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._started_at = time.monotonic()
        self._joules = 0.0
        self._why_not = ""
        # Packages, `intel-rapl:0`; what is inside of one, `intel-rapl:0:1`, is a part of it.
        self._packages = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._last = self._read_all()

    def read(self) -> EnergyUse:
        """Since the meter was made."""
        current = self._read_all()
        seconds = time.monotonic() - self._started_at
        if current is None or self._last is None:
            return EnergyUse(seconds, None, self._why_not)
        for (before, _), (after, size) in zip(self._last, current, strict=True):
            self._joules += (after - before if after >= before else after + size - before) / 1e6
        self._last = current
        return EnergyUse(seconds, self._joules)

    def _read_all(self) -> list[tuple[int, int]] | None:
        """Of each package its counter and where that begins anew, in microjoules."""
        if not self._packages:
            self._why_not = "this machine shows no RAPL counters (/sys/class/powercap/intel-rapl:*)"
            return None
        try:
            return [
                (int((path / "energy_uj").read_text()), int((path / "max_energy_range_uj").read_text()))
                for path in self._packages
            ]
        except PermissionError:
            self._why_not = "/sys/class/powercap may not be read: run as root, or have energy_uj readable"
        except (OSError, ValueError) as error:
            self._why_not = f"/sys/class/powercap cannot be read ({error})"
        return None
