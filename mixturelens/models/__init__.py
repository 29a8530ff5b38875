"""Checkpoints: where they lie (`source`), how they are loaded (`load`), and two of them as one thing (`pair`).

Beside them what any room needs of a model: what work with it takes (`cost`), and the keys and values of beginnings that
rows share (`beginnings`).
"""

from mixturelens.models.load import end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.models.pair import Budget, How, Pair
from mixturelens.models.source import Source, find_source
