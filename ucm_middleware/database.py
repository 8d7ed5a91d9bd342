"""A context with a transaction, which a plugin opens and which ends with the context."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.dispatch import OpenTransaction
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.execution import managed_user_context
from ucm_middleware.transactions import IsolationLevel, StatementResult, Transaction


def require_transactions(opening: OpenTransaction) -> None:
    """Raise ConfigurationError when no plugin opens transactions."""
    if not opening:
        raise ConfigurationError(
            "no plugin of this manager opens transactions: give it the one of your database, such as "
            "UserContextManager(plugins=[ucm_sqlalchemy.SQLAlchemy(engine)])"
        )


def hold_transaction(
    context: UserExecutionContext, opening: OpenTransaction, level: IsolationLevel | None
) -> Transaction:
    """Open a transaction that ends with the context: committed when that closes well, else rolled back."""
    transaction = opening(context, level)
    if transaction is None:
        raise ConfigurationError(
            "no plugin opens a transaction for this context: each that could answered None; see its documentation"
        )
    context._hold("transaction", transaction, transaction.end)
    return transaction


async def run_in_transaction(
    context: UserExecutionContext,
    opening: OpenTransaction,
    statement: object,
    parameters: object,
    level: IsolationLevel | None,
) -> StatementResult:
    """Run one statement in a transaction of its own, in a context that closes after it. Raises what either raises."""
    async with managed_user_context(context):
        transaction = hold_transaction(context, opening, level)
        result = await transaction.execute(statement, parameters)
        if (ending := transaction.end(None)) is not None:
            await ending
        return result
