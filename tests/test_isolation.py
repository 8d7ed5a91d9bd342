"""Copying at the boundary, and the check that names what two owners share all the same."""

import asyncio
import collections.abc
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import gc
import itertools
import logging
import pathlib
import random
import re
import sys
import threading
import traceback
import types
import typing
import uuid
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware.errors import InvalidContextError
from ucm_middleware.isolation import Shared, copy_data
from ucm_middleware.reachability import Finding, Root, find_shared

SECRET = "s3cr3t-token"
RESERVED = [
    *("user_id", "thread_id", "run_id", "request_id", "websocket_client_id", "created_at", "operation_depth"),
    *("parent_request_id", "db_session"),
]


class Color(enum.Enum):
    RED = 1


class Field(enum.StrEnum):
    CART = "cart"
    OWNER = "user_id"


class Thing:
    """An ordinary object, with attributes as given."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> "Thing":
        return self


class Slotted:
    __slots__ = ("content", "tag", "unset")

    def __init__(self, content: Any) -> None:
        self.content = content


@dataclasses.dataclass(frozen=True)
class Frozen:
    content: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    content: Any


@dataclasses.dataclass
class Thawed:
    content: Any


class Pair(NamedTuple):
    name: str
    content: Any


class ListOfOurs(list[Any]):
    pass


class DictOfOurs(dict[Any, Any]):
    pass


class ZoneOfOurs(datetime.tzinfo):
    def utcoffset(self, dt: datetime.datetime | None, /) -> datetime.timedelta:
        return datetime.timedelta(hours=1)

    def dst(self, dt: datetime.datetime | None, /) -> None:
        return None

    def tzname(self, dt: datetime.datetime | None, /) -> str:
        return "ours"


class PathOfOurs(pathlib.PurePosixPath):
    pass


class UuidOfOurs(uuid.UUID):
    pass


class NumberOfOurs(int):
    __slots__ = ()


def plain_function(number: int = 1, *, name: str = "x", marker: Any = None) -> tuple[int, str, Any]:
    return number, name, marker


def function_with_default(items: Any) -> Callable[[], Any]:
    def function(items: Any = items) -> Any:
        return items

    return function


def function_with_keyword_default(items: Any) -> Callable[[], Any]:
    def function(*, items: Any = items) -> Any:
        return items

    return function


def closure(content: Any) -> Callable[[], Any]:
    return lambda: content


def refused(data: Any, field: str = "agent_context") -> InvalidContextError:
    with pytest.raises(InvalidContextError) as caught:
        copy_data(data, field)
    return caught.value


IMMUTABLES: list[Any] = [
    *("text", 7, 10**30, 1.5, True, None, b"bytes", 2j, range(3), ..., NotImplemented, object()),
    *(datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC), datetime.date(2026, 11, 22), datetime.time(12)),
    *(datetime.timedelta(1), datetime.UTC, decimal.Decimal("1.50"), fractions.Fraction(1, 3), uuid.UUID(int=7)),
    *(pathlib.Path("/tmp"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), re.compile("a")),
    re.match("a", "a"),
    *(Color.RED, Field.CART, Thing, Color, int, typing, len, plain_function, lambda: 1, plain_function.__code__),
    *((), (1, ("a", (2.5,))), frozenset(), frozenset({1, (2, "b")}), (Color.RED, frozenset({Thing}))),
]

# Not all of these are copied as themselves, but nobody can write to them.
ALSO_IMMUTABLE: list[Any] = [
    *(slice(1), ZoneOfOurs(), PathOfOurs("a"), NumberOfOurs(1), UuidOfOurs(int=1)),
    *(Pair("a", (1,)), Frozen("a"), FrozenSlotted(("a",)), logging.getLogger("a"), typing.Literal[1]),
    *(list[int], typing.Callable[[int], str], collections.abc.Callable[[int], str]),
    *(int | None, typing.Any, typing.TypeVar("T"), Shared([1]), str.upper, "a".upper, object.__repr__, random),
    *(closure(7), functools.wraps(len)(closure("a")), weakref.ref(Color)),
]


class TestShared:
    def test_is_copied_as_itself(self) -> None:
        marker = Shared([SECRET])
        data = {"pool": marker, "deep": [Thing(pool=marker)], "key": {marker: 1}}
        own = copy_data(data, "agent_context")
        assert own["pool"] is marker
        assert own["deep"][0].pool is marker  # type: ignore[index]
        assert next(iter(own["key"])) is marker  # type: ignore[call-overload]
        assert copy.copy(marker) is copy.deepcopy(marker) is marker
        assert marker.value == [SECRET]

    def test_shows_the_type_of_its_value_only(self) -> None:
        assert repr(Shared([SECRET])) == "Shared(list)"

    def test_holds_the_same_value_for_good(self) -> None:
        marker = Shared[int](1)
        with pytest.raises(AttributeError):
            marker.value = 2  # type: ignore[misc]
        with pytest.raises(AttributeError):
            marker.other = 2  # type: ignore[attr-defined]


class TestCopy:
    def test_nothing_is_a_new_dict_each_time(self) -> None:
        empty: dict[str, object] = {}
        copies = [copy_data(data, "agent_context") for data in (None, empty, None, empty, OrderedDict[str, object]())]
        assert copies == [{}] * 5
        assert len({id(one) for one in (*copies, empty)}) == 6

    @pytest.mark.parametrize("value", IMMUTABLES)
    def test_immutables_pass_as_they_are(self, value: Any) -> None:
        own = copy_data({"value": value, "list": [value], "tuple": ([], value)}, "agent_context")
        assert own["value"] is value
        assert own["list"][0] is value  # type: ignore[index]
        assert own["tuple"][1] is value  # type: ignore[index]

    @pytest.mark.parametrize(
        "value",
        [
            *({"a": [1]}, [[1]], {1, (2, 3)}, ([1],), deque([[1], [2]], maxlen=2), bytearray(b"ab")),
            *(OrderedDict(b=[1], a=[2]), defaultdict(list, a=[1]), UserDict(a=[1]), {1: [1], None: [2], 2.5: [3]}),
            *(DictOfOurs(a=[1]), ListOfOurs([[1]]), Pair("a", [1]), Thawed([1]), Frozen([1]), SimpleNamespace(a=[1])),
        ],
    )
    def test_containers_are_equal_of_the_same_type_and_new_all_the_way(self, value: Any) -> None:
        own = copy_data({"value": value}, "agent_context")["value"]
        assert own == value
        assert type(own) is type(value)
        assert own is not value
        assert not find_shared([Root("given", "given", value), Root("own", "own", own)])

    def test_what_a_container_is_besides_its_items_is_kept(self) -> None:
        ordered = OrderedDict(b=1, a=2)
        ordered.move_to_end("b")
        data = {"deque": deque([1, 2], maxlen=2), "default": defaultdict(list), "ordered": ordered}
        own: dict[str, Any] = copy_data(data, "agent_context")
        own["deque"].append(3)
        assert own["deque"] == deque([2, 3])
        assert own["default"]["new"] == []
        assert list(own["ordered"]) == ["a", "b"]

    def test_keys_that_are_objects_are_copied_and_the_order_is_kept(self) -> None:
        key, items = Thing(name="key"), [1]
        data: dict[Any, Any] = {"first": items, (1, "a"): items, key: items, (key, 2): key, "last": items}
        own: dict[Any, Any] = copy_data({"data": data}, "agent_context")["data"]  # type: ignore[assignment]
        first, plain, own_key, pair, last = own
        assert (first, plain, own_key.name, pair, last) == ("first", (1, "a"), "key", (own_key, 2), "last")
        assert own_key is not key
        assert own[pair] is own_key
        assert own["first"] is own[plain] is own[own_key] is own["last"] is not items

    def test_one_object_in_several_places_stays_one(self) -> None:
        items, thing = [1], Thing()
        thing.items, thing.me = items, thing  # type: ignore[attr-defined]
        data = {"a": items, "b": (items, thing), "c": {"d": thing}, "e": deque([items]), "f": {thing}}
        own: dict[str, Any] = copy_data(data, "agent_context")
        new = own["b"][1]
        assert own["a"] is own["b"][0] is own["e"][0] is new.items is not items
        assert new is own["c"]["d"] is new.me is not thing
        assert own["f"] == {new}

    def test_cycles_are_kept(self) -> None:
        data: dict[str, Any] = {"items": [], "deque": deque(), "map": {}}
        looped = (data["items"], "x")
        data["items"].append(looped)
        data["looped"] = looped
        data["deque"].append(data["deque"])
        data["map"]["up"] = data["map"]
        data["top"] = data
        thing = Thing()
        thing.group = frozenset({thing, 1})  # type: ignore[attr-defined]
        data["group"] = thing.group  # type: ignore[attr-defined]
        own: dict[str, Any] = copy_data(data, "agent_context")
        assert own["items"][0] is own["looped"]
        assert own["looped"][0] is own["items"] is not data["items"]
        assert own["deque"][0] is own["deque"]
        assert own["map"]["up"] is own["map"]
        assert own["top"] is own is not data
        [new] = own["group"] - {1}
        assert new.group is own["group"]
        assert new is not thing

    def test_methods_are_those_of_the_copy(self) -> None:
        thing, items = Thing(), [1]
        data = {"thing": thing, "method": thing.method, "items": items, "append": items.append, "upper": "a".upper}
        own: dict[str, Any] = copy_data(data, "agent_context")
        assert own["method"]() is own["thing"] is not thing
        own["append"](2)
        assert (own["items"], items) == ([1, 2], [1])
        assert own["upper"]() == "A"

    @pytest.mark.parametrize("kind", [types.MappingProxyType, UserDict, DictOfOurs, OrderedDict])
    def test_any_mapping_becomes_a_plain_dict(self, kind: Callable[[dict[str, Any]], Any]) -> None:
        given = {"a": [1]}
        own = copy_data(kind(given), "agent_context")
        assert type(own) is dict
        assert own == given
        assert own["a"] is not given["a"]

    def test_a_mapping_that_makes_its_values_up_gets_each_right(self) -> None:
        class Lazy(UserDict[str, Any]):
            def __getitem__(self, key: str) -> Any:
                return [key]

        assert copy_data(Lazy(a=1, b=2, c=3), "agent_context") == {"a": ["a"], "b": ["b"], "c": ["c"]}

    @pytest.mark.parametrize("kind", [list, deque, set, dict, OrderedDict])
    def test_data_that_change_meanwhile_are_copied_as_they_were(self, kind: Callable[..., Any]) -> None:
        items: Any = kind()
        numbers = itertools.count()

        class Adding:
            def __deepcopy__(self, memo: object) -> "Adding":
                self.add()
                return Adding()

            def add(self) -> None:
                match items:
                    case dict():
                        items[next(numbers)] = Adding()
                    case set():
                        items.add(Adding())
                    case _:
                        items.append(Adding())

        Adding().add()
        assert len(copy_data({"items": items}, "agent_context")["items"]) == 1  # type: ignore[arg-type]

    def test_keys_become_exactly_str(self) -> None:
        own = copy_data({Field.CART: [1], "other": 2}, "agent_context")
        assert own == {"cart": [1], "other": 2}
        assert {type(key) for key in own} == {str}


class Angry:
    """Cannot be copied, and says too much about it."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __deepcopy__(self, memo: object) -> "Angry":
        raise self.error(SECRET)

    def itself(self) -> "Angry":
        return self


