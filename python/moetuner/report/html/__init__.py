"""The report that people look at: one HTML file with drawings and their numbers."""

from moetuner.report.html.page import render_page, write_report

__all__ = ["render_page", "write_report"]
