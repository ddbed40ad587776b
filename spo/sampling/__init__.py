"""Drawing completions from a model."""

from spo.sampling.buffer import SampleBuffer
from spo.sampling.generate import eval_mode, sample
from spo.seeds import derive_seed

__all__ = ["SampleBuffer", "derive_seed", "eval_mode", "sample"]