class AngryOnceCopied:
    """Its copies have no hash."""

    copied = False

    def __deepcopy__(self, memo: object) -> "AngryOnceCopied":
        other = AngryOnceCopied()
        other.copied = True
        return other

    def __hash__(self) -> int:
        if self.copied:
            raise ZeroDivisionError(SECRET)
        return 1


class Unshown:
    def __repr__(self) -> str:
        raise ZeroDivisionError(SECRET)


class AngryMapping(UserDict[str, Any]):
    def items(self) -> Any:
        raise ZeroDivisionError(SECRET)


class TestRefusal:
    @pytest.mark.parametrize("data", [[], "", "text", 0, [("a", 1)], Thing()])
    def test_what_is_no_mapping(self, data: Any) -> None:
        error = refused(data, "audit_metadata")
        assert error.field == "audit_metadata"
        assert error.rule == f"must be a mapping, not {type(data).__name__}"

    def test_a_mapping_that_cannot_be_read(self) -> None:
        assert refused(AngryMapping(a=1)).rule == "cannot be read (ZeroDivisionError)"

    @pytest.mark.parametrize(
        ("key", "text"),
        [(1, "1"), (None, "None"), (b"a", "b'a'"), (Color.RED, "<Color>"), ((1,), "<tuple>"), (Unshown(), "<Unshown>")],
    )
    def test_keys_other_than_str(self, key: Any, text: str) -> None:
        error = refused({"a": 1, key: 2})
        assert error.field == f"agent_context[{text}]"
        assert error.rule == f"keys must be str, not {type(key).__name__}"

    def test_reserved_keys_spelled_by_an_enum(self) -> None:
        assert refused({Field.CART: 1, Field.OWNER: 2}).field == "agent_context['user_id']"

    @pytest.mark.parametrize("key", RESERVED)
    def test_reserved_keys_at_the_top(self, key: str) -> None:
        error = refused({"a": 1, key: threading.Lock()})
        assert error.field == f"agent_context[{key!r}]"
        assert "reserved" in error.rule

    @pytest.mark.parametrize("key", RESERVED)
    def test_reserved_keys_are_ordinary_ones_further_down(self, key: str) -> None:
        assert copy_data({"order": {key: 1}}, "agent_context") == {"order": {key: 1}}

    @pytest.mark.parametrize(
        "value",
        [threading.Lock(), (n for n in [1]), Thing(lock=threading.Lock()), types.MappingProxyType({}), memoryview(b"")],
    )
    def test_what_cannot_be_copied(self, value: object) -> None:
        error = refused({"a": 1, "cart": {"items": [1, 2, (3, deque([4, value]))]}})
        assert error.field == "agent_context['cart']['items'][2][1][1]"
        assert error.rule == f"{type(value).__name__} cannot be copied (TypeError)"
        assert error.remedy == "make it copyable, or wrap it in Shared(...) to share it on purpose"

    @pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, KeyError, MemoryError])
    def test_whatever_the_hooks_of_a_class_raise(self, error: type[Exception]) -> None:
        found = refused({"a": [Angry(error)]})
        assert found.field == "agent_context['a'][0]"
        assert found.rule == f"Angry cannot be copied ({error.__name__})"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
    def test_but_not_what_stops_the_program_or_the_task(self, error: type[BaseException]) -> None:
        with pytest.raises(error):
            copy_data({"a": [Angry(error)]}, "agent_context")

    @pytest.mark.parametrize(
        ("value", "step"),
        [
            *(({Angry(KeyError)}, "<element>"), (frozenset({Angry(KeyError)}), "<element>")),
            *(({1: Angry(KeyError)}, "[1]"), ({"k": 1, (Angry(KeyError), 1): 1}, "[<tuple>][0]")),
            *((OrderedDict({"k": 1, "a": Angry(KeyError)}), "['a']"), ((1, Angry(KeyError)), "[1]")),
            *(
                (defaultdict[str, Any](Angry(KeyError).itself, a=1), ".default_factory"),
                ([1, [Angry(KeyError)]], "[1][0]"),
            ),
            *(({AngryOnceCopied()}, ""), ({AngryOnceCopied(): 1}, ""), (frozenset({AngryOnceCopied()}), "")),
        ],
    )
    def test_the_path_leads_through_every_container(self, value: object, step: str) -> None:
        assert refused({"a": {"b": value}}).field == f"agent_context['a']['b']{step}"

    def test_functions_that_share_what_they_hold(self) -> None:
        error = refused({"tools": {"search": closure(1)}})
        assert error.field == "agent_context['tools']['search']"
        assert "closes over" in error.rule
        assert "Shared" in error.remedy
        for function in (function_with_default([]), function_with_keyword_default([])):
            error = refused({"tools": [function]})
            assert error.field == "agent_context['tools'][0]"
            assert "mutable defaults" in error.rule

    def test_functions_whose_defaults_nobody_can_change(self) -> None:
        functions = [function_with_default(Shared([])), function_with_keyword_default((1, 2)), plain_function]
        assert copy_data({"tools": functions}, "agent_context")["tools"] == functions

    @pytest.mark.parametrize("kind", ["list", "dict", "tuple", "object"])
    def test_nesting_without_end(self, kind: str) -> None:
        deep: Any = []
        for _ in range(20_000):
            deep = {"list": [deep], "dict": {"k": deep}, "tuple": (deep,), "object": Thing(k=deep)}[kind]
        error = refused({"deep": deep})
        assert error.field == "agent_context"
        assert "nested deeper" in error.rule
        assert copy_data({"a": [1]}, "agent_context") == {"a": [1]}

    def test_no_message_holds_a_value(self) -> None:
        for data in ({"a": Angry(ValueError)}, {"a": {AngryOnceCopied()}}, {Unshown(): SECRET}, AngryMapping(a=1)):
            error = refused(data)
            assert SECRET not in "".join(traceback.format_exception(error))
        assert SECRET not in str(refused({"a": SECRET, "b": [SECRET, threading.Lock()], "c": {SECRET}}))
        assert SECRET not in str(refused({"db_session": SECRET}))

    def test_keys_are_shown_short_and_harmless(self) -> None:
        shown: list[tuple[Any, str]] = [
            *(("x" * 5_000, f"'{'x' * 36}..."), ("a'b\n\u202e", '"a\'b\\n\\u202e"')),
            *((b"\xff" * 90, "b'" + r"\xff" * 8 + r"\xf" + "..."), (10**5_000, "<int>"), (10**20, "1" + "0" * 20)),
            *((-7, "-7"), (2.5, "2.5"), (True, "True"), (None, "None"), (Color.RED, "<Color>"), ((1, 2), "<tuple>")),
        ]
        for key, text in shown:
            assert refused({"a": {key: threading.Lock()}}).field == f"agent_context['a'][{text}]"

    def test_a_very_long_path_shows_both_ends(self) -> None:
        deep: Any = threading.Lock()
        for level in range(50):
            deep = {f"k{level}": deep}
        assert refused(deep).field == (
            "agent_context['k49']['k48']['k47']['k46']['k45']['k44'] ... ['k5']['k4']['k3']['k2']['k1']['k0']"
        )


