"""Begun: a transaction under way."""

from typing import Any

import psycopg
from psycopg.pq import ExecStatus

from ucm_django.identity import Runner
from ucm_middleware.transactions import TransactionLog


class Begun:
    """A transaction under way: whose it is, on which of the driver's connections, and its audit records."""

    __slots__ = ("binding", "connection", "failure", "log", "runner")

    def __init__(self, runner: Runner, connection: object, log: TransactionLog | None) -> None:
        self.runner = runner
        self.connection = connection
        self.log = log
        self.binding: psycopg.Cursor[Any] | None = None  # what the binding was sent with
        self.failure: BaseException | None = None  # why it could not be tied

    @property
    def was_told(self) -> bool:
        """Whether the server has taken the binding."""
        result = None if self.binding is None else self.binding.pgresult
        return result is not None and ExecStatus(result.status) is ExecStatus.TUPLES_OK

    def count(self) -> None:
        """One statement more."""
        if self.log is not None:
            self.log.statements += 1

    def ended(self, error: BaseException | None = None, *, rolled_back: bool = False, is_unknown: bool = False) -> None:
        """It is over: committed, unless there is an error or it is said that it was rolled back. ``is_unknown``: the
        error came in place of the commit's answer.
        """
        if self.log is None:
            return
        if is_unknown:
            self.log.lost(error)
        elif error is None and not rolled_back:
            self.log.commit()
        else:
            self.log.rollback(error)
