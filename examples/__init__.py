"""Worked examples. Run them from the repository's root: python -m examples.<name> --help."""
