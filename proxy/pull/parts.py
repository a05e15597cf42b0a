"""Is what came for a range of a blob that range, and of that blob (D9)?"""

from __future__ import annotations

from proxy.oci.errors import SizeMismatch, UnexpectedAnswer
from proxy.pull.sources import Source, TurnBody


class Contradiction(UnexpectedAnswer):
    """A range was asked for, and what came is none; it says nothing of how well the upstream is."""

    reason = "range_contradicted"


def expect_part(body: TurnBody, size: int | None, source: Source) -> None:
    """Raises ``Contradiction`` if it is none, ``SizeMismatch`` if the blob is not of this size."""
    if not body.is_part:
        raise Contradiction(f"{source.key[0]}: a range was answered by a whole body")
    if size is not None and body.total not in (None, size):
        raise SizeMismatch(size, body.total or 0)
