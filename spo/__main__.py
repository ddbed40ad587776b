"""``python -m spo`` is ``spo``."""

from __future__ import annotations

import sys

from spo.cli import main

if __name__ == "__main__":
    sys.exit(main())
