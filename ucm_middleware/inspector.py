"""Looking at what live contexts share: when somebody asks, and for a sample of those that close."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.census.referrers import holder_path
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.reachability import Check, IsolationPolicy, IsolationReport
from ucm_middleware.reachability.policy import checked_budget

logger = logging.getLogger(__name__)

MOST_OTHERS = 1000
"""Live contexts that one that closes is compared with; others each time."""


class Inspector:
    """Takes the looks of one manager, and puts what is found on record."""

    def __init__(
        self,
        policy: IsolationPolicy,
        shared_types: Iterable[type],
        live: Callable[[], Sequence[tuple[Any, UserExecutionContext]]],
        trail: AuditTrail,
    ) -> None:
        self._policy = policy
        self._shared_types = (*policy.shared_types, *shared_types)
        self._live = live
        self._trail = trail
        self._random = random.Random()

    def look(
        self, contexts: Iterable[UserExecutionContext], max_seconds: float | None, max_objects: int | None
    ) -> IsolationReport:
        """Compare these contexts with each other. Raises ConfigurationError for a limit that is no number above 0."""
        seconds, objects = checked_budget(max_seconds, max_objects)
        roots = [context.isolation_roots() for context in contexts]
        check = Check(
            roots,
            shared_types=self._shared_types,
            max_seconds=seconds,
            max_objects=objects,
            holder=partial(holder_path, without=(UserExecutionContext,)),
        )
        report = check.report()
        if report.findings:
            self._trail.isolation_violated(report.findings)
        return report

    def context_closes(self, context: UserExecutionContext) -> None:
        """Compare a context that is about to be wiped with the live ones, if it is one of the sample. Never raises."""
        if self._random.random() >= self._policy.sample:
            return
        try:
            others = [other for _, other in self._live() if other is not context]
            some = self._random.sample(others, min(len(others), MOST_OTHERS))
            report = self.look([context, *some], self._policy.max_seconds, self._policy.max_objects)
        except Exception:
            logger.exception("what %r shares with others could not be looked at", context)
            return
        for finding in report.findings:
            # The types alone: paths hold ids and keys of users, and stand in their own trails.
            logger.error(
                "contexts of two users share a %s; opened at %s and at %s",
                finding.type_name,
                finding.first_opened or "?",
                finding.second_opened or "?",
            )
