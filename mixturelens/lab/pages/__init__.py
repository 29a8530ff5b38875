"""Pages about what the laboratory measures."""
