"""Notes of tokens that follow their experts, and what is read of them."""

import tempfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from moetuner.ops import dispatch  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NOWHERE = torch.iinfo(torch.int64).max
RANKS, SLOTS, EXPERTS = 5, 3, 12


def _tables(rng):
    """Experts with one or two slots, int32 [E, 2] and [E]."""
    slots = torch.stack(
        [torch.randperm(RANKS * SLOTS, generator=rng)[:2] for _ in range(EXPERTS)]
    )
    count = torch.randint(1, 3, (EXPERTS,), generator=rng)
    return slots.int(), count.int()


def _tokens(rng, num_tokens, top_k):
    """Ids with padding, int64 [T, K]; keys that need all bits, int64 [T, 2]."""
    ids = torch.randint(-1, EXPERTS + 1, (num_tokens, top_k), generator=rng)
    homes = torch.randint(0, 2**31, (num_tokens,), generator=rng)
    rows = torch.randint(0, 2**32, (num_tokens,), generator=rng)
    return ids, torch.stack([homes, rows], dim=1)


def _ranks(ids, slots, count):
    """Rank of each choice of each token; -1: padding."""

    def rank_of(token, expert):
        if not 0 <= expert < EXPERTS:
            return -1
        return int(slots[expert, token % int(count[expert])]) // SLOTS

    return [[rank_of(t, e) for e in chosen] for t, chosen in enumerate(ids.tolist())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_read_of_notes_is_what_was_written(device, top_k, dtype):
    ops, rank, width = torch.ops.moetuner, 2, min(top_k, RANKS)
    rng = torch.Generator().manual_seed(top_k)
    slots, count = _tables(rng)
    written = []
    for num_tokens in (300, 41):  # those that arrived, and those that are here
        ids, keys = _tokens(rng, num_tokens, top_k)
        given = [t.to(device) for t in (ids.to(dtype), keys, slots, count)]
        notes = ops.follow_notes(*given, SLOTS, RANKS, rank)
        assert notes.shape[1] % 4 == 0
        written.append((notes, keys, _ranks(ids, slots, count)))
    (arrived, *_), (mine, *_) = written
    out, into, keys, order, counts = (
        t.cpu() for t in ops.follow_lines(arrived, mine, width, RANKS, rank)
    )
    lines = [line for _, keys_, ranks in written for line in zip(keys_, ranks)]  # noqa: B905
    here = stayed = 0
    for number, (key, ranks) in enumerate(lines):
        came, visits = number < len(arrived), sorted({r for r in ranks if r >= 0})
        lane = 2 * ranks[0] if ranks[0] >= 0 else 2 * rank + 1
        ends = lane == 2 * rank if came else ranks[0] < 0
        here, stayed = here + ends, stayed + (ends and not came)
        parts = [r + (0 if came else RANKS) for r in visits] if ends else []
        assert into[number].tolist() == parts + [-1] * (width - len(parts))
        assert torch.equal(keys[number], key)
        code = int(key[0]) << 32 | int(key[1])
        assert int(order[number]) == (code if ends else NOWHERE)
        if came:
            assert int(out[number]) == lane
    assert counts.tolist() == [here, stayed]
    assert 0 < stayed < here


def test_no_tokens_have_no_notes():
    ids = torch.empty(0, 2, dtype=torch.int64)
    slots, count = _tables(torch.Generator().manual_seed(0))
    notes = torch.ops.moetuner.follow_notes(ids, ids, slots, count, SLOTS, RANKS, 0)
    found = torch.ops.moetuner.follow_lines(notes, notes, 2, RANKS, 0)
    assert [len(t) for t in found] == [0, 0, 0, 0, 2]
    assert not found[-1].any()


def test_what_does_not_fit_is_refused():
    ops, rng = torch.ops.moetuner, torch.Generator().manual_seed(0)
    slots, count = _tables(rng)
    ids, keys = _tokens(rng, 4, 2)
    with pytest.raises(ValueError, match=r"follow_notes: keys must be \[4, 2\]"):
        ops.follow_notes(ids, keys[:3], slots, count, SLOTS, RANKS, 0)
    with pytest.raises(TypeError, match="follow_notes: keys must be"):
        ops.follow_notes(ids, keys.int(), slots, count, SLOTS, RANKS, 0)
    with pytest.raises(ValueError, match="rank must be one of the 5 of the group"):
        ops.follow_notes(ids, keys, slots, count, SLOTS, RANKS, 5)
    notes = ops.follow_notes(ids, keys, slots, count, SLOTS, RANKS, 0)
    with pytest.raises(ValueError, match=r"follow_lines: mine must be \[rows, 8\]"):
        ops.follow_lines(notes, notes[:, :4], 2, RANKS, 0)
    with pytest.raises(ValueError, match="num_destinations must be 1 to 5, got 6"):
        ops.follow_lines(notes, notes, 6, RANKS, 0)


def test_opcheck():
    ops, rng = torch.ops.moetuner, torch.Generator().manual_seed(0)
    ids, keys = _tokens(rng, 4, 2)
    given = (ids, keys, *_tables(rng), SLOTS, RANKS, 0)
    torch.library.opcheck(ops.follow_notes.default, given)
    notes = ops.follow_notes(*given)
    torch.library.opcheck(ops.follow_lines.default, (notes, notes, 2, RANKS, 0))


def test_rows_go_the_way_of_their_dispatch_again():
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD.group_name
    slots = torch.arange(4, dtype=torch.int32)[:, None]
    ids = torch.tensor([[1, 2], [-1, 4], [0, 3]])
    one = torch.ones(4, dtype=torch.int32)
    sent = dispatch(torch.ones(3, 8), ids, torch.ones(3, 2), slots, one, 4, group)
    rows = torch.arange(12.0).view(3, 4)
    handle = sent.handle
    way = (handle.recv_map, handle.send_maps, handle.all_splits, handle.groups)
    assert torch.equal(torch.ops.moetuner.resend(rows, *way), rows[[0, 2]])
    torch.library.opcheck(torch.ops.moetuner.resend.default, (rows, *way))
    dist.destroy_process_group()
