"""Drawing completions from a model."""

from spo.sampling.buffer import SampleBuffer
from spo.sampling.generate import derive_seed, eval_mode, sample

__all__ = ["SampleBuffer", "derive_seed", "eval_mode", "sample"]
