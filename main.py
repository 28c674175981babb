"""`amalgam serve` from a checkout, with the same flags."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if __name__ == "__main__":
    from amalgam.cli import main

    sys.argv.insert(1, "serve")
    sys.exit(main())
