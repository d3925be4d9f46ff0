"""A store of maps as a folder with a page to look at: overview, classes, gallery. It needs a browser and nothing else."""

from __future__ import annotations

from ramp_fast.report.photographs import Photographs
from ramp_fast.report.writing import check_target, write_report

__all__ = ["Photographs", "check_target", "write_report"]
