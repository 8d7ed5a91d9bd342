"""Everything that can be done to a key file, in any order and through two connections, against a model."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.keyfiles import OTHER, SECRET, STREAM, content_of, ring, rows_of
from ucm_middleware import IdentityConflictError
from ucm_middleware.audit.subjects import Subject, Vault

# Long enough for none to stand in random bytes.
USERS = [f"user-number-{number}" for number in range(8)]
VISITORS = [f"anonymous_{number:032x}" for number in range(8)]
one_user, one_visitor, one_vault = st.sampled_from(USERS), st.sampled_from(VISITORS), st.sampled_from([0, 1])


@dataclass
class Known:
    """What must be true of a user who has a subject."""

    token: bytes
    sealed: bytes
    visitors: set[str] = field(default_factory=set[str])


class KeyFile(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "keys.db"
        self.secrets = [SECRET]
        self.known: dict[str, Known] = {}
        self.gone: dict[bytes, str] = {}
        self.vaults: list[Vault] = []

    @initialize()
    def open(self) -> None:
        self.vaults = [Vault.open(self.path, STREAM, ring(*self.secrets)) for _ in range(2)]

    def teardown(self) -> None:
        for vault in self.vaults:
            vault.close()
        shutil.rmtree(self.folder)

    def learn(self, user: str, subject: Subject) -> None:
        if user in self.known:
            assert subject.token == self.known[user].token
            assert subject.unseal(self.known[user].sealed) == user.encode()
        else:
            assert subject.token not in self.gone
            assert subject.token not in {known.token for known in self.known.values()}
            self.known[user] = Known(subject.token, subject.seal(user.encode()))

    @rule(users=st.lists(one_user | one_visitor, max_size=12), which=one_vault)
    def of(self, users: list[str], which: int) -> None:
        subjects = self.vaults[which].of(users)
        assert set(subjects) == set(users)
        for user, subject in subjects.items():
            self.learn(user, subject)

    @rule(user=one_user | one_visitor, which=one_vault)
    def find(self, user: str, which: int) -> None:
        subject = self.vaults[which].find(user)
        assert (subject is None) == (user not in self.known)
        if subject is not None:
            self.learn(user, subject)

    @rule(visitor=one_visitor, user=one_user, which=one_vault)
    def bind(self, visitor: str, user: str, which: int) -> None:
        others = {name for name, known in self.known.items() if visitor in known.visitors} - {user}
        if others:
            with pytest.raises(IdentityConflictError):
                self.vaults[which].bind({visitor: user})
            return
        self.vaults[which].bind({visitor: user})
        for name, subject in self.vaults[1 - which].of([visitor, user]).items():
            self.learn(name, subject)
        self.known[user].visitors.add(visitor)

    @rule(user=one_user | one_visitor, which=one_vault)
    def erase(self, user: str, which: int) -> None:
        rows = rows_of(self.path, self.secrets[0])
        names = {user, *self.known[user].visitors} if user in self.known else set[str]()
        tokens = self.vaults[which].erase(user)
        assert sorted(tokens) == sorted(self.known[name].token for name in names)
        content = content_of(self.path)
        for name in names:
            assert rows[name].traces_in(content) == set()
            self.gone[self.known.pop(name).token] = name
        for known in self.known.values():
            known.visitors -= names

    @rule(which=one_vault)
    def reopen(self, which: int) -> None:
        self.vaults[which].close()
        self.vaults[which] = Vault.open(self.path, STREAM, ring(*self.secrets), must_exist=True)

    @rule(which=one_vault, number=st.integers(0, 3))
    def rotate(self, which: int, number: int) -> None:
        """The other one stays open under the secret that was."""
        new = OTHER + str(number).encode()
        self.secrets = [new, *(secret for secret in self.secrets if secret != new)]
        self.reopen(which)

    @invariant()
    def names_are_known_until_they_are_erased(self) -> None:
        for vault in self.vaults:
            assert all(vault.name_of(known.token) == user for user, known in self.known.items())
            assert all(vault.name_of(token) is None for token in self.gone)


TestKeyFile = KeyFile.TestCase
TestKeyFile.settings = settings(max_examples=25, stateful_step_count=25)
TestKeyFile.pytestmark = [pytest.mark.security]  # type: ignore[attr-defined]
