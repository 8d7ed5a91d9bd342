"""The users' file: what it may say, and that each mistake is named by its field and never by its value."""

from pathlib import Path

import pytest

from ucm_middleware.certify.cast import Call, Cast, Given, User
from ucm_middleware.certify.castfile import read_cast
from ucm_middleware.errors import ConfigurationError

WHOLE = """
public = ["GET /feed"]

[[users]]
name = "alice"
headers = { Authorization = "Bearer of-alice" }
query = { token = "of-alice" }
secrets = ["the key of alice"]
sign_in = { path = "/login", form = { user = "alice", password = "hush" } }
sign_out = { path = "/logout", method = "GET" }

[[users]]
name = "bob"
sign_in = { path = "/login", body = { user = "bob" }, token = "access_token" }

[[routes]]
path = "/orders/{order_id}"
method = "PUT"
body = { type = "object" }
parameters = { order_id = { type = "integer" } }

[[routes]]
path = "/live"
websocket = true
messages = ["hello"]
"""

TWO = '[[users]]\nname = "alice"\n{}\n[[users]]\nname = "bob"\n'

WRONG = {
    "users": ("users = 'hush-hush'", "the file.users must be a list, not a str"),
    "no users": ("public = []", "the file lacks 'users'"),
    "a user": ("users = ['hush-hush', 'b']", "users[0] must be a table, not a str"),
    "a name": ("[[users]]\nnom = 'hush-hush'", "users[0] has 'nom', and there are name, headers"),
    "headers": (TWO.format("headers = 'hush-hush'"), "users[0].headers must be a dict, not a str"),
    "a header": (TWO.format("headers = { X = 45067 }"), "the values of users[0].headers must be texts"),
    "a header's value": (TWO.format("headers = { X = 'hush-hushé' }"), "the value of X must be"),
    "the query": (TWO.format("query = { token = 45067 }"), "the values of users[0].query must be texts"),
    "secrets": (TWO.format("secrets = [45067]"), "users[0].secrets must be a list of texts"),
    "sign_in": (TWO.format("sign_in = 'hush-hush'"), "users[0].sign_in must be a dict, not a str"),
    "sign_in without a path": (TWO.format("sign_in = { token = 'hush-hush' }"), "users[0].sign_in lacks 'path'"),
    "sign_in's body": (TWO.format("sign_in = { path = '/', body = 2020-04-05 }"), "must be what JSON can say"),
    "sign_in's form": (
        TWO.format("sign_in = { path = '/', form = { p = 45067 } }"),
        "the values of users[0].sign_in.form must be texts",
    ),
    "sign_in's method": (TWO.format("sign_in = { path = '/', method = 'SEND' }"), "method must be one of GET"),
    "a route": (TWO.format("") + "[[routes]]\npath = 3", "routes[0].path must be a str, not a int"),
    "a route's parameters": (
        TWO.format("") + "[[routes]]\npath = '/x'\nparameters = { n = 'hush-hush' }",
        "routes[0].parameters.n must be a JSON schema, a table, not a str",
    ),
    "no TOML": ("users = hush-hush", "is no TOML"),
}


def test_all_that_it_may_say_is_read(tmp_path: Path) -> None:
    (file := tmp_path / "users.toml").write_text(WHOLE)
    assert read_cast(str(file)) == Cast(
        users=(
            User(
                "alice",
                {"Authorization": "Bearer of-alice"},
                ("the key of alice",),
                Call("/login", form={"user": "alice", "password": "hush"}),
                Call("/logout", "GET"),
                {"token": "of-alice"},
            ),
            User("bob", sign_in=Call("/login", body={"user": "bob"}, token="access_token")),
        ),
        routes=(
            Given("/orders/{order_id}", "PUT", body={"type": "object"}, parameters={"order_id": {"type": "integer"}}),
            Given("/live", websocket=True, messages=("hello",)),
        ),
        public=("GET /feed",),
    )


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_named_by_its_field(tmp_path: Path, text: str, said: str) -> None:
    (file := tmp_path / "users.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_cast(str(file))
    assert said in str(caught.value)
    assert "hush-hush" not in str(caught.value)
    assert "45067" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.toml cannot be read .*; give a TOML file"):
        read_cast(str(tmp_path / "absent.toml"))


def test_a_function_is_called() -> None:
    assert read_cast("examples.gallery.certify:cast").names == ("alice", "bob")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("absent_module:cast", "absent_module:cast cannot be called: No module named"),
        ("examples.gallery.certify:absent", "cannot be called: .* no attribute 'absent'"),
        ("os:getpid", "must return a ucm_middleware.certify.Cast, not a int"),
    ],
)
def test_a_function_that_returns_no_cast_is_named(where: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_cast(where)
