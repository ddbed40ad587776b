"""Sampling of completions from a model."""

from spo.forward.modes import eval_mode
from spo.sampling.buffer import SampleBuffer
from spo.sampling.generate import sample
from spo.sampling.stops import contents, is_finished
from spo.seeds import derive_seed

__all__ = ["SampleBuffer", "contents", "derive_seed", "eval_mode", "is_finished", "sample"]
