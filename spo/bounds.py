"""Types with bounds and choices, to annotate the parameters that configuration files set.

A parameter states its own bounds, and ``spo.config.checks`` reads them: ``batch_size: PositiveInt``. Any other bound is
written out, ``Annotated[int, Ge(2)]``, with the classes of the package ``annotated-types``. A plugin does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt

Function = TypeVar("Function", bound=Callable[..., Any])

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]  # for shares that must leave something on both sides
DropoutRate = Annotated[float, Ge(0), Lt(1)]

FloatType = Literal["float32", "bfloat16", "float64"]
"""Number types of weights, by torch's names; the range of float16 is too small for summed log-probabilities."""

Truncation = Literal["drop_pair", "trim_completion", "trim_prompt"]
"""Treatment of a pair that exceeds the length limit."""
OnBadRow = Literal["stop", "skip"]
"""Treatment of a row that cannot be read."""


def validated_by(check: Callable[..., None]) -> Callable[[Function], Function]:
    """Declare a function that checks the arguments of a costly one before a run.

    Args:
        check: Function with the same parameters that raises :class:`ValueError` if a call could not succeed.
    """

    def declare(function: Function) -> Function:
        vars(function)["validate"] = check
        return function

    return declare
