"""Which upstream a request is for, decided over a closed list.

Clients name the registry they mean in two ways. containerd and dockerd's containerd image store
add `?ns=<registry host>` to every request they send to a mirror (distribution-spec, "Registry
Proxying"); podman, skopeo and CRI-O write it in front of the path
(`proxy:5000/docker.io/library/alpine`). Whoever says neither means the default.

What a request names is looked up, never dialled: a name that is not in the list ends here as 404,
so neither `ns` nor a path can point the proxy at a host of the client's choosing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from proxy.oci.errors import NameInvalid, NameUnknown
from proxy.oci.image import ImageName
from proxy.oci.reference import Repository

# Three hosts, one registry: image names say the first, old dockerds the second, and the third is
# where the API answers. Clients send any of them as `ns`.
DOCKER_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Upstream:
    """A registry that we pull from.

    `name` and `aliases` are what clients may call it (`host` or `host:port`, any case; one of
    Docker Hub's names brings the other two). `url` is `scheme://host[:port][/base]`; a slash at
    its end is dropped. `repository_prefix` is put in front of every repository ("dockerhub-proxy/"
    for a Harbor proxy-cache project). `library` turns `alpine` into `library/alpine`, as Docker Hub
    wants it. Raises ValueError for what cannot be an upstream.
    """

    name: str
    url: str
    aliases: tuple[str, ...] = ()
    repository_prefix: str = ""
    library: bool = False

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not name or not name.isascii() or not name.isprintable() or set(name) & set(" /?#@"):
                raise ValueError(f"an upstream's name is host or host:port, not {name!r}")
        object.__setattr__(self, "url", _checked_url(self.name, self.url))
        object.__setattr__(self, "repository_prefix", _checked_prefix(self.repository_prefix))

    @property
    def names(self) -> frozenset[str]:
        """Every name that means this upstream, in lower case."""
        own = {name.lower() for name in (self.name, *self.aliases)}
        return frozenset(own | set(DOCKER_HUB_NAMES) if own & set(DOCKER_HUB_NAMES) else own)

    def repository(self, asked: str) -> str:
        """What the upstream calls the repository that clients call `asked`.

        Raises NameInvalid when the two together are longer than a name may be.
        """
        library = "library/" if self.library and "/" not in asked else ""
        if not library and not self.repository_prefix:
            return asked
        return str(Repository.parse(f"{self.repository_prefix}{library}{asked}"))


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes.

    `repository` is the upstream's name for it, `asked` the client's, with the path prefix if there
    was one (links and messages to the client use it). `ns` is the client's parameter when it
    decided, to be echoed as `OCI-Namespace`; None when it did not.
    """

    upstream: Upstream
    repository: str
    asked: str
    ns: str | None


class Routes:
    """The closed list. Raises ValueError when two upstreams claim a name or the default is none."""

    def __init__(self, upstreams: Iterable[Upstream], default: str | None) -> None:
        self.upstreams = tuple(upstreams)
        self._by_name: dict[str, Upstream] = {}
        for upstream in self.upstreams:
            self._claim(upstream)
        self._default: Upstream | None = None
        if default is not None:
            self._default = self._by_name.get(default.lower())
            if self._default is None:
                raise ValueError(f"the default upstream {default!r} is not among the upstreams")

    def _claim(self, upstream: Upstream) -> None:
        for name in sorted(upstream.names):
            other = self._by_name.setdefault(name, upstream)
            if other is not upstream:
                raise ValueError(f"{name!r} names both {other.name!r} and {upstream.name!r}")

    def __repr__(self) -> str:
        default = self._default.name if self._default else "none"
        return f"<Routes {', '.join(u.name for u in self.upstreams)}; default {default}>"

    def route(self, repository: Repository, ns: str | None) -> Route:
        """Pick the upstream: `ns`, else the first path component, else the default.

        An empty `ns` counts as none. Raises NameUnknown when nothing in the list is meant, and
        NameInvalid when the name would be too long for the upstream.
        """
        asked = str(repository)
        if ns:
            # The echo goes into a header, and folding beyond ASCII would let U+212A pass for a k.
            named = self._by_name.get(ns.lower()) if ns.isascii() else None
            if named is None:
                raise NameUnknown(f"no upstream is configured for the namespace {_shown(ns)}")
            return Route(named, named.repository(asked), asked, ns)
        first, _, rest = asked.partition("/")
        named = self._by_name.get(first) if rest else None
        if named is not None:
            return Route(named, named.repository(rest), asked, None)
        if self._default is None:
            raise NameUnknown(f"{asked!r} names no configured upstream and there is no default")
        return Route(self._default, self._default.repository(asked), asked, None)

    def image(self, name: ImageName) -> Route:
        """The same for the name of an image. One without a registry means what it means to a client
        that pulls from here: the default upstream, or docker.io where there is none."""
        try:
            return self.route(name.repository, name.registry)
        except NameUnknown:
            if name.registry is not None:
                raise
            return self.route(name.repository, DOCKER_HUB_NAMES[0])


def _shown(text: str) -> str:
    """A client's words, safe and short enough to say back."""
    return ascii(text if len(text) <= 100 else text[:100] + "…")


def _checked_url(name: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"upstream {name!r}: the url must be http(s)://host[:port][/base]")
    # Kept out of the message: what stands before the @ is a password.
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"upstream {name!r}: credentials do not belong in the url")
    if parts.query or parts.fragment:
        raise ValueError(f"upstream {name!r}: the url takes no query and no fragment")
    return url.rstrip("/")


def _checked_prefix(prefix: str) -> str:
    """The prefix with exactly one slash at its end, or nothing."""
    bare = prefix.strip("/")
    if not bare:
        return ""
    try:
        return f"{Repository.parse(bare)}/"
    except NameInvalid as error:
        raise ValueError(f"repository_prefix {prefix!r} is not a repository path") from error
