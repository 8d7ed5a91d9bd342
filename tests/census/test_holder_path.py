"""`holder_path`: from an object back to the global that keeps it, in the words of whoever wrote the code."""

import queue
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ucm_middleware.census.referrers import Search, holder_path

SHOP = """
import collections, functools, queue

CACHE = {"profile": {"a": [1]}, 7: [2]}

class Cart:
    items = [3]

class Box: pass
BOX = Box()
BOX.inner = Box()
BOX.inner.thing = [4]

def add(to=[5]): return to
def keyword(*, to=[6]): return to

def remember(): return remember.last
remember.last = [7]

@functools.lru_cache(maxsize=None)
def profile(user): return [8]

@functools.lru_cache(maxsize=3)
def bounded(user): return ([9],)

def outer():
    held = [10]
    def inner(): return held
    return inner
INNER = outer()

def generate():
    local = [11]
    yield local
GENERATOR = generate()

class Slotted:
    __slots__ = ("item",)
SLOTTED = Slotted()
SLOTTED.item = [12]

QUEUE = queue.SimpleQueue()
WAITING = collections.deque([[13]])
PARTIAL = functools.partial(print, [14])
LISTS = [[15]]
"""


@pytest.fixture
def shop() -> Iterator[Any]:
    """A module as applications have them."""
    module = types.ModuleType("shop")
    sys.modules["shop"] = module
    exec(textwrap.dedent(SHOP), module.__dict__)
    yield module
    del sys.modules["shop"]


PATHS: dict[str, Callable[[Any], object]] = {
    "shop.CACHE['profile']['a']": lambda shop: shop.CACHE["profile"]["a"],
    "shop.CACHE[7]": lambda shop: shop.CACHE[7],
    "shop.Cart.items": lambda shop: shop.Cart.items,
    "shop.BOX.inner.thing": lambda shop: shop.BOX.inner.thing,
    "shop.add.__defaults__[0]": lambda shop: shop.add(),
    "shop.keyword.__kwdefaults__['to']": lambda shop: shop.keyword(),
    "shop.remember.last": lambda shop: shop.remember(),
    "shop.profile.<cache>": lambda shop: shop.profile("alice"),
    "shop.bounded.<cache>[0]": lambda shop: shop.bounded("alice")[0],
    "shop.INNER<variable held>": lambda shop: shop.INNER(),
    "shop.GENERATOR<local>": lambda shop: next(shop.GENERATOR),
    "shop.SLOTTED.item": lambda shop: shop.SLOTTED.item,
    "shop.WAITING[0]": lambda shop: shop.WAITING[0],
    "shop.PARTIAL.args[0]": lambda shop: shop.PARTIAL.args[0],
    "shop.LISTS[0]": lambda shop: shop.LISTS[0],
}


@pytest.mark.parametrize("path", PATHS)
def test_the_path_is_as_one_would_write_it(shop: Any, path: str) -> None:
    assert holder_path(PATHS[path](shop), seconds=10) == path


def test_an_item_of_a_queue_is_found_by_its_queue(shop: Any) -> None:
    item = [1]
    shop.QUEUE.put(item)
    path = holder_path(item, seconds=10)
    assert path is not None
    assert path.startswith("shop.QUEUE")


def test_an_item_of_a_queue_of_threads(shop: Any) -> None:
    item = [1]
    shop.JOBS = queue.Queue()
    shop.JOBS.put(item)
    assert holder_path(item, seconds=10) == "shop.JOBS.queue[0]"


def test_what_only_waits_for_the_garbage_collector_has_no_path() -> None:
    class Node:
        other: "Node"

    one, other = Node(), Node()
    one.other, other.other = other, one
    found = [holder_path(one, seconds=10)]
    assert found == [None]
    assert holder_path([5], seconds=10) is None


def test_no_time_no_path(shop: Any) -> None:
    assert holder_path(shop.BOX.inner.thing, seconds=-1) is None


def test_what_is_passed_over_leads_nowhere(shop: Any) -> None:
    value = shop.CACHE["profile"]["a"]
    assert Search(seconds=10, without=(shop.CACHE["profile"],)).back_from([value]) == {}


class Hostile(type):
    """A class whose objects raise for whatever one asks of them, and so does the class."""

    def __getattribute__(cls, name: str) -> Any:
        raise AssertionError(f"the class was asked for {name}")

    def __eq__(cls, other: object) -> bool:
        raise AssertionError("the class was compared")

    def __hash__(cls) -> int:
        raise AssertionError("the class was hashed")

    def __instancecheck__(cls, instance: object) -> bool:
        raise AssertionError("isinstance() was asked")


class Trap(metaclass=Hostile):
    def __init__(self, held: object) -> None:
        object.__setattr__(self, "held", held)

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"it was asked for {name}")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"it was asked for {name}")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    def __hash__(self) -> int:
        raise AssertionError("it was hashed")

    def __repr__(self) -> str:
        raise AssertionError("it was shown")

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("it was iterated over")

    def __len__(self) -> int:
        raise AssertionError("it was measured")

    def __bool__(self) -> bool:
        raise AssertionError("it was asked for its truth")


class TrappedDict(dict[str, object]):
    def __iter__(self) -> Iterator[str]:
        raise AssertionError("it was iterated over")

    def __getitem__(self, key: str) -> object:
        raise AssertionError("it was asked for an item")

    def items(self) -> Any:
        raise AssertionError("it was asked for its items")


def test_none_of_the_applications_code_runs(shop: Any) -> None:
    value = [1]
    trapped = TrappedDict(value=value)
    shop.TRAPPED = [Trap(trapped)]
    path = holder_path(value, seconds=10)
    assert path is not None
    assert path.startswith("shop.TRAPPED[0]")


def test_other_threads_may_change_everything_meanwhile(shop: Any, threads_switch_often: None) -> None:
    stop = threading.Event()
    shop.MOVING = {}

    def mutate() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            shop.MOVING[number] = [number]
            shop.MOVING.pop(number - 5, None)

    thread = threading.Thread(target=mutate)
    thread.start()
    value = [1]
    shop.KEPT = {"value": value}
    try:
        paths = {holder_path(value, seconds=10) for _ in range(20)}
    finally:
        stop.set()
        thread.join()
    assert paths == {"shop.KEPT['value']"}


def test_many_go_back_together_and_each_has_its_own_way(shop: Any) -> None:
    values = [[number] for number in range(3)]
    shop.LISTS[:] = values[:2]
    shop.CACHE["third"] = values[2]
    ways = {shown.shown(99) for shown in Search(seconds=10, without=(values,)).back_from(values).values()}
    assert ways == {"shop.LISTS[0]", "shop.LISTS[1]", "shop.CACHE['third']"}
