"""spo: an experiment framework for aligning language models to preferences."""

__version__ = "0.1.0"
