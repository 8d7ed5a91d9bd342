"""Where a walk begins, and what is told of it. Texts only: a report keeps nothing alive."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Root:
    """Where the walk through an owner's data begins. ``label`` begins the paths: ``alice.agent_context``.

    ``is_named_by_owner`` says that its keys are the owner's own words. ``stands`` is for what an owner holds by itself,
    such as a session: then even a bare ``object()``, which nobody could write to, must not be another's. ``opened``
    says where the context was opened.
    """

    owner: str
    label: str
    value: object
    stands: bool = False
    opened: str = ""
    is_named_by_owner: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One mutable object that two owners reach, by a shortest path from each, and where their contexts were opened.

    ``first_place`` and ``second_place`` are the beginnings of the paths, in which no other user's keys are. ``held_by``
    is a path to the object from a module's global or a class, where there is one and the time sufficed:
    ``shop.CACHE['dashboard']``. Another path for which the time did not suffice ends with ``...``.
    """

    first_path: str
    second_path: str
    type_name: str
    first_owner: str
    second_owner: str
    first_opened: str = ""
    second_opened: str = ""
    first_place: str = ""
    second_place: str = ""
    held_by: str | None = None

    def __str__(self) -> str:
        held = "" if self.held_by is None else f", which is {self.held_by}"
        return f"{self.first_path} is {self.second_path} ({self.type_name}){held}"


@dataclass(frozen=True, slots=True)
class Unseen:
    """A type of an extension that shows nothing of what its objects hold: how many there were, and where one is."""

    type_name: str
    count: int
    path: str


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What the walk over all live contexts found: each object that two users share, by both paths.

    ``objects`` were looked at in ``seconds``; one that is met twice counts twice. ``skipped`` is how many contexts were
    not, or not wholly, looked into within the budget; ``is_complete`` says that there were none. ``unseen`` is what may
    hide something.
    """

    contexts: int
    findings: tuple[Finding, ...]
    objects: int = 0
    seconds: float = 0.0
    skipped: int = 0
    unseen: tuple[Unseen, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the budget sufficed for all contexts."""
        return not self.skipped

    def __bool__(self) -> bool:
        """True when everything was looked at and nothing is shared."""
        return not self.findings and self.is_complete
