"""The one secret: which are refused and in what words, what is derived, and that nothing shows it."""

import copy
import hashlib
import hmac
import logging
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ucm_middleware
from support.contexts import MakeManager
from ucm_middleware import ConfigurationError, IsolatedEnvironment, UserContextManager
from ucm_middleware.secret import MIN_BYTES, Secret, SecretRing

pytestmark = pytest.mark.security

SECRET = "q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6"
OTHER = "N4tKj8Wc1YbQ6rMz0DpS3vUh7FgLx2Ao5iTe9C"
REMEDY = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


def ring(environment: str = "testing", **settings: str) -> SecretRing:
    """What an application has that is configured by these settings."""
    return SecretRing.from_settings(
        None, None, IsolatedEnvironment(environ={"UCM_ENVIRONMENT": environment, **settings})
    )


def refusal(secret: Any = None, previous_secrets: Any = None, **settings: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        SecretRing.from_settings(secret, previous_secrets, IsolatedEnvironment(environ=settings))
    return str(caught.value)


class TestWhatIsRefused:
    BAD: ClassVar[dict[str, tuple[Any, str]]] = {
        "empty": ("", "is blank"),
        "blank": (" \t ", "is blank"),
        "no bytes": (b"", "has 0 bytes, which is fewer than 32"),
        "short text": (SECRET[:31], "has 31 bytes, which is fewer than 32"),
        "short bytes": (SECRET[:31].encode(), "has 31 bytes, which is fewer than 32"),
        "ends in a newline": (f"{SECRET}\n", "has blanks around it"),
        "begins with a space": (f" {SECRET}", "has blanks around it"),
        "half a character": (f"{SECRET}\udcff", "is not valid Unicode text"),
        "one letter": ("a" * 40, "repeats itself or counts up"),
        "zeros": (bytes(32), "repeats itself or counts up"),
        "a word repeated": ("changeme" * 4, "repeats itself or counts up"),
        "digits repeated": ("0123456789" * 4, "repeats itself or counts up"),
        "repeated and cut off": ("k3Jx9-Qm2Lr7-Tz5-" * 2 + "k3Jx9", "repeats itself or counts up"),
        "the alphabet": ("abcdefghijklmnopqrstuvwxyz0123456789", "repeats itself or counts up"),
        "all bytes in order": (bytes(range(32)), "repeats itself or counts up"),
        "a sentence": ("my-super-secret-key-for-production-2026", "is a placeholder"),
        "another framework's": ("django-insecure-7w#k2!x9vq$1mz@8rt0p", "is a placeholder"),
        "change me": ("CHANGE_ME-before-going-live-1234567890", "is a placeholder"),
        "for example": (b"<put 32 random bytes, for example here>", "is a placeholder"),
        "a number": (7, "is int, which is neither text nor bytes"),
        "a bytearray": (bytearray(SECRET.encode()), "is bytearray, which is neither text nor bytes"),
        "a bool": (True, "is bool, which is neither text nor bytes"),
    }

    @pytest.mark.parametrize("which", BAD)
    def test_it_is_named_with_the_rule_and_the_remedy(self, which: str) -> None:
        bad, problem = self.BAD[which]
        for said, field in (
            (refusal(bad), "secret"),
            (refusal(SECRET, [OTHER, bad]), "previous_secrets (number 2)"),
        ):
            assert said.startswith(f"{field} {problem}")
            assert said.endswith(REMEDY)

    @pytest.mark.parametrize("which", [which for which, (bad, _) in BAD.items() if isinstance(bad, str)])
    def test_a_setting_likewise(self, which: str) -> None:
        bad, problem = self.BAD[which]
        assert refusal(UCM_SECRET=bad).startswith(f"UCM_SECRET {problem}")
        if bad.strip() == bad:
            said = refusal(UCM_SECRET=SECRET, UCM_SECRET_PREVIOUS=f"{OTHER},{bad}")
            assert said.startswith(f"UCM_SECRET_PREVIOUS (number 2) {problem}")

    def test_a_comma_could_not_be_rotated_out(self) -> None:
        assert refusal(UCM_SECRET=f"{SECRET},{OTHER}").startswith("UCM_SECRET has a comma in it")

    @pytest.mark.parametrize("bad", [OTHER, OTHER.encode(), {OTHER}, 7], ids=["text", "bytes", "set", "number"])
    def test_previous_ones_that_are_no_list(self, bad: Any) -> None:
        assert refusal(SECRET, bad).startswith(f"previous_secrets is {type(bad).__name__}, which is no list of secrets")

    def test_one_that_is_there_twice(self) -> None:
        assert "UCM_SECRET_PREVIOUS (number 1) is the same" in refusal(UCM_SECRET=SECRET, UCM_SECRET_PREVIOUS=SECRET)
        assert "previous_secrets (number 2) is the same" in refusal(SECRET, [OTHER, OTHER.encode()])

    def test_previous_ones_without_a_current_one(self) -> None:
        assert "UCM_SECRET_PREVIOUS (number 1) is given and UCM_SECRET is not" in refusal(UCM_SECRET_PREVIOUS=OTHER)
        assert "previous_secrets (number 1) is given and UCM_SECRET is not" in refusal(previous_secrets=[OTHER])

    @pytest.mark.parametrize(
        "settings",
        [
            {"UCM_SECRET": SECRET[:31]},
            {"UCM_SECRET": f"{SECRET},{OTHER}"},
            {"UCM_SECRET": SECRET, "UCM_SECRET_PREVIOUS": f"{OTHER},{SECRET}"},
            {"UCM_SECRET": SECRET, "UCM_SECRET_PREVIOUS": f"{OTHER},{OTHER[:20]}"},
            {"UCM_SECRET_PREVIOUS": OTHER},
            {"UCM_SECRET": f"{SECRET}\udcff"},
        ],
    )
    def test_nothing_of_a_secret_hangs_on_the_error(self, settings: dict[str, str]) -> None:
        """Nor in the local variables on its way, which reporters of errors show, but for those called secret."""
        with pytest.raises(ConfigurationError) as caught:
            UserContextManager(environment=IsolatedEnvironment(environ=settings))
        error = caught.value
        assert error.__cause__ is None
        assert error.__context__ is None
        shown = [str(error), repr(error.args), repr(vars(error))]
        package = str(Path(ucm_middleware.__file__).parent)
        frames = [entry.frame for entry in caught.traceback if str(entry.path).startswith(package)]
        assert len(frames) >= 2
        shown += [
            repr(value)
            for frame in frames
            for name, value in frame.f_locals.items()
            if name not in ("secret", "previous_secrets")
        ]
        for start in (SECRET[:8], OTHER[:8]):
            assert start not in "\n".join(shown)

    def test_nor_where_a_key_cannot_be_derived(
        self, monkeypatch: pytest.MonkeyPatch, make_manager: MakeManager
    ) -> None:
        monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.kdf.hkdf", None)
        context = make_manager(secret=SECRET).create_isolated_context("alice")
        with pytest.raises(ImportError) as caught:
            context.derive_key("thread", "t-1")
        shown = [
            repr(value)
            for entry in caught.traceback[1:]
            for name, value in entry.frame.f_locals.items()
            if name != "secret"
        ]
        assert shown
        assert SECRET not in "\n".join(shown)

    @given(st.integers(MIN_BYTES, 64))
    def test_what_the_remedy_makes_passes(self, length: int) -> None:
        for good in (secrets.token_urlsafe(length), secrets.token_hex(length // 2), secrets.token_bytes(length)):
            SecretRing.from_settings(good, None, IsolatedEnvironment(environ={}))

    def test_what_is_refused_is_refused_by_the_manager_in_any_environment(self) -> None:
        for environment in ("production", "testing"):
            settings = IsolatedEnvironment(environ={"UCM_ENVIRONMENT": environment, "UCM_SECRET": "short"})
            with pytest.raises(ConfigurationError, match="UCM_SECRET has 5 bytes"):
                UserContextManager(environment=settings)


def reference_hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2, without salt."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    block = made = b""
    for number in range(1, 1 + -(-length // 32)):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        made += block
    return made[:length]


class TestWhatIsDerived:
    def test_the_reference_is_right(self) -> None:
        """RFC 5869, appendix A.3."""
        expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
        assert reference_hkdf(b"\x0b" * 22, b"", 42).hex() == expected

    @given(st.binary(min_size=32, max_size=100), st.text(min_size=1).filter(lambda text: text.isprintable()))
    def test_a_subkey_is_hkdf_of_the_secret_and_the_purpose(self, value: bytes, purpose: str) -> None:
        assert Secret(value).subkey(purpose) == reference_hkdf(value, b"ucm-middleware 1 " + purpose.encode(), 32)

    def test_purposes_and_secrets_are_apart(self) -> None:
        one, other = Secret(SECRET.encode()), Secret(OTHER.encode())
        subkeys = {secret.subkey(purpose) for secret in (one, other) for purpose in ("keys", "pseudonyms", "key", "s")}
        assert len(subkeys) == 8
        assert one.fingerprint != other.fingerprint

    def test_a_subkey_is_derived_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        derived: list[str] = []

        def counted(value: bytes, purpose: str) -> bytes:
            derived.append(purpose)
            return hashlib.sha256(value + purpose.encode()).digest()

        monkeypatch.setattr("ucm_middleware.secret._hkdf", counted)
        secret = Secret(SECRET.encode())
        assert secret.subkey("a") == secret.subkey("a") != secret.subkey("b")
        assert derived == ["a", "b"]

    def test_text_and_its_utf8_are_one_secret(self) -> None:
        text = f"{SECRET}\u00e9"
        settings = IsolatedEnvironment(environ={"UCM_SECRET": text})
        rings = [SecretRing.from_settings(given, None, settings) for given in (text, text.encode(), None)]
        assert len({ring.all[0].fingerprint for ring in rings}) == 1


def fingerprints(ring: SecretRing) -> list[str]:
    return [secret.fingerprint for secret in ring.all]


class TestWhereItComesFrom:
    THIRD = "eH2oZr6Xq9Kd4Vw1Jt8Ms3By7Gf0Lc5Pn-uRiA"

    def test_from_a_settings_file(self, tmp_path: Path) -> None:
        file = tmp_path / ".env"
        file.write_text(f"UCM_SECRET='{SECRET}'\nUCM_SECRET_PREVIOUS={OTHER}, {self.THIRD}\n")
        settings = IsolatedEnvironment(file, environ={})
        expected = [Secret(each.encode()).fingerprint for each in (SECRET, OTHER, self.THIRD)]
        assert fingerprints(SecretRing.from_settings(None, None, settings)) == expected

    def test_an_argument_goes_before_the_setting(self) -> None:
        settings = IsolatedEnvironment(environ={"UCM_SECRET": SECRET, "UCM_SECRET_PREVIOUS": OTHER})
        [given, *rest] = fingerprints(SecretRing.from_settings(self.THIRD, None, settings))
        assert given == Secret(self.THIRD.encode()).fingerprint
        assert rest == [Secret(OTHER.encode()).fingerprint]
        assert fingerprints(SecretRing.from_settings(None, [], settings)) == [Secret(SECRET.encode()).fingerprint]

    def test_an_empty_list_of_previous_ones_is_none(self) -> None:
        assert len(ring(UCM_SECRET=SECRET, UCM_SECRET_PREVIOUS="").all) == 1

    @pytest.mark.parametrize("name", ["UCM_SECRET", "UCM_SECRET_PREVIOUS"])
    def test_no_overlay_changes_it(self, name: str, make_manager: MakeManager) -> None:
        manager = make_manager(secret=SECRET, environment=IsolatedEnvironment(environ={}))
        settings = manager.create_isolated_context("alice").environment
        for change in (
            lambda: settings.set(name, OTHER),
            lambda: settings.unset(name),
            lambda: settings.overlay({name: OTHER}),
        ):
            with pytest.raises(ConfigurationError, match=f"{name} holds for the whole process"):
                change()

    def test_one_is_made_where_none_is_given(self) -> None:
        one, other = ring(), ring()
        assert one.all[0].subkey("a") == one.all[0].subkey("a")
        assert fingerprints(one) != fingerprints(other)


class TestWhatMustHaveOne:
    def test_in_production_without_one_it_is_refused_with_the_remedy(self) -> None:
        for unset in (ring("production"), ring("")):
            with pytest.raises(ConfigurationError) as caught:
                unset.require("owner-derived keys")
            for part in ("UCM_SECRET is not set", "owner-derived keys", "production", REMEDY, "secret=..."):
                assert part in str(caught.value)

    def test_in_production_with_one_it_is_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        ring("production", UCM_SECRET=SECRET).require("owner-derived keys")
        assert caplog.records == []

    @pytest.mark.parametrize("environment", ["staging", "development", "testing"])
    def test_elsewhere_it_is_said_once(self, environment: str, caplog: pytest.LogCaptureFixture) -> None:
        made = ring(environment)
        assert caplog.records == []
        made.require("owner-derived keys")
        made.require("owner-derived keys")
        made.require("pseudonyms")
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        for part in (
            "UCM_SECRET is not set",
            "owner-derived keys",
            "will not survive a restart",
            "no other worker",
            REMEDY,
        ):
            assert part in record.getMessage()

    def test_an_adapter_asks_at_its_start(self) -> None:
        production = IsolatedEnvironment(environ={})
        manager = UserContextManager(environment=production)
        with pytest.raises(ConfigurationError, match="stored threads must have it"):
            manager.require_secret("stored threads")
        UserContextManager(environment=production, secret=SECRET).require_secret("stored threads")


SHOWN: dict[str, Callable[[object], object]] = {
    "repr": repr,
    "str": str,
    "format": lambda thing: f"{thing}",
    "in a list": lambda thing: repr([thing]),
}
COPIED: dict[str, Callable[[object], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


class TestWhatShowsIt:
    @pytest.mark.parametrize("show", SHOWN.values(), ids=SHOWN.keys())
    def test_no_representation(self, show: Callable[[object], object], make_manager: MakeManager) -> None:
        manager = make_manager(secret=SECRET, previous_secrets=[OTHER])
        context = manager.create_isolated_context("alice")
        context.derive_key("thread", "t-1")
        secret = manager._secrets.all[0]
        shown = [show(thing) for thing in (secret, manager._secrets, manager.keys, manager, vars(manager), context)]
        shown += [show(manager.get_active_contexts()), show(manager.get_audit_trail("alice")), show(context.to_dict())]
        for hidden in (SECRET, OTHER, repr(secret.subkey("owner-derived keys"))):
            assert hidden not in "\n".join(map(str, shown))

    @pytest.mark.parametrize("duplicate", COPIED.values(), ids=COPIED.keys())
    def test_no_copy(self, duplicate: Callable[[object], object]) -> None:
        secret = Secret(SECRET.encode())
        for thing in (secret, [secret]) if duplicate is not copy.copy else (secret,):
            with pytest.raises(TypeError, match="a secret is not copied or pickled"):
                duplicate(thing)

    def test_no_dict(self) -> None:
        for thing in (Secret(SECRET.encode()), ring(UCM_SECRET=SECRET)):
            assert not hasattr(thing, "__dict__")


FORK = """
import os
from ucm_middleware import UserContextManager

manager = UserContextManager()  # its first key is derived after the fork

def key():
    return manager.create_isolated_context("alice").derive_key("thread", "t-1").encode()

reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, key())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(os.read(reading, 1000) == key())
"""

UNUSED = """
import sys
from ucm_middleware import UserContextManager
manager = UserContextManager(secret=sys.argv[1])
manager.create_isolated_context("alice").close()
print("cryptography" in sys.modules)
"""


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UCM_SECRET")}
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env={**inherited, "PYTHONPATH": str(Path(ucm_middleware.__file__).parents[1]), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_forked_workers_agree_on_the_one_that_was_made() -> None:
    assert run(FORK).stdout == "True\n"


def test_who_derives_nothing_imports_nothing_for_it() -> None:
    assert run(UNUSED, SECRET).stdout == "False\n"
