"""Measure how fast captioning is at real sizes, and compare with a naive way and with the machine's limits."""

from .measure import measure_speed
from .report import draw_report, report_table


__all__ = ["draw_report", "measure_speed", "report_table"]
