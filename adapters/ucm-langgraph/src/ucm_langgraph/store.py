"""OwnedStore: memories that belong to the user whose code asks, on any of LangGraph's stores.

Each namespace begins, in the wrapped store, with a label that is derived of the user. It is put before what the code
names and taken off what comes back, and what comes back without it is refused.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar, cast

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    validate_op_namespace,
)

from ucm_langgraph.owner import Owner
from ucm_middleware import current_context

_KIND: Final = "langgraph_store"
_PAGE: Final = 100

Kept = TypeVar("Kept", bound=Item)


class OwnedStore(BaseStore):
    """Wraps a store so that each user has namespaces of their own, whatever they are called.

    It works for the code of a context's user, in runs and in requests. Elsewhere it raises ContextNotFoundError, and in
    code that outlived its context ContextClosedError. What is stored under a previous secret is moved to the current
    one when it is first used; it begins to live anew then, with the store's own default of ``ttl`` and ``index``.
    ``setup()`` and the like are the wrapped store's.
    """

    __slots__ = ("_store",)

    def __init__(self, store: BaseStore) -> None:
        """Wrap ``store``. Raises TypeError for what is none, and for one that is wrapped already."""
        if not isinstance(store, BaseStore) or isinstance(store, OwnedStore):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a LangGraph store is needed, not {type(store).__name__}")
        self._store = store

    @property
    def supports_ttl(self) -> bool:  # type: ignore[override]
        """The wrapped store's."""
        return self._store.supports_ttl

    @property
    def ttl_config(self) -> TTLConfig | None:  # type: ignore[override]
        """The wrapped store's."""
        return self._store.ttl_config

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do several operations on this user's memories; the other methods are made of this one."""
        owner, asked = Owner(current_context(), _KIND), list(ops)
        for former in owner.former:
            for op in asked:
                self._adopt(owner, former, op)
        results = self._store.batch([_inside(owner, op) for op in asked])
        return [_outside(owner, op, result) for op, result in zip(asked, results, strict=True)]

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Do several operations on this user's memories; the other methods are made of this one."""
        owner, asked = Owner(current_context(), _KIND), list(ops)
        for former in owner.former:
            for op in asked:
                await self._aadopt(owner, former, op)
        results = await self._store.abatch([_inside(owner, op) for op in asked])
        return [_outside(owner, op, result) for op, result in zip(asked, results, strict=True)]

    # From a previous secret to the current one.

    def _adopt(self, owner: Owner, former: str, op: Op) -> None:
        if isinstance(op, (GetOp, PutOp)):
            found = self._store.batch([GetOp((former, *op.namespace), op.key, refresh_ttl=False)])[0]
            if found is not None:
                self._store.batch(_moved(owner, [cast("Item", found)]))
            return
        while found := cast("list[Item]", self._store.batch([_page(former, op)])[0]):
            self._store.batch(_moved(owner, found))

    async def _aadopt(self, owner: Owner, former: str, op: Op) -> None:
        if isinstance(op, (GetOp, PutOp)):
            found = (await self._store.abatch([GetOp((former, *op.namespace), op.key, refresh_ttl=False)]))[0]
            if found is not None:
                await self._store.abatch(_moved(owner, [cast("Item", found)]))
            return
        while found := cast("list[Item]", (await self._store.abatch([_page(former, op)]))[0]):
            await self._store.abatch(_moved(owner, found))


def _page(former: str, op: SearchOp | ListNamespacesOp) -> SearchOp:
    return SearchOp((former, *(op.namespace_prefix if isinstance(op, SearchOp) else ())), None, _PAGE)


def _moved(owner: Owner, found: Sequence[Item]) -> list[Op]:
    puts: list[Op] = [PutOp((owner.key, *each.namespace[1:]), each.key, each.value) for each in found]
    return [*puts, *(PutOp(each.namespace, each.key, None) for each in found)]


def _inside(owner: Owner, op: Op) -> Op:
    """The operation as the wrapped store gets it. Raises InvalidNamespaceError for bad labels, TypeError for no op."""
    if not isinstance(op, (GetOp, PutOp, SearchOp, ListNamespacesOp)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"not an operation of a LangGraph store: {type(op).__name__}")
    validate_op_namespace(op)
    if isinstance(op, (GetOp, PutOp)):
        return op._replace(namespace=(owner.key, *op.namespace))
    if isinstance(op, SearchOp):
        return op._replace(namespace_prefix=(owner.key, *op.namespace_prefix))
    conditions = [
        each if each.match_type == "suffix" else MatchCondition("prefix", (owner.key, *each.path))
        for each in op.match_conditions or ()
    ]
    return op._replace(
        match_conditions=(MatchCondition("prefix", (owner.key,)), *conditions),
        max_depth=None if op.max_depth is None else op.max_depth + 1,
    )


def _outside(owner: Owner, op: Op, result: Result) -> Result:
    """What the wrapped store answered, checked, with the namespaces that the code knows."""
    if isinstance(op, GetOp):
        return None if result is None else _shown(owner, cast("Item", result), _item)
    if isinstance(op, SearchOp):
        return [_shown(owner, each, _search_item) for each in cast("list[SearchItem]", result)]
    if isinstance(op, ListNamespacesOp):
        return [_stripped(owner, each) for each in cast("list[tuple[str, ...]]", result)]
    return result


def _shown(owner: Owner, item: Kept, make: Callable[[Kept, tuple[str, ...]], Kept]) -> Kept:
    return make(item, _stripped(owner, item.namespace))


def _stripped(owner: Owner, namespace: tuple[str, ...]) -> tuple[str, ...]:
    owner.check(namespace[0] if namespace else None)
    return tuple(namespace[1:])


def _item(item: Item, namespace: tuple[str, ...]) -> Item:
    return Item(
        value=item.value, key=item.key, namespace=namespace, created_at=item.created_at, updated_at=item.updated_at
    )


def _search_item(item: SearchItem, namespace: tuple[str, ...]) -> SearchItem:
    return SearchItem(namespace, item.key, item.value, item.created_at, item.updated_at, item.score)
