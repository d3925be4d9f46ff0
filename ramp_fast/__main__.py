"""``python -m ramp_fast``: what is installed, and what can run."""

from __future__ import annotations

import sys

from ramp_fast._diagnostics import report
from ramp_fast.errors import RampFastError

if __name__ == "__main__":
    try:
        print(report())
    except (RampFastError, ImportError) as error:
        print(f"ramp_fast: {error}", file=sys.stderr)
        sys.exit(2)
