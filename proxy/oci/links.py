"""Pagination links: the upstream's cursor on our path (RFC 8288, distribution-spec "Listing Tags").

Clients follow `Link: <…>; rel="next"` wherever it points. It has to point at us, under the name
the client knows, so only the query of the upstream's target survives: the cursor, whatever its
parameters are called.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlencode

_TARGET = re.compile(r"[\s,]*<([^<>]*)>")
_PARAMETER = re.compile(
    r"\s*;\s*(?P<name>[^\s;,=\"<>]*+)(?:\s*=\s*(?P<value>\"(?:[^\"\\]|\\.)*+\"|[^\s;,\"]*+))?"
)


def rewrite_next(link_header: str | None, path: str, ns: str | None) -> str | None:
    """Our Link header for the next page, or None when the upstream names none that can be used.

    `path` is the percent-encoded path the client asked, without query; `ns` is the namespace it
    asked for, kept so that the next page comes from the same upstream.
    """
    target = _next_target(link_header or "")
    if target is None:
        return None
    _, _, query = target.partition("#")[0].partition("?")
    # surrogateescape there and back: a cursor is opaque and need not be UTF-8.
    cursor = [
        (name, value)
        for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
        if name != "ns"
    ]
    if not cursor:
        return None
    if ns is not None:
        cursor.append(("ns", ns))
    encoded = urlencode(cursor, errors="surrogateescape", quote_via=quote)
    return f'<{path}?{encoded}>; rel="next"'


def _next_target(header: str) -> str | None:
    """The target of the first link whose relation types include "next"."""
    position = 0
    while link := _TARGET.match(header, position):
        relations: list[str] | None = None
        position = link.end()
        while parameter := _PARAMETER.match(header, position):
            position = parameter.end()
            # §3.3: the first `rel` counts, later ones are ignored.
            if relations is None and parameter["name"].lower() == "rel":
                relations = (parameter["value"] or "").strip('"').lower().split()
        if "next" in (relations or ()):
            return link.group(1)
    return None
