"""Entry points for researchers: each script is a recipe in `# %%` cells."""
