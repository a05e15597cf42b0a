"""Routing: ns, then path prefix, then default, over a closed list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.oci.errors import NameInvalid, NameUnknown
from proxy.oci.reference import Repository
from proxy.upstream.routing import DOCKER_HUB_NAMES, Routes, Upstream

HARBOR = Upstream("harbor.example.com", "https://harbor.example.com", aliases=("harbor",))
HUB = Upstream("docker.io", "https://hub.example.com", library=True)
PORT = Upstream("Registry.example.com:5000", "http://10.0.0.7:5000/base/")
CACHED = Upstream(
    "ghcr.io", "https://harbor.example.com", repository_prefix="/ghcr-proxy", aliases=("GH",)
)
ALL = (HARBOR, HUB, PORT, CACHED)
ROUTES = Routes(ALL, default="harbor.example.com")

components = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-)[a-z0-9]{1,8})?", fullmatch=True)
repositories = st.lists(components, min_size=1, max_size=4).map("/".join)
names = st.sampled_from(sorted(name for upstream in ALL for name in upstream.names))


def owner(name: str) -> Upstream:
    return next(upstream for upstream in ALL if name.lower() in upstream.names)


@st.composite
def any_case(draw: st.DrawFn) -> str:
    return "".join(draw(st.sampled_from((c, c.upper()))) for c in draw(names))


def expected(upstream: Upstream, asked: str) -> str:
    library = "library/" if upstream is HUB and "/" not in asked else ""
    return upstream.repository_prefix + library + asked


@given(repository=repositories, ns=any_case())
def test_ns_decides_whatever_the_path_says(repository: str, ns: str) -> None:
    route = ROUTES.route(Repository.parse(repository), ns)
    assert route.upstream is owner(ns)
    assert route.repository == expected(route.upstream, repository)
    assert (route.asked, route.ns) == (repository, ns)


@given(repository=repositories, prefix=names.filter(lambda name: ":" not in name))
def test_a_path_prefix_decides_when_there_is_no_ns(repository: str, prefix: str) -> None:
    asked = f"{prefix}/{repository}"
    route = ROUTES.route(Repository.parse(asked), None)
    assert route.upstream is owner(prefix)
    assert route.repository == expected(route.upstream, repository)
    assert (route.asked, route.ns) == (asked, None)


@given(repository=repositories)
def test_everything_else_goes_to_the_default(repository: str) -> None:
    route = ROUTES.route(Repository.parse(f"x--y/{repository}"), None)
    assert route.upstream is HARBOR
    assert route.repository == route.asked == f"x--y/{repository}"


@given(repository=repositories, ns=st.text(min_size=1))
def test_an_ns_outside_the_list_is_unknown_and_never_dialled(repository: str, ns: str) -> None:
    if ns.isascii() and any(ns.lower() in upstream.names for upstream in ALL):
        return
    with pytest.raises(NameUnknown) as caught:
        ROUTES.route(Repository.parse(repository), ns)
    assert caught.value.status == 404
    assert caught.value.message.isprintable()


def test_an_ns_that_only_folds_to_a_known_name_is_unknown() -> None:
    assert "doc\N{KELVIN SIGN}er.io".lower() == "docker.io"
    with pytest.raises(NameUnknown):
        ROUTES.route(Repository.parse("library/alpine"), "doc\N{KELVIN SIGN}er.io")


def test_an_empty_ns_counts_as_none() -> None:
    route = ROUTES.route(Repository.parse("ghcr.io/team/app"), "")
    assert (route.upstream, route.ns) == (CACHED, None)


@pytest.mark.parametrize("name", DOCKER_HUB_NAMES)
def test_docker_hub_answers_to_all_of_its_names(name: str) -> None:
    assert ROUTES.route(Repository.parse("alpine"), name).repository == "library/alpine"
    assert ROUTES.route(Repository.parse(f"{name}/alpine"), None).repository == "library/alpine"
    assert ROUTES.route(Repository.parse("team/app"), name).repository == "team/app"


def test_library_comes_before_the_prefix() -> None:
    behind_harbor = Upstream(
        "docker.io", "https://h.example.com", repository_prefix="dockerhub-proxy/", library=True
    )
    route = Routes([behind_harbor], "index.docker.io").route(Repository.parse("alpine"), None)
    assert route.repository == "dockerhub-proxy/library/alpine"
    assert route.asked == "alpine"


def test_a_lone_component_is_a_repository_even_if_an_upstream_has_its_name() -> None:
    route = ROUTES.route(Repository.parse("docker.io"), None)
    assert (route.upstream, route.repository) == (HARBOR, "docker.io")


def test_an_ns_keeps_its_port() -> None:
    repository = Repository.parse("a/b")
    assert ROUTES.route(repository, "registry.example.com:5000").upstream is PORT
    with pytest.raises(NameUnknown):
        ROUTES.route(repository, "registry.example.com")
    with pytest.raises(NameUnknown):
        ROUTES.route(repository, "harbor.example.com:443")


def test_without_a_default_only_named_upstreams_answer() -> None:
    routes = Routes(ALL, default=None)
    assert routes.route(Repository.parse("harbor/a/b"), None).repository == "a/b"
    with pytest.raises(NameUnknown):
        routes.route(Repository.parse("team/app"), None)


def test_a_name_too_long_for_the_upstream_is_the_clients_fault() -> None:
    longest = "a" * 250
    assert ROUTES.route(Repository.parse(longest), None).repository == longest
    with pytest.raises(NameInvalid):
        ROUTES.route(Repository.parse(longest), "docker.io")


def test_a_name_claimed_twice_is_refused() -> None:
    twin = Upstream("other.example.com", "https://o.example.com", aliases=("HARBOR",))
    with pytest.raises(ValueError, match="'harbor' names both"):
        Routes([HARBOR, twin], default=None)


def test_a_default_outside_the_list_is_refused() -> None:
    with pytest.raises(ValueError, match="not among the upstreams"):
        Routes(ALL, default="quay.example.com")


def test_url_and_prefix_are_kept_in_one_form() -> None:
    assert PORT.url == "http://10.0.0.7:5000/base"
    assert CACHED.repository_prefix == "ghcr-proxy/"


@pytest.mark.parametrize(
    "url",
    [
        "harbor.example.com",
        "ftp://harbor.example.com",
        "https://",
        "https://harbor.example.com/?a=1",
        "https://harbor.example.com/#a",
        "https://user:secret@harbor.example.com",
    ],
)
def test_a_url_that_cannot_be_an_upstream_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ValueError, match="upstream 'x'") as caught:
        Upstream("x", url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "https://a", "a/b", "ü.example.com", "u@h", "a\n"])
def test_a_name_that_no_client_could_say_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="host or host:port"):
        Upstream(name, "https://harbor.example.com")


def test_a_prefix_that_is_no_repository_path_is_refused() -> None:
    with pytest.raises(ValueError, match="repository_prefix"):
        Upstream("x", "https://harbor.example.com", repository_prefix="../up/")


def test_routes_show_what_they_hold() -> None:
    assert "docker.io" in repr(ROUTES)
    assert "default harbor.example.com" in repr(ROUTES)
    assert "default none" in repr(Routes([HUB], None))
