"""OwnedCheckpointer: checkpoints that belong to the user whose code asks, on any of LangGraph's savers.

The client's thread id comes in and goes out; the saver sees the key that is derived of it and of the user. Each
checkpoint carries two more entries of metadata, which no caller sees: whose it is, so that one user's can be listed,
and what the client calls the thread, so that a listing can be checked and told.
"""

import builtins
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)

from ucm_langgraph.owner import CHECKPOINTS, Owner, Thread, thread_name
from ucm_middleware import ContextNotFoundError, UserExecutionContext, current_context

_OWNER: Final = "ucm_owner"
_NAME: Final = "ucm_thread"
_MARKS: Final = (_OWNER, _NAME)

_RUNNING: Final = "__pregel_runtime"
"""What LangGraph puts into the configuration of a run, and of no other call of the saver's."""

_STAMP: Final = "__pregel_ucm_user"
"""The thread of a run. With this prefix LangGraph keeps it out of metadata and of what it shows."""


class OwnedCheckpointer(BaseCheckpointSaver[Any]):
    """Wraps a saver so that each user has threads of their own, whatever they call them.

    It works for the code of a context's user: for runs of ``execute_with_agent`` and for graphs that an application
    calls inside of a request. Elsewhere it raises ContextNotFoundError, and in code that outlived its context
    ContextClosedError. A thread id that breaks the rules of ids raises InvalidContextError. What another user's code
    asks in the middle of a run (a stream that was passed on) raises CrossUserAccessError.

    Without a thread id, a listing is of all of the user's threads. Threads that are stored under a previous secret are
    moved to the current one when they are first used. ``setup()`` and the like are the wrapped saver's.
    """

    def __init__(self, saver: BaseCheckpointSaver[Any]) -> None:
        """Wrap ``saver``. Raises TypeError for what is none, and for one that is wrapped already."""
        if not isinstance(saver, BaseCheckpointSaver) or isinstance(saver, OwnedCheckpointer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a LangGraph checkpoint saver is needed, not {type(saver).__name__}")
        self._saver = saver
        super().__init__(serde=saver.serde)

    @property
    def config_specs(self) -> builtins.list[Any]:
        """The wrapped saver's."""
        return self._saver.config_specs  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def get_next_version(self, current: Any, channel: None) -> Any:
        """The wrapped saver's."""
        return self._saver.get_next_version(current, channel)

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> "OwnedCheckpointer":
        """A clone on the wrapped saver's clone."""
        saver = self._saver.with_allowlist(extra_allowlist)
        return self if saver is self._saver else OwnedCheckpointer(saver)

    # Loading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that ``config`` names, of this user's thread."""
        thread = _thread_of(config)
        self._adopt(thread)
        return _checked(thread, self._saver.get_tuple(_to_saver(config, thread)))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that ``config`` names, of this user's thread."""
        thread = _thread_of(config)
        await self._aadopt(thread)
        return _checked(thread, await self._saver.aget_tuple(_to_saver(config, thread)))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - the saver's interface
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """The checkpoints of a thread of this user's, or of all of them. The iterator is this user's, too."""
        if config:
            thread = _thread_of(config)
            self._adopt(thread)
            found = self._saver.list(_to_saver(config, thread), filter=filter, before=_bare(before), limit=limit)
            return (_shown(thread, each) for each in found)
        owner = Owner(current_context(), CHECKPOINTS)
        for former in owner.former:
            for name in {_marks(each)[_NAME] for each in self._saver.list(None, filter={_OWNER: former})}:
                self._adopt(Thread(owner.context, name))
        found = self._saver.list(None, filter=_of(owner, filter), before=_bare(before), limit=limit)
        return (_shown(_named(owner.context, each), each) for each in found)

    def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - the saver's interface
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """The checkpoints of a thread of this user's, or of all of them. The iterator is this user's, too."""
        if config:  # whose it is, is decided now, and not by who reads it
            return self._alist_thread(_thread_of(config), config, filter, before, limit)
        return self._alist_all(Owner(current_context(), CHECKPOINTS), filter, before, limit)

    async def _alist_thread(
        self,
        thread: Thread,
        config: RunnableConfig,
        wanted: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> AsyncGenerator[CheckpointTuple]:
        await self._aadopt(thread)
        found = self._saver.alist(_to_saver(config, thread), filter=wanted, before=_bare(before), limit=limit)
        async for each in found:
            yield _shown(thread, each)

    async def _alist_all(
        self, owner: Owner, wanted: dict[str, Any] | None, before: RunnableConfig | None, limit: int | None
    ) -> AsyncGenerator[CheckpointTuple]:
        for former in owner.former:
            old = self._saver.alist(None, filter={_OWNER: former})
            for name in {_marks(each)[_NAME] async for each in old}:
                await self._aadopt(Thread(owner.context, name))
        async for each in self._saver.alist(None, filter=_of(owner, wanted), before=_bare(before), limit=limit):
            yield _shown(_named(owner.context, each), each)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """The wrapped saver's, of this user's thread."""
        thread = _thread_of(config)
        return self._saver.get_delta_channel_history(config=_to_saver(config, thread), channels=channels)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """The wrapped saver's, of this user's thread."""
        thread = _thread_of(config)
        return await self._saver.aget_delta_channel_history(config=_to_saver(config, thread), channels=channels)

    # Storing.

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint in this user's thread."""
        thread = _thread_of(config)
        stored = self._saver.put(_to_saver(config, thread), checkpoint, _marked(thread, metadata), new_versions)
        return _renamed(stored, thread)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint in this user's thread."""
        thread = _thread_of(config)
        stored = await self._saver.aput(_to_saver(config, thread), checkpoint, _marked(thread, metadata), new_versions)
        return _renamed(stored, thread)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote in this user's thread."""
        self._saver.put_writes(_to_saver(config, _thread_of(config)), writes, task_id, task_path)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote in this user's thread."""
        await self._saver.aput_writes(_to_saver(config, _thread_of(config)), writes, task_id, task_path)

    # Whole threads.

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread of this user's, under every secret."""
        for key in Thread(current_context(), thread_id).keys:
            self._saver.delete_thread(key)

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete a thread of this user's, under every secret."""
        for key in Thread(current_context(), thread_id).keys:
            await self._saver.adelete_thread(key)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy one thread of this user's to another."""
        source, target = self._pair(source_thread_id, target_thread_id)
        self._adopt(source)
        self._copy(source.key, target)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy one thread of this user's to another."""
        source, target = self._pair(source_thread_id, target_thread_id)
        await self._aadopt(source)
        await self._acopy(source.key, target)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Prune threads of this user's, as the wrapped saver does."""
        threads = [Thread(current_context(), each) for each in thread_ids]
        for thread in threads:
            self._adopt(thread)
        self._saver.prune([each.key for each in threads], strategy=strategy)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Prune threads of this user's, as the wrapped saver does."""
        threads = [Thread(current_context(), each) for each in thread_ids]
        for thread in threads:
            await self._aadopt(thread)
        await self._saver.aprune([each.key for each in threads], strategy=strategy)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Refused: run ids say nothing of whose they are."""
        raise NotImplementedError(_NOT_BY_RUN)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Refused: run ids say nothing of whose they are."""
        raise NotImplementedError(_NOT_BY_RUN)

    # From one key to another.

    @staticmethod
    def _pair(source: str, target: str) -> tuple[Thread, Thread]:
        context = current_context()
        return Thread(context, source), Thread(context, target)

    def _adopt(self, thread: Thread) -> None:
        """Move what stands under a previous secret to the current one. Begun again, it goes on where it ended."""
        for former in thread.former:
            if self._copy(former, thread):
                self._saver.delete_thread(former)

    async def _aadopt(self, thread: Thread) -> None:
        for former in thread.former:
            if await self._acopy(former, thread):
                await self._saver.adelete_thread(former)

    def _copy(self, source: str, target: Thread) -> bool:
        stored = list(self._saver.list({"configurable": {"thread_id": source}}))
        for each in sorted(stored, key=_age):
            config, metadata, versions = _again(each, target)
            stored_as = self._saver.put(config, each.checkpoint, metadata, versions)
            for task_id, writes, path in _writes_of(each):
                self._saver.put_writes(stored_as, writes, task_id, path)
        return bool(stored)

    async def _acopy(self, source: str, target: Thread) -> bool:
        stored = [each async for each in self._saver.alist({"configurable": {"thread_id": source}})]
        for each in sorted(stored, key=_age):
            config, metadata, versions = _again(each, target)
            stored_as = await self._saver.aput(config, each.checkpoint, metadata, versions)
            for task_id, writes, path in _writes_of(each):
                await self._saver.aput_writes(stored_as, writes, task_id, path)
        return bool(stored)


_NOT_BY_RUN: Final = (
    "runs are not deleted by their ids here, since an id does not say whose run it is: delete the user's threads with "
    "delete_thread(), or ask the wrapped saver outside of requests"
)


def _thread_of(config: RunnableConfig) -> Thread:
    """The thread that ``config`` names, of the user whose code asks.

    A run is stamped with its thread when it loads its state. So no other user's code can go on with it; and what a
    graph that blocks stores from the callbacks of its threads, where it has lost the context, is still the run's.
    """
    configurable = _configurable(config)
    name = thread_name(configurable.get("thread_id"))
    stamp = configurable.get(_STAMP)
    try:
        context = current_context()
    except ContextNotFoundError:
        if not isinstance(stamp, Thread) or stamp.name != name:
            raise
        stamp.context.require_usable()
        return stamp
    if not isinstance(stamp, Thread):
        thread = Thread(context, name)
        if _RUNNING in configurable:
            configurable[_STAMP] = thread  # in LangGraph's own copy, not in what an application gave
        return thread
    if stamp.context.user_id != context.user_id:
        context.check_key("langgraph_run", name, None)  # records the denial, and raises
    return stamp if stamp.name == name else Thread(context, name)


def _configurable(config: RunnableConfig) -> dict[str, Any]:
    return config.get("configurable") or {}


def _to_saver(config: RunnableConfig, thread: Thread) -> RunnableConfig:
    configurable = {**_configurable(config), "thread_id": thread.key}
    configurable.pop(_STAMP, None)
    return cast("RunnableConfig", {**config, "configurable": configurable})


def _renamed(config: RunnableConfig, thread: Thread) -> RunnableConfig:
    return cast("RunnableConfig", {**config, "configurable": {**_configurable(config), "thread_id": thread.name}})


def _bare(before: RunnableConfig | None) -> RunnableConfig | None:
    """``before`` names a checkpoint; the thread in it is the client's, and no saver asks for it."""
    if before is None:
        return None
    return {"configurable": {"checkpoint_id": _configurable(before).get("checkpoint_id")}}


def _checked(thread: Thread, found: CheckpointTuple | None) -> CheckpointTuple | None:
    return None if found is None else _shown(thread, found)


def _shown(thread: Thread, found: CheckpointTuple) -> CheckpointTuple:
    """What was loaded, checked, as the client may see it."""
    thread.check(_configurable(found.config).get("thread_id"))
    parent = found.parent_config
    return found._replace(
        config=_renamed(found.config, thread),
        metadata=cast("CheckpointMetadata", {k: v for k, v in found.metadata.items() if k not in _MARKS}),
        parent_config=None if parent is None else _renamed(parent, thread),
    )


def _named(context: UserExecutionContext, found: CheckpointTuple) -> Thread:
    return Thread(context, _marks(found)[_NAME])


def _marks(found: CheckpointTuple) -> dict[str, Any]:
    return cast("dict[str, Any]", found.metadata)


def _of(owner: Owner, wanted: dict[str, Any] | None) -> dict[str, Any]:
    return {**(wanted or {}), _OWNER: owner.key}


def _marked(thread: Thread, metadata: CheckpointMetadata) -> CheckpointMetadata:
    return cast("CheckpointMetadata", {**metadata, _OWNER: thread.owner, _NAME: thread.name})


def _age(found: CheckpointTuple) -> str:
    return found.checkpoint["id"]


def _again(found: CheckpointTuple, target: Thread) -> tuple[RunnableConfig, CheckpointMetadata, ChannelVersions]:
    """What to put so that a checkpoint stands in another thread too, with its parent."""
    configurable = _configurable(found.config)
    parent = None if found.parent_config is None else _configurable(found.parent_config).get("checkpoint_id")
    config: RunnableConfig = {
        "configurable": {
            "thread_id": target.key,
            "checkpoint_ns": configurable.get("checkpoint_ns", ""),
            "checkpoint_id": parent,
        }
    }
    return config, _marked(target, found.metadata), found.checkpoint["channel_versions"]


def _writes_of(found: CheckpointTuple) -> Iterator[tuple[str, list[tuple[str, Any]], str]]:
    """What to put again, task by task, each with a path that sorts as these are sorted: what it was, no saver tells."""
    writes: dict[str, list[tuple[str, Any]]] = {}
    for task_id, channel, value in found.pending_writes or ():
        writes.setdefault(task_id, []).append((channel, value))
    for place, (task_id, written) in enumerate(writes.items()):
        yield task_id, written, f"{place:08d}"
