"""The time that chat templates write: one moment for all rows, or the date of a setting."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from spo.errors import DataError

CLOCK = "strftime_now"
"""Name of the function by which chat templates read the time, and of the argument that fixes it."""
_CALLS = re.compile(rf"\b{CLOCK}\s*\(\s*(?:'([^'\\]*)'|\"([^\"\\]*)\")\s*\)")


class Clock:
    """A clock that stands still, so that the tokens of a row do not depend on when it is rendered.

    Args:
        moment: Date such as ``2026-01-31``; ``None`` for the present.

    Attributes:
        is_set: Whether a setting gives the date.

    Raises:
        DataError: The date cannot be read.
    """

    def __init__(self, moment: Any = None) -> None:
        self.is_set = moment is not None
        try:
            self._moment = datetime.fromisoformat(str(moment)) if self.is_set else datetime.now()
        except ValueError:
            raise DataError(
                f"data.chat_template_kwargs.{CLOCK}={moment}: write a date such as 2026-01-31, or leave it out"
            ) from None

    def stop_in(self, template: str) -> str:
        """Return a chat template that reads this clock.

        A macro takes the place of the function of transformers, which templates cannot be given in another way.
        """
        formats = {single or double for single, double in _CALLS.findall(template)}
        if not formats or len(_CALLS.findall(template)) < len(re.findall(rf"\b{CLOCK}\s*\(", template)):
            return template
        times = "".join(
            f"{{% if format == {json.dumps(text)} %}}{self._moment.strftime(text)}{{% endif %}}"
            for text in sorted(formats)
        )
        return f"{{% macro {CLOCK}(format) %}}{times}{{% endmacro %}}{template}"
