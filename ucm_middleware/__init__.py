"""Every HTTP request and every WebSocket connection in its own user context, torn down whatever happens."""

from ucm_middleware.agents import (
    AgentPolicy,
    AgentRun,
    AgentStream,
    Straggler,
    ToolCall,
    agent_run,
    current_run,
)
from ucm_middleware.ambient import current_context
from ucm_middleware.census import CensusPolicy
from ucm_middleware.cluster import ClusterPolicy
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress import EgressFilter, EgressPolicy, EgressSpanProcessor
from ucm_middleware.environment import Environment, IsolatedEnvironment
from ucm_middleware.errors import (
    AgentError,
    AgentParametersError,
    AgentTimeoutError,
    ClusterUnavailableError,
    ConfigurationError,
    ContextClosedError,
    ContextExpiredError,
    ContextIsolationError,
    ContextLeakError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    EgressBlockedError,
    ErasureIncompleteError,
    HandleRevokedError,
    IdentityConflictError,
    InvalidContextError,
    InvalidEventError,
    LedgerFileError,
    LedgerUnavailableError,
    ManagerDrainingError,
    MessageLimitError,
    OriginError,
    PluginError,
    UnauthenticatedError,
    UnknownAgentError,
    UserContextError,
)
from ucm_middleware.events import Delivery, Dropped, EventPolicy
from ucm_middleware.execution import (
    create_isolated_execution_context,
    managed_user_context,
    validate_user_context,
)
from ucm_middleware.firewall import ContextFirewall
from ucm_middleware.guard import EVERYONE
from ucm_middleware.handles import revoke_handle
from ucm_middleware.health import Health
from ucm_middleware.hooks import hookimpl
from ucm_middleware.identity import authenticated_user, bearer_token, session_user
from ucm_middleware.ids import UnifiedIDManager
from ucm_middleware.isolation import Shared
from ucm_middleware.logs import UserContextFilter, add_user_context
from ucm_middleware.manager import UserContextManager
from ucm_middleware.middleware import UserContextMiddleware
from ucm_middleware.principal import Principal
from ucm_middleware.reachability import IsolationPolicy, IsolationReport
from ucm_middleware.refusal import Refusal, refusal_for
from ucm_middleware.starlette import authenticated_context, user_context
from ucm_middleware.transactions import IsolationLevel, StatementResult, Transaction, TransactionLog

__all__ = [
    "EVERYONE",
    "AgentError",
    "AgentParametersError",
    "AgentPolicy",
    "AgentRun",
    "AgentStream",
    "AgentTimeoutError",
    "CensusPolicy",
    "ClusterPolicy",
    "ClusterUnavailableError",
    "ConfigurationError",
    "ContextClosedError",
    "ContextExpiredError",
    "ContextFirewall",
    "ContextIsolationError",
    "ContextLeakError",
    "ContextLimitError",
    "ContextNotFoundError",
    "CrossUserAccessError",
    "Delivery",
    "Dropped",
    "EgressBlockedError",
    "EgressFilter",
    "EgressPolicy",
    "EgressSpanProcessor",
    "Environment",
    "ErasureIncompleteError",
    "EventPolicy",
    "HandleRevokedError",
    "Health",
    "IdentityConflictError",
    "InvalidContextError",
    "InvalidEventError",
    "IsolatedEnvironment",
    "IsolationLevel",
    "IsolationPolicy",
    "IsolationReport",
    "LedgerFileError",
    "LedgerUnavailableError",
    "ManagerDrainingError",
    "MessageLimitError",
    "OriginError",
    "PluginError",
    "Principal",
    "Refusal",
    "Shared",
    "StatementResult",
    "Straggler",
    "ToolCall",
    "Transaction",
    "TransactionLog",
    "UnauthenticatedError",
    "UnifiedIDManager",
    "UnknownAgentError",
    "UserContextError",
    "UserContextFilter",
    "UserContextManager",
    "UserContextMiddleware",
    "UserExecutionContext",
    "add_user_context",
    "agent_run",
    "authenticated_context",
    "authenticated_user",
    "bearer_token",
    "create_isolated_execution_context",
    "current_context",
    "current_run",
    "hookimpl",
    "managed_user_context",
    "refusal_for",
    "revoke_handle",
    "session_user",
    "user_context",
    "validate_user_context",
]
