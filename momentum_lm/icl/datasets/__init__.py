"""Data sets for in-context learning: their definitions (YAML files beside this one), and reading them."""
