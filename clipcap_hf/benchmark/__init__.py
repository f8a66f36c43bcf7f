"""How fast captioning is at real sizes, beside a naive way and beside what the machine could do."""

from .measure import measure_speed
from .report import draw_report, report_table


__all__ = ["draw_report", "measure_speed", "report_table"]
