"""`python -m amalgam.cli`."""

import sys

from amalgam.cli import main

sys.exit(main())
