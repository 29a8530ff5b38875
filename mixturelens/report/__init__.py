"""Records and figures to one self-contained page that tells the story from the answer to the method."""

from mixturelens.report.page import write_report

__all__ = ["write_report"]
