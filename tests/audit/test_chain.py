"""The chain and the frontier, against the definitions of RFC 9162."""

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware.audit.chain import Chain, genesis

STREAM = "stream_" + "0" * 32


def largest_power_below(number: int) -> int:
    power = 1
    while power * 2 < number:
        power *= 2
    return power


def root_of(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, section 2.1.1, over leaf hashes."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = largest_power_below(len(leaves))
    return sha256(b"\x01" + root_of(leaves[:split]) + root_of(leaves[split:])).digest()


def joined(frontier: list[bytes]) -> bytes:
    """The root that a frontier stands for."""
    if not frontier:
        return sha256(b"").digest()
    *rest, root = frontier
    for left in reversed(rest):
        root = sha256(b"\x01" + left + root).digest()
    return root


def test_the_genesis_depends_on_the_stream_and_on_whether_it_is_sealed() -> None:
    assert len({genesis(STREAM, sealed=True), genesis(STREAM, sealed=False), genesis("another", sealed=False)}) == 3


@given(st.lists(st.binary(max_size=40), max_size=70))
def test_it_is_the_tree_and_the_chain_that_the_format_page_defines(entries: list[bytes]) -> None:
    chain = Chain(0, genesis(STREAM, sealed=False), b"")
    previous, leaves = chain.head, list[bytes]()
    for body in entries:
        subject = sha256(body).digest()[:16]
        digest = chain.append(subject, body)
        assert digest == sha256(b"\x00" + previous + subject + body).digest()
        previous = digest
        leaves.append(digest)
    assert (chain.size, chain.head) == (len(entries), previous)
    assert len(chain.frontier) == len(entries).bit_count()
    assert joined(chain.frontier) == root_of(leaves)


@given(st.integers(0, 40), st.integers(0, 40))
def test_one_that_is_read_again_goes_on_as_if_it_had_not_stopped(before: int, after: int) -> None:
    chain = Chain(0, genesis(STREAM, sealed=True), b"")
    for number in range(before):
        chain.append(bytes(16), b"%d" % number)
    again = Chain(chain.size, chain.head, chain.packed_frontier())
    for number in range(after):
        assert again.append(bytes(16), b"%d" % number) == chain.append(bytes(16), b"%d" % number)
    assert (again.size, again.head, again.frontier) == (chain.size, chain.head, chain.frontier)


def test_a_copy_is_not_changed_by_what_the_other_appends() -> None:
    chain = Chain(0, genesis(STREAM, sealed=True), b"")
    chain.append(bytes(16), b"one")
    copy = chain.copy()
    chain.append(bytes(16), b"two")
    assert (copy.size, len(copy.frontier)) == (1, 1)
    assert copy.append(bytes(16), b"two") == chain.head