def owners(**data: Any) -> list[Root]:
    return [Root(owner, f"{owner}.data", value) for owner, value in data.items()]


def shown(**data: Any) -> list[str]:
    return [str(finding) for finding in find_shared(owners(**data))]


class TestFindShared:
    @pytest.mark.parametrize(
        ("alice", "bob", "paths"),
        [
            (lambda it: it, lambda it: it, ("", "")),
            (lambda it: {"cart": it}, lambda it: {"basket": [1, it]}, ("['cart']", "['basket'][1]")),
            (lambda it: {1: it}, lambda it: DictOfOurs({None: it}), ("[1]", "[None]")),
            (lambda it: (1, (2, it)), lambda it: deque([it]), ("[1][1]", "[0]")),
            (lambda it: ListOfOurs([it]), lambda it: Pair("a", it), ("[0]", "[1]")),
            (lambda it: OrderedDict(a=it), lambda it: defaultdict(list, a=it), ("['a']", "['a']")),
            (lambda it: Thing(items=it), lambda it: Slotted(it), (".items", ".content")),
            (lambda it: Thing(**{"not a name": it}), lambda it: Thawed(it), (".__dict__['not a name']", ".content")),
            (lambda it: Frozen(it), lambda it: FrozenSlotted(it), (".content", ".content")),
            (lambda it: SimpleNamespace(a=it), lambda it: UserDict(a=it), (".a", ".data['a']")),
            (lambda it: functools.partial(print, it), lambda it: slice(it), (".args[0]", ".stop")),
            (lambda it: functools.partial(dict, k=it), lambda it: slice(it, 1), (".keywords['k']", ".start")),
            (lambda it: closure(it), lambda it: functools.wraps(len)(closure(it)), ("<variable content>",) * 2),
            (lambda it: function_with_default(it), lambda it: [it], (".__defaults__[0]", "[0]")),
            (lambda it: function_with_keyword_default(it), lambda it: [it], (".__kwdefaults__['items']", "[0]")),
            (lambda it: types.MappingProxyType({"k": it}), lambda it: [it], ("['k']", "[0]")),
            (lambda it: defaultdict(closure(it)), lambda it: [it], (".default_factory<variable content>", "[0]")),
        ],
    )
    def test_names_what_two_owners_share_by_both_paths(
        self, alice: Callable[[Any], Any], bob: Callable[[Any], Any], paths: tuple[str, str]
    ) -> None:
        for shared in ([1], {1: 2}, {1}, deque([1]), bytearray(b"a"), Thing(a=1), Slotted(1)):
            roots = owners(alice=alice(shared), bob=bob(shared))
            found = find_shared(roots)
            name = type(shared).__name__
            places = {"first_place": "alice.data", "second_place": "bob.data"}
            assert found == [Finding(f"alice.data{paths[0]}", f"bob.data{paths[1]}", name, "alice", "bob", **places)]
            assert str(found[0]) == f"alice.data{paths[0]} is bob.data{paths[1]} ({name})"

    def test_does_not_look_behind_a_marker_or_a_class_or_a_module(self) -> None:
        class Holding:
            held = (items := [1])

        module = types.ModuleType("holding")
        module.held = items = Holding.items  # type: ignore[attr-defined]
        assert shown(alice=[Shared(items), Holding, module], bob=[items]) == []

    def test_names_objects_in_sets_and_among_keys(self) -> None:
        thing = Thing()
        assert shown(alice={thing}, bob={(1, thing): 2}, carol=frozenset({(thing, 1)})) == [
            "alice.data<element> is bob.data<key>[1] (Thing)",
            "alice.data<element> is carol.data<element>[0] (Thing)",
        ]

    def test_names_the_object_of_a_method_and_of_a_weak_reference(self) -> None:
        thing, items = Thing(), [1]
        assert shown(alice=thing.method, bob=weakref.ref(thing)) == ["alice.data.__self__ is bob.data() (Thing)"]
        assert shown(alice=items.append, bob=items.__len__) == ["alice.data.__self__ is bob.data.__self__ (list)"]
        for method, name in ((thing.method, "Thing"), (items.append, "list"), (items.__len__, "list")):
            assert shown(alice=method, bob=method) == [f"alice.data.__self__ is bob.data.__self__ ({name})"]

    def test_a_function_may_close_over_a_variable_without_a_value(self) -> None:
        def function() -> Any:
            return items, later

        items = [1]
        assert shown(alice=function, bob=items) == ["alice.data<variable items> is bob.data (list)"]
        later = 1

    def test_objects_of_a_class_that_gives_them_all_one_dict_share_that(self) -> None:
        class Borg:
            state: ClassVar[dict[str, Any]] = {"name": "one"}

            def __init__(self) -> None:
                self.__dict__ = self.state

        found = shown(alice=[Borg()], bob={"b": Borg()})
        assert found == ["alice.data[0].__dict__ is bob.data['b'].__dict__ (dict)"]

    @pytest.mark.skipif(
        sys.version_info >= (3, 13),
        reason="the collector goes from an object to its attributes past its dict, and from the dict nowhere; "
        "to ask each object for its dict would make one for each",
    )
    def test_an_object_shares_the_dict_that_it_lends_to_another(self) -> None:
        alice, bob = Thing(), Thing()
        bob.__dict__ = alice.__dict__
        assert shown(alice=[alice], bob={"b": bob}) == ["alice.data[0].__dict__ is bob.data['b'].__dict__ (dict)"]

    def test_names_the_topmost_object_and_nothing_below_it(self) -> None:
        cart = Thing(items=[[1], {"a": []}])
        cart.me = cart  # type: ignore[attr-defined]
        assert shown(alice={"cart": cart}, bob=[(cart,), cart]) == ["alice.data['cart'] is bob.data[1] (Thing)"]

    def test_names_each_way_in(self) -> None:
        """To cut the first one only would leave the second."""
        cart = Thing(items=[1])
        found = shown(alice=cart, bob=[cart, {"items": cart.__dict__["items"]}])
        assert found == ["alice.data is bob.data[0] (Thing)", "alice.data.items is bob.data[1]['items'] (list)"]

    def test_names_every_owner_of_an_object_beside_the_first(self) -> None:
        everyones: list[int] = []
        theirs: list[int] = []
        found = find_shared(owners(alice=[everyones], bob=[everyones, theirs], carol=[theirs, everyones]))
        assert {(one.first_path, one.second_path, one.first_owner, one.second_owner) for one in found} == {
            ("alice.data[0]", "bob.data[0]", "alice", "bob"),
            ("bob.data[1]", "carol.data[0]", "bob", "carol"),
            ("alice.data[0]", "carol.data[1]", "alice", "carol"),
        }
        assert len(found) == 3

    def test_an_owner_may_share_with_itself(self) -> None:
        items = [1]
        roots = [Root("alice", "alice.data", [items]), Root("bob", "bob.data", []), Root("alice", "alice.more", items)]
        assert find_shared(roots) == []
        assert find_shared(roots[:1]) == find_shared([]) == []

    def test_several_roots_of_an_owner_are_one_walk(self) -> None:
        items = [1]
        roots = [
            *(Root("alice", "alice.agent_context", {}), Root("bob", "bob.agent_context", {"b": items})),
            *(Root("alice", "alice.audit_metadata", {"a": items}), Root("bob", "bob.audit_metadata", items)),
        ]
        [finding] = find_shared(roots)
        assert str(finding) == "alice.audit_metadata['a'] is bob.audit_metadata (list)"

    @pytest.mark.parametrize("number", range(len(IMMUTABLES) + len(ALSO_IMMUTABLE)))
    def test_immutables_are_never_named(self, number: int) -> None:
        value = [*IMMUTABLES, *ALSO_IMMUTABLE][number]
        assert shown(alice=[value, {1: value}], bob=(value, Thing(a=value), {"k": (value,)})) == []

    def test_in_something_immutable_the_mutable_is_named(self) -> None:
        constant, holder = (1, ("a", frozenset("b"))), Pair("a", Frozen([1]))
        found = shown(alice=[constant, holder], bob=[constant, holder], carol=(holder, constant))
        assert found == [
            "alice.data[1][1].content is bob.data[1][1].content (list)",
            "alice.data[1][1].content is carol.data[0][1].content (list)",
        ]

    def test_a_subclass_of_something_immutable_is_mutable_by_its_attributes(self) -> None:
        class Text(str):
            """May have attributes."""

        class Bare(str):
            __slots__ = ()

        class Half(Bare):
            """May have them again."""

        class Late(Frozen):
            """Not frozen itself: only the fields are."""

        for value in (Text("a"), Half("a"), Late(1)):
            assert shown(alice=[value], bob=[value]) == [f"alice.data[0] is bob.data[0] ({type(value).__name__})"]
        bare = Bare("a")
        assert shown(alice=[bare], bob=[bare]) == []

    def test_a_session_is_walked_and_even_a_bare_object_is_one(self) -> None:
        engine: list[int] = []
        sessions = [Thing(engine=engine), Thing(engine=engine), (engine,), None, Shared(engine), object()]

        def found(alice: Any, bob: Any) -> list[str]:
            roots = [
                Root("alice", "alice.db_session", alice, stands=True),
                Root("bob", "bob.db_session", bob, stands=True),
            ]
            return [str(finding) for finding in find_shared(roots)]

        assert found(sessions[0], sessions[1]) == ["alice.db_session.engine is bob.db_session.engine (list)"]
        assert [found(one, one) for one in sessions] == [
            ["alice.db_session is bob.db_session (Thing)"],
            ["alice.db_session is bob.db_session (Thing)"],
            ["alice.db_session[0] is bob.db_session[0] (list)"],
            *([], []),
            ["alice.db_session is bob.db_session (object)"],
        ]

    def test_walks_as_deep_as_it_goes_and_shows_both_ends_of_the_path(self) -> None:
        bottom = deep = Slotted(None)
        for _ in range(50_000):
            deep = Slotted(deep)
        [finding] = find_shared(owners(alice=deep, bob=bottom))
        assert finding.first_path == f"alice.data{'.content' * 6} ... {'.content' * 6}"
        while deep is not bottom:  # taken apart from the top: to let go of it at once would recurse
            deep = deep.content

    def test_the_path_is_a_shortest_one(self) -> None:
        items = [1]
        assert shown(alice={"a": [[items]], "b": [items]}, bob=[[[items]], items]) == [
            "alice.data['b'][0] is bob.data[1] (list)"
        ]

    def test_keeps_nothing_alive(self) -> None:
        thing = Thing()
        seen = weakref.ref(thing)
        gc.disable()
        try:
            findings = find_shared(owners(alice=[thing], bob={"a": thing}))
            del thing
            assert seen() is None
        finally:
            gc.enable()
        assert len(findings) == 1


