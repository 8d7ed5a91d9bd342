"""Running code in a context by hand, and the module functions around it."""

import asyncio
from functools import partial

import pytest

from support.contexts import running_as
from ucm_middleware import (
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    UnifiedIDManager,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
    validate_user_context,
)


class TestMaking:
    def test_ids_that_are_not_given_are_made(self) -> None:
        context = create_isolated_execution_context("alice")
        ids = UnifiedIDManager()
        assert ids.extract_thread_id(context.run_id) == context.thread_id
        assert ids.parse(context.request_id).kind == "request"

    def test_what_is_given_is_taken(self) -> None:
        context = create_isolated_execution_context("alice", "r-1", thread_id="t-1", run_id="run-1")
        assert (context.user_id, context.request_id) == ("alice", "r-1")
        assert (context.thread_id, context.run_id) == ("t-1", "run-1")


class TestValidating:
    def test_a_live_context_comes_back_itself(self) -> None:
        context = create_isolated_execution_context("alice")
        assert validate_user_context(context) is context

    def test_a_subclass_is_a_context(self) -> None:
        class Ours(UserExecutionContext): ...

        assert validate_user_context(Ours(user_id="alice", thread_id="t-1", run_id="r-1")).user_id == "alice"

    def test_anything_else_is_told_what_it_is(self) -> None:
        with pytest.raises(InvalidContextError, match="is a dict, not a UserExecutionContext"):
            validate_user_context({})

    def test_a_closed_one_is_told_when_it_closed(self) -> None:
        context = create_isolated_execution_context("alice")
        context.close("cleared")
        with pytest.raises(ContextClosedError, match="cleared"):
            validate_user_context(context)


class TestRunningIn:
    def test_the_block_runs_in_it_and_it_closes_after(self) -> None:
        context = create_isolated_execution_context("alice")
        with managed_user_context(context) as entered:
            assert entered is current_context() is context
        assert context.is_open is False
        with pytest.raises(ContextNotFoundError):
            current_context()

    async def test_resources_are_released_in_it_and_waited_for(self) -> None:
        seen: list[UserExecutionContext] = []

        async def release() -> None:
            await asyncio.sleep(0)
            seen.append(current_context())

        context = create_isolated_execution_context("alice")
        async with managed_user_context(context):
            context.callback(release)
            context.callback(lambda: seen.append(current_context()))
        assert seen == [context, context]
        with pytest.raises(ContextNotFoundError):
            current_context()

    async def test_a_cancellation_from_outside_stays_one(self) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(asyncio.CancelledError):
            async with managed_user_context(context):
                raise asyncio.CancelledError
        with pytest.raises(ContextClosedError, match="cancelled"):
            validate_user_context(context)

    def test_a_resource_that_fails_is_raised_in_a_group(self) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(ExceptionGroup) as caught, managed_user_context(context):
            context.callback(partial(int, "no number"))
            context.callback(partial(int, "no number either"))
        assert [type(error) for error in caught.value.exceptions] == [ValueError, ValueError]
        assert context.request_id in str(caught.value)

    async def test_an_error_of_the_block_goes_first_with_a_note(self) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(LookupError) as caught:
            async with managed_user_context(context):
                context.callback(partial(int, "no number"))
                raise LookupError("of the block")
        assert "1 resources" in caught.value.__notes__[0]

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(LookupError(), "failed"), (asyncio.CancelledError(), "cancelled")],
        ids=["failed", "cancelled"],
    )
    def test_the_reason_says_how_the_block_ended(self, error: BaseException, reason: str) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(type(error)), managed_user_context(context):
            raise error
        with pytest.raises(ContextClosedError, match=reason):
            validate_user_context(context)

    async def test_a_block_that_is_cut_off_says_why(self) -> None:
        context = create_isolated_execution_context("alice")
        cut = asyncio.get_running_loop().call_soon
        with pytest.raises(ContextClosedError, match="expired") as caught:
            async with managed_user_context(context):
                cut(context.close, "expired")
                await asyncio.Event().wait()
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0

    async def test_a_block_may_close_its_context_early(self) -> None:
        context = create_isolated_execution_context("alice")
        async with managed_user_context(context):
            await context.aclose("cleared")
            with pytest.raises(ContextClosedError):
                current_context()

    def test_a_closed_context_is_not_entered(self) -> None:
        context = create_isolated_execution_context("alice")
        context.close()
        with pytest.raises(ContextClosedError):
            managed_user_context(context)

    def test_the_own_user_is_entered_again_and_another_is_not(self) -> None:
        manager = UserContextManager()
        with running_as(manager, "alice"):
            for again in (create_isolated_execution_context("alice"), manager.create_isolated_context("alice")):
                with managed_user_context(again):
                    assert current_context() is again
            bob = create_isolated_execution_context("bob")
            with pytest.raises(CrossUserAccessError), managed_user_context(bob):
                raise AssertionError("the block was entered")
            assert bob.is_open
            with manager.privileged(reason="support", users=["bob"]), managed_user_context(bob):
                assert current_context() is bob

    def test_without_any_manager_another_user_is_not_entered_either(self) -> None:
        bob = create_isolated_execution_context("bob")
        with managed_user_context(create_isolated_execution_context("alice")), pytest.raises(CrossUserAccessError):
            managed_user_context(bob).__enter__()
