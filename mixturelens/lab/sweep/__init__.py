"""Grids of recipes, settings and seeds, one table and one page from them."""