def speaking_class(said: list[str]) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Makes objects all of whose methods, and those of their class, note the call and raise, from when it is armed."""
    armed: list[bool] = []

    def speak(base: type, name: str) -> Any:
        def method(self: Any, *arguments: Any) -> Any:
            if armed:
                said.append(name)
                raise ZeroDivisionError(name)
            return getattr(base, name)(self, *arguments)

        return method

    of_types = ["__hash__", "__eq__", "__getattribute__", "__instancecheck__", "__subclasscheck__", "__repr__"]
    names: dict[str, Any] = {name: speak(type, name) for name in of_types}
    names["__name__"] = names["__module__"] = names["__dataclass_params__"] = property(speak(type, "__name__"))
    meta: Any = type("Meta", (type,), names)
    of_objects = [
        "__eq__",
        "__hash__",
        "__repr__",
        "__str__",
        "__getattribute__",
        "__reduce_ex__",
        "__sizeof__",
        "__dir__",
    ]
    names = {name: speak(object, name) for name in of_objects}
    names |= {name: speak(list, name) for name in ("__iter__", "__len__", "__contains__", "__getitem__")}
    names |= {name: speak(Thing, name) for name in ("__getattr__", "__bool__", "__call__", "__get__")}
    names["__class__"] = names["lazy"] = property(speak(object, "__class__"))
    return meta("Speaking", (), {"__slots__": ("held", "__dict__"), **names}), lambda: armed.append(True)


class TestFindSharedRunsNoneOfTheApplicationsCode:
    def test_of_objects_and_their_classes(self) -> None:
        said: list[str] = []
        make, arm = speaking_class(said)
        loud, holder, key, items = make(), make(), make(), [1]
        holder.held, holder.attribute = items, (loud, make)
        below = [1]
        alice = {"a": loud, "b": [loud, holder], loud: {loud}, (make, loud): frozenset({make}), key: {1: below}}
        bob = {"x": items, "y": Thing(z=loud), "z": make, "below": below}
        arm()
        found = shown(alice=alice, bob=bob)
        assert said == []
        assert found == [
            "alice.data['b'][1].held is bob.data['x'] (list)",
            "alice.data[<Speaking>][1] is bob.data['below'] (list)",
            "alice.data['a'] is bob.data['y'].z (Speaking)",
        ]

    def test_of_containers_that_read_otherwise(self) -> None:
        said: list[str] = []

        def speak(self: Any, *arguments: Any) -> Any:
            said.append(type(self).__name__)
            raise ZeroDivisionError

        hooks = ["__iter__", "__len__", "__getitem__", "__contains__", "__reversed__", "__copy__", "copy"]
        names = dict.fromkeys(
            [*hooks, "items", "keys", "values", "get", "__getattr__", "__missing__", "__length_hint__"], speak
        )
        containers: Iterable[type] = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque)
        for kind in containers:
            thing = Thing()
            content = {1: thing} if issubclass(kind, dict) else [thing]
            arguments = (None, content) if kind is defaultdict else (content,)
            value = type(f"Loud{kind.__name__}", (kind,), names)(*arguments)
            assert len(shown(alice=[value], bob=[thing])) == 1
        assert said == []

    def test_of_attributes_that_are_computed(self) -> None:
        class Computed(Thing):
            @property
            def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
                raise ZeroDivisionError

            @functools.cached_property
            def lazy(self) -> None:
                raise ZeroDivisionError

        items = [1]
        value = Computed.__new__(Computed)
        value.items = items  # type: ignore[attr-defined]
        assert shown(alice=value, bob=items) == ["alice.data.items is bob.data (list)"]

    def test_of_a_class_that_borrows_the_descriptors_of_another(self) -> None:
        class Borrowing(Slotted):
            __slots__ = ()
            borrowed = vars(Thawed)["__dict__"]
            also_borrowed = functools.partial.args

        items = [1]
        assert shown(alice=Borrowing(items), bob=items) == ["alice.data.content is bob.data (list)"]

    def test_of_the_name_of_a_module(self) -> None:
        said: list[str] = []
        make, arm = speaking_class(said)
        value = type("Misplaced", (Thing,), {"__module__": make()})()
        arm()
        assert shown(alice=value, bob=[value]) == ["alice.data is bob.data[0] (Misplaced)"]
        assert said == []


@pytest.mark.parametrize("kind", [dict, set, deque, Thing])
def test_what_is_walked_may_change_meanwhile(kind: Callable[[], Any]) -> None:
    """As another thread may change it: here after every single instruction of the walk."""
    value, items, numbers = kind(), [1], itertools.count()

    def change() -> None:
        number = next(numbers)
        match value:
            case Thing():
                value.__dict__[f"a{number}"] = items
            case dict():
                value[number] = items
            case set():
                value.add(number)
            case _:
                value.append(items)

    def trace(frame: types.FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = True
        change()
        return trace

    roots = owners(alice=value, bob=items)
    change()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = find_shared(roots)
    finally:
        sys.settrace(before)
    assert next(numbers) > 100
    assert [finding.type_name for finding in found] == ([] if kind is set else ["list"])


# Random data. A plan is a list of nodes, each with the numbers of the nodes it leads to; `build` makes objects of it.
Plan = list[tuple[str, list[int]]]
OPEN: dict[str, Callable[[], Any]] = {
    "list": list,
    "dict": dict,
    "deque": deque,
    "ordered": OrderedDict,
    "default": lambda: defaultdict(list),
    "thing": Thing,
    "slotted": lambda: Slotted([]),
    "dict of ours": DictOfOurs,
    "list of ours": ListOfOurs,
    "set": set,
    "keyed": dict,
    "token": Thing,
}
CLOSED: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "frozen": Frozen,
    "pair": lambda items: Pair("pair", tuple(items)),
    "scalar": len,
    "frozenset": lambda items: frozenset(filter(may_be_element, items)),
}
BUILT_IN = ["list", "dict", "deque", "ordered", "default", "set", "keyed", "token", "tuple", "frozenset", "scalar"]
# No sets and pairs: where they are part of a cycle through an object, deepcopy makes two of one.
WITH_OBJECTS = [
    *("list", "dict", "deque", "ordered", "default", "keyed", "thing", "slotted", "dict of ours", "list of ours"),
    *("tuple", "frozen", "scalar"),
]
# What can be told by a path that is a Python expression.
WITH_PATHS = [kind for kind in (*WITH_OBJECTS, "pair") if kind != "keyed"]


def plans(kinds: list[str]) -> st.SearchStrategy[Plan]:
    node = st.tuples(st.sampled_from(kinds), st.lists(st.integers(0, 9), max_size=4))
    return st.lists(node, min_size=1, max_size=10)


def build(plan: Plan) -> list[Any]:
    """The objects of a plan, cycles and all; only immutable ones never lead to immutable ones that come later."""
    objects: list[Any] = [OPEN[kind]() if kind in OPEN else None for kind, _ in plan]
    for number, (kind, targets) in enumerate(plan):
        if isinstance(objects[number], Thing | Slotted):
            objects[number].tag = number
        elif kind in CLOSED:
            objects[number] = CLOSED[kind]([objects[target % len(plan)] for target in targets])
    for value, (kind, targets) in zip(objects, plan, strict=True):
        fill(kind, value, [objects[target % len(plan)] for target in targets])
    return objects


def fill(kind: str, value: Any, items: list[Any]) -> None:
    if kind == "keyed":
        value.update({item if may_be_element(item) else index: item for index, item in enumerate(items)})
    elif isinstance(value, dict):
        value.update({index or "first": item for index, item in enumerate(items)})
    elif isinstance(value, set):
        value.update(filter(may_be_element, items))
    elif isinstance(value, list | deque):
        value.extend(items)
    elif kind == "slotted":
        value.content.extend(items)
    elif kind == "thing":
        value.__dict__.update({f"a{index}": item for index, item in enumerate(items)})


def may_be_element(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(may_be_element, value))
    return isinstance(value, int | Thing | Slotted)


def held_by(value: Any) -> list[Any]:
    """What an object of a plan holds, read in the ordinary way."""
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(value.items()))
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, Slotted | Frozen):
        return [value.content]
    return list(value.__dict__.values()) if isinstance(value, Thing) else []


def is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set | deque | Thing | Slotted)


def reach(start: Iterable[Any], goes_on: Callable[[Any], bool] = lambda value: True) -> dict[int, Any]:
    """All that can be reached, by id; what an object holds only where ``goes_on`` says so."""
    found: dict[int, Any] = {}
    waiting = list(start)
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            waiting.extend(held_by(value) if goes_on(value) else ())
    return found


def outline(value: Any) -> list[Any]:
    """The shape of data: each object once, numbered as met, with its type and the numbers of what it holds."""
    numbers: dict[int, int] = {}
    lines: list[list[Any]] = []

    def number(value: Any) -> Any:
        if not is_mutable(value) and not isinstance(value, tuple | frozenset | Frozen):
            return value
        if id(value) not in numbers:
            numbers[id(value)] = len(numbers)
            line: list[Any] = [type(value).__name__]
            lines.append(line)
            unordered = isinstance(value, set | frozenset)
            line.extend(map(number, sorted(held_by(value), key=name_of) if unordered else held_by(value)))
        return f"#{numbers[id(value)]}"

    number(value)
    return lines


def name_of(element: Any) -> str:
    """What to sort the elements of a set by: the same in the original and in the copy."""
    if isinstance(element, tuple | frozenset):
        return f"{type(element).__name__} {sorted(map(name_of, element))}"
    return f"{type(element).__name__} {getattr(element, 'tag', element)}"


def shared_by_brute_force(data: dict[str, Any]) -> list[tuple[int, str, str]]:
    """What an owner comes upon and an earlier one reaches: its id, whose it was first, and who came upon it."""
    first: dict[int, str] = {}
    found: list[tuple[int, str, str]] = []

    def is_shared(value: Any) -> bool:
        return is_mutable(value) and id(value) in first

    for owner, root in data.items():
        met = reach([root], goes_on=lambda value: not is_shared(value))
        found += [(place, first[place], owner) for place, value in met.items() if is_shared(value)]
        for place in reach([root]):
            first.setdefault(place, owner)
    return sorted(found)


class TestRandomData:
    @given(plans(BUILT_IN) | plans(WITH_OBJECTS))
    def test_a_copy_has_the_shape_of_the_original_and_nothing_mutable_of_it(self, plan: Plan) -> None:
        data = {"first": (objects := build(plan))[0], "all": objects}
        before = outline(data)
        own = copy_data(data, "agent_context")
        assert outline(own) == before
        assert outline(data) == before
        given, copied = reach([data]), reach([own])
        assert not [value for place, value in copied.items() if place in given and is_mutable(value)]
        assert shown(given=data, own=own) == []

    @given(plans(WITH_PATHS), st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=2, max_size=4))
    def test_what_is_found_is_what_brute_force_finds(self, plan: Plan, starts: list[list[int]]) -> None:
        objects = build(plan)
        data = {
            owner: tuple(objects[start % len(objects)] for start in ours)
            for owner, ours in zip(("alice", "bob", "carol", "dave"), starts, strict=False)
        }
        where = {owner: SimpleNamespace(data=value) for owner, value in data.items()}
        found: list[tuple[int, str, str]] = []
        for finding in find_shared(owners(**data)):
            one, other = eval(finding.first_path, where), eval(finding.second_path, where)
            assert one is other
            assert finding.first_path.startswith(f"{finding.first_owner}.data")
            assert finding.second_path.startswith(f"{finding.second_owner}.data")
            assert finding.type_name == type(one).__name__
            found.append((id(one), finding.first_owner, finding.second_owner))
        assert sorted(found) == shared_by_brute_force(data)

    @given(plans(WITH_PATHS), st.data())
    def test_a_planted_share_is_found_and_nothing_without_it(self, plan: Plan, data: st.DataObject) -> None:
        alice, bob = build(plan), build(plan)
        assert shown(alice=alice, bob=bob) == []
        mutable = [value for value in reach([alice]).values() if is_mutable(value)]
        planted = data.draw(st.sampled_from(mutable))
        data.draw(st.sampled_from([value for value in reach([bob]).values() if isinstance(value, list)])).append(
            planted
        )
        [finding] = find_shared(owners(alice=alice, bob=bob))
        where = {"alice": SimpleNamespace(data=alice), "bob": SimpleNamespace(data=bob)}
        assert eval(finding.first_path, where) is eval(finding.second_path, where) is planted
