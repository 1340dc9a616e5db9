"""HTTP connections that a fault can cut."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class CuttableConnection(H11Protocol):
    """uvicorn's own protocol; ASGI cannot close a connection, so a request finds the ``transport`` in its state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
