"""Where LoRA adapters are loaded: an engine that has one need not load it, and throw another one out for it.

An engine tells of which adapters requests run, and how many fit. One that ran there lately is still loaded, until as
many others came as fit. It is a preference among endpoints with room, nothing more: a page that lies attracts requests
for models that its endpoint serves anyway, and until it is half full, or twice as full as the emptiest whose slots are
all taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load


class Adapters:
    """Who has which adapter loaded, as far as pages tell.

    Attributes:
        by_name: who has it, for each adapter that anybody has.
    """

    __slots__ = ("_by_endpoint", "by_name")

    def __init__(self) -> None:
        """Start without any."""
        self._by_endpoint: dict[Endpoint, dict[str, None]] = {}  # the one that ran last stands last
        self.by_name: dict[str, dict[Endpoint, None]] = {}

    def follow(self, endpoint: Endpoint, load: Load) -> None:
        """Follow what a page tells; a page that tells nothing of adapters changes nothing."""
        if load.adapters is None:
            return
        loaded = self._by_endpoint.setdefault(endpoint, {})
        for name in load.adapters:
            loaded.pop(name, None)
            loaded[name] = None
            self.by_name.setdefault(name, {})[endpoint] = None
        for name in list(loaded)[: max(len(loaded) - max(load.adapter_slots or 0, len(load.adapters)), 0)]:
            del loaded[name]
            self._drop(name, endpoint)

    def forget(self, endpoint: Endpoint) -> None:
        """Forget an endpoint that is gone. Unknown: no-op."""
        for name in self._by_endpoint.pop(endpoint, ()):
            self._drop(name, endpoint)

    def having(self, model: str | None) -> dict[Endpoint, None]:
        """Return who has the adapter called `model` loaded."""
        return self.by_name.get(model, _NOBODY) if model is not None else _NOBODY

    def _drop(self, name: str, endpoint: Endpoint) -> None:
        having = self.by_name[name]
        del having[endpoint]
        if not having:
            del self.by_name[name]


_NOBODY: dict[Endpoint, None] = {}
