"""``python -m ramp_fast.cli``."""

import sys

from ramp_fast.cli import main

sys.exit(main())
