"""spo: an experiment framework for aligning language models to preferences."""

from spo import _old_names as _old_names

__version__ = "0.2.0.dev0"
