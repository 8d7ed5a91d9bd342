"""OwnedCache: results of nodes that are kept for the user whose run made them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from langgraph.cache.base import BaseCache, FullKey, Namespace

from ucm_langgraph.owner import Owner
from ucm_middleware import ContextNotFoundError, current_context

_KIND: Final = "langgraph_cache"


class OwnedCache(BaseCache[Any]):
    """Wraps a cache so that a node that is given the same as another user's node computes its own result.

    LangGraph finds results by what the node was given, and a node may know more than that: who runs it. Outside of a
    context it keeps nothing, and what is asked raises ContextNotFoundError. What was kept under a previous secret is
    computed anew.
    """

    def __init__(self, cache: BaseCache[Any]) -> None:
        """Wrap ``cache``. Raises TypeError for what is none, and for one that is wrapped already."""
        if not isinstance(cache, BaseCache) or isinstance(cache, OwnedCache):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a LangGraph cache is needed, not {type(cache).__name__}")
        super().__init__(serde=cache.serde)
        self._cache = cache

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """This user's results for these keys."""
        owner = Owner(current_context(), _KIND)
        return _outside(owner, self._cache.get(_inside(owner, keys)))

    async def aget(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """This user's results for these keys."""
        owner = Owner(current_context(), _KIND)
        return _outside(owner, await self._cache.aget(_inside(owner, keys)))

    def set(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Keep results for this user."""
        if (owner := _present_owner()) is not None:
            self._cache.set(dict(zip(_inside(owner, list(pairs)), pairs.values(), strict=True)))

    async def aset(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Keep results for this user."""
        if (owner := _present_owner()) is not None:
            await self._cache.aset(dict(zip(_inside(owner, list(pairs)), pairs.values(), strict=True)))

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Forget this user's results in these namespaces. Raises ValueError without any: that would be everybody's."""
        self._cache.clear(_own(Owner(current_context(), _KIND), namespaces))

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Forget this user's results in these namespaces. Raises ValueError without any."""
        await self._cache.aclear(_own(Owner(current_context(), _KIND), namespaces))


def _present_owner() -> Owner | None:
    """None where a graph that blocks has lost the context, in the callbacks of its threads: it keeps nothing then."""
    try:
        return Owner(current_context(), _KIND)
    except ContextNotFoundError:
        return None


def _inside(owner: Owner, keys: Sequence[FullKey]) -> list[FullKey]:
    return [((owner.key, *namespace), key) for namespace, key in keys]


def _outside(owner: Owner, found: Mapping[FullKey, Any]) -> dict[FullKey, Any]:
    result: dict[FullKey, Any] = {}
    for (namespace, key), value in found.items():
        owner.check(namespace[0])
        result[namespace[1:], key] = value
    return result


def _own(owner: Owner, namespaces: Sequence[Namespace] | None) -> list[Namespace]:
    if namespaces is None:
        raise ValueError("which namespaces? Without any, the results of all users would be forgotten")
    return [(owner.key, *namespace) for namespace in namespaces]
