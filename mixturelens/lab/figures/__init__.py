"""Figures of what the laboratory measures, on the primitives of `mixturelens.figures`."""
