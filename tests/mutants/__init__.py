"""Planted bugs, and the tests that have to fail on each of them: ``python -m tests.mutants``."""
