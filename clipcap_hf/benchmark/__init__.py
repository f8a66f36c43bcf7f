"""Measure how fast captioning is at real sizes, compared with a naive way and with the limits of the machine."""

from .measure import measure_speed
from .report import draw_report, report_table


__all__ = ["draw_report", "measure_speed", "report_table"]
