"""The size of everything in a demonstration."""

from __future__ import annotations

from dataclasses import dataclass

#: Layers of an image.
LAYERS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """`clients` share `images` of `layers` each; the registry allows `limit` connections.

    `layer_size` in bytes, `rate` in bytes per second that the registry sends on each connection.
    """

    clients: int
    limit: int
    images: int
    layers: int
    layer_size: int
    rate: int

    @property
    def wanted(self) -> int:
        """Bytes of layers that a crowd wants, each client's counted."""
        return self.clients * self.layers * self.layer_size
