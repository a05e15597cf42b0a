"""``POST /api/v1/refresh``: ask the upstreams now what some tags are (DESIGN D13).

``{"images": ["team/app:v1"]}`` is answered, when every image has been asked for, by

    {"images": [{"image": "team/app:v1", "was": "sha256:…", "now": "sha256:…"},
                {"image": "team/gone:v1", "error": {"code": "MANIFEST_UNKNOWN", "message": "…"}}]}

``was`` is null for a tag that was not known. A name without a registry means what it means to a
client that pulls from here: the default upstream, or docker.io where there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from proxy.oci.errors import PullError, RequestInvalid
from proxy.oci.image import ImageName
from proxy.oci.reference import Tag
from proxy.pull.asks import Ask
from proxy.pull.serve import Answerer
from proxy.upstream.routing import Routes
from proxy.web.orders import Refused, order

#: Images of one request, at most.
MAX_IMAGES = 100
#: Who asks, for the queue: the operator has a share of turns like any client.
CLIENT = "admin"


class Refresh:
    """``post`` is the handler. ``host`` is what the admin listener was told to be called."""

    def __init__(self, *, puller: Answerer, routes: Routes, host: str) -> None:
        self._puller = puller
        self._routes = routes
        self._host = host

    async def post(self, request: web.Request) -> web.Response:
        """Handle one request."""
        try:
            names = _names(await order(request, self._host))
        except Refused as error:
            return error.answer()
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"images": await self.refresh(names)})

    async def refresh(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Ask for all of them at the same time; what came of each, in their order."""
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._one(name)) for name in names]
        return [task.result() for task in asked]

    async def _one(self, name: str) -> dict[str, Any]:
        try:
            image = ImageName.parse(name)
            if not isinstance(image.reference, Tag):
                raise RequestInvalid("a digest never changes: name a tag")
            ask = Ask(self._routes.image(image), CLIENT, asyncio.get_running_loop().time())
            found = await self._puller.refresh(ask, image.reference)
        except PullError as error:
            return {"image": name, "error": {"code": error.code, "message": error.message}}
        was = None if found.was is None else str(found.was)
        return {"image": name, "was": was, "now": str(found.digest)}


def _names(document: Any) -> list[str]:
    """The images of a request. Raises ``ValueError``."""
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError('send {"images": ["NAME", …]}')
    if not 0 < len(images) <= MAX_IMAGES:
        raise ValueError(f"name 1 to {MAX_IMAGES} images, not {len(images)}")
    return images
