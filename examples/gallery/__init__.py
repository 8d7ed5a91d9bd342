"""Planted bugs: small applications, each with one mistake that shows a user the data of another, and a clean twin.

Importing this starts nothing, and imports none of the applications.
"""

from typing import Final

from examples.gallery.bug import Ask, Bug, Connect, Say, Step

__all__ = ["GALLERY", "Ask", "Bug", "Connect", "Say", "Step"]

_LINE: Final = "proxy"
_OWN_KEYS: Final = (Ask("alice", "GET", "/account"), Ask("bob", "GET", "/account"))
"""Everybody is shown their own key first, where nothing else of the drive does that."""


def _both(method: str, path: str) -> tuple[Step, ...]:
    """Alice asks for something, then bob does."""
    return tuple(Ask(user, "POST" if method == "POST" else "GET", path) for user in ("alice", "bob"))


GALLERY: Final[tuple[Bug, ...]] = (
    Bug(
        "global_cache",
        title="a global cache without the user in its key",
        wrong="The dashboard of whoever asked first is everybody's.",
        shown_by="Bob asks for the dashboard after alice, and gets hers.",
        drive=_both("GET", "/dashboard/today"),
    ),
    Bug(
        "lru_cached_user",
        title="`lru_cache` on a function of the user",
        wrong="The function reads the user from a ContextVar, which is no parameter and so no part of the key.",
        shown_by="Bob asks for his profile after alice, and gets hers.",
        drive=_both("GET", "/profile"),
    ),
    Bug(
        "mutable_default",
        title="a mutable default argument",
        wrong="All baskets are the one list that stands as a default in the function.",
        shown_by="Bob orders after alice, and her line is in his basket.",
        drive=_both("POST", "/order/tea"),
    ),
    Bug(
        "class_attribute",
        title="a class attribute that was meant as an instance's",
        wrong="All carts put their items into the list of the class.",
        shown_by="Bob puts an item into his cart after alice, and hers is in it.",
        drive=_both("POST", "/cart/tea"),
    ),
    Bug(
        "request_variable",
        title="a ContextVar of a request's that nobody resets",
        wrong="After a large upload the server starts the connection's next requests with the uploader's variables.",
        shown_by="Alice uploads 4 MB, bob asks for his profile, over the same connection of a proxy's, and gets hers.",
        drive=(
            *_OWN_KEYS,
            Ask("alice", "POST", "/uploads", padding=4_000_000, line=_LINE),
            Ask("bob", "GET", "/profile", line=_LINE),
        ),
        cured=True,
    ),
    Bug(
        "worker_variable",
        title="a ContextVar of a worker's that nobody resets",
        wrong="The worker lives as long as the application, and so does what it has set for its first job.",
        shown_by="Bob has an invoice drawn up after alice, and it is billed to her.",
        drive=_both("GET", "/invoice"),
    ),
    Bug(
        "client_pool",
        title="a pool of users' clients without the user in its key",
        wrong="A client stays signed in as whom it was made for, and is lent to whoever comes next.",
        shown_by="Bob opens the checkout after alice, and sees her cards.",
        drive=_both("GET", "/checkout"),
    ),
    Bug(
        "set_without_local",
        title="`SET` without `LOCAL`",
        wrong="The connection goes back into the pool with the user set, and row level security believes it.",
        shown_by="Alice reads her notes; bob reads the public notices, where nothing is set, and sees her notes.",
        drive=(*_OWN_KEYS, Ask("alice", "GET", "/notes"), Ask("bob", "GET", "/notices")),
        needs="GALLERY_POSTGRES",
    ),
    Bug(
        "closed_session",
        title="a background task with a closed session",
        wrong="The closed session begins anew, without the user whose rows it was confined to.",
        shown_by="Bob has a digest written in the background, and alice's key is in it.",
        drive=(*_OWN_KEYS, Ask("bob", "POST", "/digest"), Ask("bob", "GET", "/digest", patient=True)),
    ),
    Bug(
        "agent_memory",
        title="an agent with one memory for all",
        wrong="One agent serves everybody, and its history has everybody's turns.",
        shown_by="Alice asks about her account; bob asks what the agent remembers, and is told.",
        drive=(
            Ask("bob", "POST", "/chat", body={"text": "Show me my account."}),
            Ask("alice", "POST", "/chat", body={"text": "Show me my account."}),
            Ask("bob", "POST", "/chat", body={"text": "What do you remember?"}),
        ),
    ),
    Bug(
        "wrong_room",
        title="a broadcast to the wrong room",
        wrong="Rooms go by the profile's name, which users choose, and several chose the same.",
        shown_by="Alice changes her settings, and they are pushed to bob's device too.",
        drive=(
            Connect("alice", "/devices/work"),
            Connect("bob", "/devices/work"),
            Say("alice", "a darker theme"),
            Say("bob", "a bigger font"),
        ),
    ),
    Bug(
        "broken_off_export",
        title="an async generator that is broken off",
        wrong="Its `finally`, which signs the user out, waits for a reader who never comes back.",
        shown_by="Alice reads one page of her statements; bob reads one of his, and it is hers.",
        drive=_both("GET", "/statements/next"),
    ),
    Bug(
        "reused_response",
        title="a response object that is used again",
        wrong="Cookies are set on the one response that is everybody's, and stay on it.",
        shown_by="Bob signs in after alice, and gets her cookie with his.",
        drive=(*_OWN_KEYS, *_both("POST", "/sign-in")),
    ),
    Bug(
        "cache_without_vary",
        title="an HTTP cache without `Vary`",
        wrong="Responses are kept by their path, whoever they were made for.",
        shown_by="Bob asks for the start page after alice, and gets hers.",
        drive=_both("GET", "/start"),
    ),
)
"""All of them; those that ``need`` a service cannot be imported without its driver."""
