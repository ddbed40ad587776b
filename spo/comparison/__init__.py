"""Comparison of methods over their runs: what is compared, with which statistics, and what would be unfair."""
