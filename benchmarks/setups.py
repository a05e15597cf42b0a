"""The configurations of all parts, readable files in `setups/` with places for what a run decides.

A place is a name in capitals between two `@`: nginx's own variables begin with `$`. A place that
is left, or a value that has no place, is a mistake. A line that is nothing but a place goes when
its value is empty.
"""

from __future__ import annotations

import re
from pathlib import Path

DIRECTORY = Path(__file__).with_name("setups")
_PLACE = re.compile(r"@([A-Z_]+)@")


def fill(name: str, **values: object) -> str:
    """The text of `setups/NAME` with its places filled. Raises ValueError."""
    text = (DIRECTORY / name).read_text()
    given = {key.upper(): str(value) for key, value in values.items()}
    places = set(_PLACE.findall(text))
    if places != given.keys():
        raise ValueError(f"{name} has places for {sorted(places)}, given are {sorted(given)}")
    filled = (
        _PLACE.sub(lambda found: given[found[1]], line).rstrip() + "\n"
        for line in text.splitlines()
        if not _PLACE.fullmatch(line.strip()) or given[line.strip(" @")]
    )
    return "".join(filled)
