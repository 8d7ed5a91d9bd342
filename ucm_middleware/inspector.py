"""Looking at what live contexts share: when somebody asks, and for a sample of those that close."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.census.referrers import holder_path
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.reachability import Check, Finding, IsolationPolicy, IsolationReport, Source
from ucm_middleware.reachability.policy import checked_budget

logger = logging.getLogger(__name__)

MOST_OTHERS: Final = 1000
"""Live contexts that one that closes is compared with; others each time."""

TOLD: Final = 10_000
"""Of so many findings it is remembered that they were told."""

LOGGED: Final = 10
"""Findings of one look that are logged; there is a record of the others."""


class Inspector:
    """Takes the looks of one manager, and puts what is found on record.

    ``applications`` are the ASGI applications that its middlewares wrap.
    """

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
        self._told: set[int] = set()  # hashes: nobody's ids are kept
        self.applications: list[object] = []

    def look(
        self, max_seconds: float | None, max_objects: int | None, closing: UserExecutionContext | None = None
    ) -> IsolationReport:
        """Compare all live contexts with each other; one that is closing with some of them, and it comes first.

        Raises ConfigurationError for a limit that is no number above 0.
        """
        seconds, objects = checked_budget(max_seconds, max_objects)
        started = time.perf_counter()
        contexts = [context for _, context in self._live()]
        if closing is not None:
            others = [other for other in contexts if other is not closing]
            contexts = [closing, *self._random.sample(others, min(len(others), MOST_OTHERS))]
        report = Check(
            [Source(context.user_id, context.isolation_roots) for context in contexts],
            shared_types=self._shared_types,
            applications=self.applications,
            max_seconds=seconds,
            max_objects=objects,
            started=started,
            # Not while a request waits: to look for one is to go through the whole heap.
            holder=None if closing is not None else partial(holder_path, without=(UserExecutionContext,)),
        ).report()
        if closing is not None:
            report = replace(report, findings=tuple(filter(self._is_new, report.findings)))
        if report.findings:
            self._trail.isolation_violated(report.findings)
        return report

    def _is_new(self, finding: Finding) -> bool:
        """Whether this was not found at the closing of an earlier context: what is shared stays shared."""
        found = finding.type_name, finding.first_owner, finding.first_path, finding.second_owner, finding.second_path
        if hash(found) in self._told:
            return False
        if len(self._told) >= TOLD:
            self._told.clear()
        self._told.add(hash(found))
        return True

    def context_closes(self, context: UserExecutionContext) -> None:
        """Compare a context that is about to be wiped with the live ones, if it is one of the sample. Never raises."""
        if self._random.random() >= self._policy.sample:
            return
        try:
            report = self.look(self._policy.max_seconds, self._policy.max_objects, context)
        except Exception:
            logger.exception("what %r shares with others could not be looked at", context)
            return
        for finding in report.findings[:LOGGED]:
            # The types alone: paths hold ids and keys of users, and stand in their own trails.
            logger.error(
                "contexts of two users share a %s; opened at %s and at %s",
                finding.type_name,
                finding.first_opened or "?",
                finding.second_opened or "?",
            )
