"""Tasks: one file each, with its data, its metric, its default model and recipe."""
