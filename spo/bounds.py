"""Types with bounds and choices, to annotate the parameters that configuration files set.

A parameter states its own bounds, and ``spo.config.checks`` reads them: ``batch_size: PositiveInt``. Any other bound is
written out, ``Annotated[int, Ge(2)]``, with the classes of the package ``annotated-types``. A plugin does the same.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]  # for shares that must leave something on both sides
DropoutRate = Annotated[float, Ge(0), Lt(1)]

FloatType = Literal["float32", "bfloat16", "float64"]
"""Number types of weights, by torch's names; the range of float16 is too small for summed log-probabilities."""
