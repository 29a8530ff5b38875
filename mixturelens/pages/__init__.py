"""Records and figures to one self-contained page that tells the story from the answer to the method."""

from mixturelens.pages.card import write_card
from mixturelens.pages.page import Findings, Grown, write_report

__all__ = ["Findings", "Grown", "write_card", "write_report"]
