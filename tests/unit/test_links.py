"""The cursor survives; where the upstream says it lives does not."""

from urllib.parse import parse_qsl, quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.links import rewrite_next

PATH = "/v2/team/app/tags/list"


def _next(header: str | None, ns: str | None = None) -> str | None:
    return rewrite_next(header, PATH, ns)


@pytest.mark.parametrize(
    "target",
    [
        "/v2/other/tags/list?last=b&n=2",
        "https://registry.example.com:8443/v2/other/tags/list?last=b&n=2",
        "http://[bad/?last=b&n=2",
        "?last=b&n=2",
        "//evil.example/?last=b&n=2#fragment",
        "/v2/x?last=b&n=2&ns=evil.example",
    ],
)
def test_the_next_page_is_on_our_path_wherever_the_upstream_points(target: str) -> None:
    assert _next(f'<{target}>; rel="next"') == f'<{PATH}?last=b&n=2>; rel="next"'


@pytest.mark.parametrize(
    "parameters",
    [
        '; rel="next"',
        ";rel=next",
        '; REL="NEXT"',
        '; rel="prev next"',
        ' ; title="a, \\"b\\"; rel=prev" ; rel = "next"',
        '; rel="next"; rel="prev"',
    ],
)
def test_every_way_to_write_next_is_read(parameters: str) -> None:
    assert _next(f"</x?n=1>{parameters}") == f'<{PATH}?n=1>; rel="next"'


def test_next_is_found_among_other_links() -> None:
    header = '</a?n=1>; rel="first", </b?n=2>; rel=prev,</c?n=3>; rel="next", </d?n=4>; rel=next'
    assert _next(header) == f'<{PATH}?n=3>; rel="next"'


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        "</x?n=1>",
        '</x?n=1>; rel="prev"',
        '</x?n=1>; rel="prev"; rel="next"',
        '</x?n=1>; rel="nextish"',
        '</x>; rel="next"',
        '</x?>; rel="next"',
        '</x?ns=docker.io>; rel="next"',
        '</x#?n=1>; rel="next"',
        '</x?n=1; rel="next"',
    ],
)
def test_without_a_usable_next_link_there_is_none(header: str | None) -> None:
    assert _next(header, "docker.io") is None


def test_the_namespace_of_the_request_is_kept() -> None:
    assert _next("</x?n=1&ns=internal>; rel=next", "docker.io:443") == (
        f'<{PATH}?n=1&ns=docker.io%3A443>; rel="next"'
    )


def test_the_filter_and_cursor_of_referrers_are_kept() -> None:
    header = '</x?artifactType=application%2Fvnd.example%2Bjson&nextToken=a%2Fb%3D%3D>; rel="next"'
    rewritten = _next(header)
    assert rewritten is not None
    assert parse_qsl(rewritten.partition("?")[2].partition(">")[0]) == [
        ("artifactType", "application/vnd.example+json"),
        ("nextToken", "a/b=="),
    ]


@given(st.binary(min_size=1, max_size=30))
def test_a_cursor_of_any_bytes_arrives_unchanged(cursor: bytes) -> None:
    written = quote(cursor, safe="")
    assert _next(f"</x?t={written}>; rel=next") == f'<{PATH}?t={written}>; rel="next"'


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(max_size=8)), min_size=1).filter(
        lambda pairs: all(name != "ns" for name, _ in pairs)
    )
)
def test_every_parameter_of_the_cursor_survives_in_order(pairs: list[tuple[str, str]]) -> None:
    rewritten = _next(f"</x?{urlencode(pairs)}>; rel=next")
    assert rewritten is not None
    query = rewritten.partition("?")[2].partition(">")[0]
    assert parse_qsl(query, keep_blank_values=True) == pairs


@given(st.text(max_size=60) | st.text(alphabet='<>/?&=n1;, "\\rel\r\n', max_size=60))
def test_no_header_makes_it_raise_or_leave_its_line(header: str) -> None:
    for text in (header, f"<{header}>; rel=next", f"</x?{header}>; rel=next"):
        rewritten = _next(text)
        if rewritten is not None:
            assert rewritten.startswith(f"<{PATH}?")
            assert rewritten.count(">") == 1
            assert rewritten.isascii()
            assert rewritten.isprintable()
