"""Entering resources on a context, to be released at its teardown."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from typing import ParamSpec, TypeVar

from ucm_middleware.dispatch import Wrapping
from ucm_middleware.errors import ContextClosedError
from ucm_middleware.resources import (
    DEFAULT_RELEASE_TIMEOUT,
    OwnerTask,
    Resource,
    async_resource,
    callback_resource,
    closing_resource,
    owner_resource,
    plugin_resource,
    require_entry,
    sync_resource,
)
from ucm_middleware.teardown import Closable

T = TypeVar("T")
P = ParamSpec("P")


class ResourceHolder(Closable):
    """Something that closes, and lets go of what was entered on it, last first.

    What is entered too late, because the closing has begun, is let go of at once, and ContextClosedError raised. The
    optional ``name`` stands for a resource in logs and records; ``timeout`` is in seconds. What cannot be entered or
    closed in the way that is asked for raises ConfigurationError.
    """

    __slots__ = ()

    def enter_context(self, cm: AbstractContextManager[T], *, name: str | None = None) -> T:
        """Enter a context manager and exit it at teardown."""
        self.require_usable()
        require_entry(cm, "__enter__")
        self._begin_journal()
        value = cm.__enter__()
        self._push(sync_resource(cm, name))
        return value

    async def enter_async_context(
        self,
        cm: AbstractAsyncContextManager[T],
        *,
        owner_task: bool = False,
        name: str | None = None,
        timeout: float = DEFAULT_RELEASE_TIMEOUT,
    ) -> T:
        """Enter an asynchronous context manager and exit it at teardown.

        The exit runs in a task of its own. What must exit in the task that it was entered in (anyio task groups, MCP
        sessions) wants ``owner_task=True``: one task then does both.
        """
        self.require_usable()
        require_entry(cm, "__aenter__")
        self._lifetime.require_loop()
        wrapping = self._around_resource(cm, name)
        if not wrapping:
            return await self._enter(cm, owner_task, name, timeout)
        entered = await self._enter_around(wrapping)
        try:
            return await self._enter(cm, owner_task, name, timeout)
        except BaseException as error:
            await self._leave_around(entered, error)
            raise

    def callback(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``function`` at teardown; awaited when it is asynchronous."""
        self._push(callback_resource(partial(function, *args, **kwargs), DEFAULT_RELEASE_TIMEOUT))

    def closing(self, target: T, *, name: str | None = None, timeout: float = DEFAULT_RELEASE_TIMEOUT) -> T:
        """Call the object's ``aclose()``, or else ``close()``, at teardown. Returns the object."""
        self._push(closing_resource(target, name, timeout))
        return target

    async def _enter(self, cm: AbstractAsyncContextManager[T], owner_task: bool, name: str | None, timeout: float) -> T:
        self._begin_journal()
        if not owner_task:
            value = await cm.__aenter__()
            await self._push_entered(async_resource(cm, name, timeout))
            return value
        lifetime = self._lifetime
        owner = OwnerTask(cm, lifetime.mark_release, lambda: lifetime.entered(resource))
        resource = owner_resource(owner, cm, name, timeout)
        await self._push_entered(resource)
        try:
            return await owner.entered()
        except asyncio.CancelledError:
            owner.cancel()
            raise
        except BaseException:
            lifetime.discard(resource)
            raise

    def _push(self, resource: Resource) -> None:
        """Keep a resource that is already open; when the context is not open any more, let go of it and refuse."""
        if resource.is_async:
            self._lifetime.require_loop()
        self._begin_journal()
        self._lifetime.entered(resource)
        try:
            self.require_usable()
            if not self._lifetime.add(resource):
                raise self._closed_error()
        except ContextClosedError as error:
            self._lifetime.release_late_here(resource, error)
            raise

    async def _push_entered(self, resource: Resource) -> None:
        """The same for what was entered asynchronously, meanwhile."""
        if resource.owner is None:  # else it is about to be entered
            self._lifetime.entered(resource)
        if not self._lifetime.add(resource):
            error = self._closed_error()
            await self._lifetime.release_late(resource, error)
            raise error

    def _begin_journal(self) -> None:
        """See to it that there is a journal, if anybody keeps one: it is still there when the context has closed."""

    # What plugins wrap with.

    def _around_resource(self, cm: object, name: str | None) -> Sequence[Wrapping]:
        """What plugins wrap this resource with, the outermost first."""
        return ()

    async def _enter_around(self, wrapping: Sequence[Wrapping]) -> list[Resource]:
        """Enter what plugins wrap something with. The teardown lets go of it, unless ``_leave_around`` does before."""
        entered: list[Resource] = []
        self._begin_journal()
        try:
            for implementation, cm in wrapping:
                try:
                    await cm.__aenter__()
                except Exception as error:
                    implementation.blame(error)
                    raise
                resource = plugin_resource(cm, str(implementation), implementation.blame)
                await self._push_entered(resource)
                entered.append(resource)
        except BaseException as error:
            await self._leave_around(entered, error)
            raise
        return entered

    async def _leave_around(self, entered: Sequence[Resource], error: BaseException | None) -> None:
        """Let go of it now. What a cancellation keeps from its turn is let go of at the teardown."""
        for resource in reversed(entered):
            if self._lifetime.discard(resource):
                await self._lifetime.release_late(resource, error)
