"""Records and figures to one self-contained page that tells the story from the answer to the method."""

from mixturelens.pages.card import write_card
from mixturelens.pages.compared import ComparisonRecord, compare, write_comparison
from mixturelens.pages.page import Grown, write_report
from mixturelens.pages.pair import Findings
