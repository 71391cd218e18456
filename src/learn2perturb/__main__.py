"""``python -m learn2perturb``: the command line, for launchers such as ``torchrun`` that start modules."""

from __future__ import annotations

import sys

from learn2perturb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
