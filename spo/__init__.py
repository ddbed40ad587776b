"""spo: an experiment framework for aligning language models to preferences."""

__version__ = "0.2.0.dev0"
