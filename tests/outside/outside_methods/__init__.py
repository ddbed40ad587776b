"""Losses from outside the package, one file each, as a user writes them: public names of ``spo`` alone."""
