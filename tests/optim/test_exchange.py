"""The plan and the packing, for any shapes and world size, in one process."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import exchange
from optim.exchange import Exchange, ReplicatedTransfer, ShardedTransfer, Transfer
from optim.plan import MatrixSpec, Plan, assign_owners, shard_rows, worth_sharing
from optim.polar import polar_flops

GPT2_LAYER = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)


def wholes_of(transfer):
    """The gathered matrices, in tensors that are laid out by columns, as a rule may ask for."""
    wholes = {}
    for i in transfer.owned:
        rows, columns = transfer.plan.specs[i].shape
        wholes[i] = torch.full((columns, rows), torch.nan, dtype=transfer.comm_dtype).mT
        transfer.unpack_into(i, wholes[i])
    return wholes


def specs_of(shapes, flops=None):
    return [MatrixSpec(tuple(s), flops or float(s[0] * s[1]), (0, *s)) for s in shapes]


@given(rows=st.integers(1, 200), world_size=st.integers(1, 64))
def test_shard_rows_are_torch_chunks(rows, world_size):
    chunks = [len(c) for c in torch.arange(rows).chunk(world_size)]
    assert [shard_rows(rows, world_size, r) for r in range(world_size)] == chunks + [0] * (world_size - len(chunks))


@pytest.mark.parametrize("world_size", range(2, 13))
def test_owners_are_balanced(world_size):
    """GPT-2 124M with fused QKV, 48 matrices: within 5% of ideal wherever there are four a rank."""
    flops = [polar_flops(shape) for shape in GPT2_LAYER * 12]
    owners = assign_owners(flops, world_size)
    loads = [sum(f for f, o in zip(flops, owners, strict=True) if o == r) for r in range(world_size)]
    assert max(loads) <= 1.05 * sum(flops) / world_size
    assert sum(loads) == pytest.approx(sum(flops))


@given(flops=st.lists(st.floats(1, 100), min_size=1, max_size=20), world_size=st.integers(1, 6))
def test_owners_are_within_grahams_bound(flops, world_size):
    owners = assign_owners(flops, world_size)
    loads = [sum(f for f, o in zip(flops, owners, strict=True) if o == r) for r in range(world_size)]
    ideal = max(sum(flops) / world_size, max(flops))
    assert max(loads) <= (4 / 3) * 2 * ideal and set(owners) <= set(range(world_size))


@given(shapes=shapes, world_size=st.integers(1, 6), cap=st.integers(1, 200))
def test_buckets_hold_every_active_item_once_and_respect_the_cap(shapes, world_size, cap):
    plan = Plan(specs_of(shapes), world_size, cap)
    active = list(range(0, len(shapes), 2))
    buckets = plan.buckets(active)
    seen = [i for bucket in buckets for owned in bucket for i in owned]
    assert sorted(seen) == active
    for bucket in buckets:
        for rank, owned in enumerate(bucket):
            assert all(plan.owners[i] == rank for i in owned)
            assert len(owned) <= 1 or sum(shapes[i][0] * shapes[i][1] for i in owned) <= cap


def test_plans_with_other_buckets_have_other_digests():
    specs = [MatrixSpec((4, 4), 1.0, (), workspace=100.0)] * 12
    plans = [Plan(specs, 2, 32), Plan(specs, 2, 32, 100.0), Plan(specs, 2, 16), Plan(specs[:-1], 2, 32)]
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert [len(plan.buckets(range(12))) for plan in plans[:3]] == [3, 6, 6]


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_there_is_always_something_to_compute_while_matrices_travel(world_size):
    """However large buckets may be: three of them where owners have three matrices, and all owners busy in each."""
    buckets = Plan(specs_of(GPT2_LAYER * 12), world_size, 10**9).buckets(range(48))
    assert len(buckets) >= 3
    assert all(owned for bucket in buckets[:2] for owned in bucket)


class Mailbox:
    """Stands in for torch.distributed: ranks of one process post, and receive only when they wait.

    Until then their buffers hold NaN, so that reading one too early, or never waiting for it, cannot go unseen.
    """

    def __init__(self):
        self.posted, self.sent = {}, 0

    def all_to_all_single(self, output, input, output_splits, input_splits, group, async_op):
        assert async_op, "a transfer must not hold up the computation before it"
        posts = self.posted.setdefault("all_to_all", {})
        posts[group] = input.split(input_splits)
        self.sent += input.numel() - input_splits[group]
        output.fill_(float("nan"))

        def wait():
            for sender, slot in enumerate(output.split(output_splits)):
                slot.copy_(posts[sender][group])

        return SimpleNamespace(wait=wait)

    def broadcast(self, buffer, group, group_src, async_op):
        assert async_op
        posts = self.posted.setdefault(group_src, {})
        posts[group] = buffer
        if group != group_src:
            buffer.fill_(float("nan"))
        return SimpleNamespace(wait=lambda: buffer.copy_(posts[group_src]))

    def next_round(self):
        self.posted = {}


@settings(deadline=None, max_examples=60)
@given(
    shapes=shapes,
    world_size=st.integers(1, 6),
    cap=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_exchange_is_whole_and_its_inverse(shapes, world_size, cap, dtype):
    """Shards -> wholes -> (twice the matrix) -> shards, over any uneven shapes; bytes by the formula."""
    mail, real = Mailbox(), exchange.dist
    exchange.dist = mail
    try:
        plan = Plan(specs_of(shapes), world_size, cap)
        wholes = [torch.randn(s).to(dtype) for s in shapes]
        chunks = [list(w.chunk(world_size)) + [w[:0]] * (world_size - len(w.chunk(world_size))) for w in wholes]
        for bucket in plan.buckets(range(len(shapes))):
            ranks = [ShardedTransfer(plan, bucket, r, r, dtype) for r in range(world_size)]
            mail.next_round()
            for r, transfer in enumerate(ranks):
                transfer.start_gather({i: chunks[i][r] for i in transfer.order})
            for transfer in ranks:
                transfer.wait_gather()
            got = [wholes_of(t) for t in ranks]
            mail.next_round()
            for transfer, matrices in zip(ranks, got, strict=True):
                assert all(torch.equal(matrices[i], wholes[i]) for i in transfer.owned)
                transfer.start_scatter({i: 2 * w for i, w in matrices.items()})
            for r, transfer in enumerate(ranks):
                for i, update in transfer.wait_scatter().items():
                    assert torch.equal(update, 2 * chunks[i][r])
        assert mail.sent == sum(plan.elements_sent(r, range(len(shapes))) for r in range(world_size))
    finally:
        exchange.dist = real


def test_the_example_in_the_comments_of_the_transfers(monkeypatch):
    monkeypatch.setattr(exchange, "dist", Mailbox())
    specs = [
        MatrixSpec((5, 4), 10.0, (0, 5, 4)),
        MatrixSpec((6, 4), 6.0, (0, 6, 4)),
        MatrixSpec((1, 4), 4.0, (0, 1, 4)),
    ]
    plan = Plan(specs, 2, 10**9)
    transfer = ShardedTransfer(plan, [[0], [1, 2]], 1, 1, torch.float32)
    transfer.start_gather({0: torch.ones(2, 4), 1: torch.ones(3, 4), 2: torch.ones(0, 4)})
    assert plan.owners == [0, 1, 1] and (transfer.order, transfer.owned) == ([0, 1, 2], [1, 2])
    assert (transfer.to_owner, transfer.from_rank) == ([8, 12], [16, 12])
    assert (transfer.shards.shape, transfer.packed.shape) == ((20,), (28,))


@settings(deadline=None, max_examples=30)
@given(shapes=shapes, world_size=st.integers(1, 6), cap=st.integers(1, 150))
def test_replicated_results_reach_every_rank(shapes, world_size, cap):
    mail, real = Mailbox(), exchange.dist
    exchange.dist = mail
    try:
        plan = Plan(specs_of(shapes), world_size, cap)
        wholes = dict(enumerate(torch.randn(s) for s in shapes))
        for bucket in plan.buckets(range(len(shapes))):
            ranks = [ReplicatedTransfer(plan, bucket, r, r, torch.float32) for r in range(world_size)]
            mail.next_round()
            for transfer in ranks:
                transfer.start_gather({i: wholes[i] for i in transfer.order})
            for transfer in ranks:
                transfer.wait_gather()
                transfer.start_scatter({i: 2 * w for i, w in wholes_of(transfer).items()})
            for transfer in ranks:
                updates = transfer.wait_scatter()
                assert set(updates) == set(transfer.order)
                assert all(torch.equal(update, 2 * wholes[i]) for i, update in updates.items())
    finally:
        exchange.dist = real


@pytest.mark.parametrize("world_size", [2, 8, 32, 64])
def test_bytes_of_gpt2_124m(world_size):
    """2 S (W-1)/W^2 on average, of S elements: a rank sends the (W-1)/W of its S/W that others own to them, and of the
    S/W that it owns the (W-1)/W that others hold back."""
    plan = Plan(specs_of(GPT2_LAYER * 12), world_size, 10**9)
    elements = sum(m * n for m, n in GPT2_LAYER * 12)
    sent = [plan.elements_sent(r, range(48)) for r in range(world_size)]
    assert sum(sent) / world_size == pytest.approx(2 * elements * (world_size - 1) / world_size**2, rel=1e-9)


def test_a_single_process_moves_nothing():
    single = Exchange(specs_of([(2, 3), (4, 1)]), "single", None, torch.float32, 10**6)
    inputs = {0: torch.ones(2, 3), 1: torch.ones(4, 1)}
    got = {}

    def triple(transfer):
        return {i: 3 * whole for i, whole in wholes_of(transfer).items()}

    single.run([0, 1], lambda items: {i: inputs[i] for i in items}, triple, got.update)
    assert torch.equal(got[0], torch.full((2, 3), 3.0)) and torch.equal(got[1], torch.full((4, 1), 3.0))
    single.run([], dict.fromkeys, triple, got.update)


def test_a_buckets_transfer_runs_while_the_one_before_is_computed(monkeypatch):
    """Gathering b+1 begins before b is computed; scattering b is waited for after b+1 was computed."""
    events = []

    class Recorded(Transfer):
        def __init__(self, plan, bucket, *others):
            super().__init__(plan, bucket, *others)
            self.number = self.order[0]

        def start_gather(self, inputs):
            events.append(f"gather {self.number}")
            super().start_gather(inputs)

        def wait_gather(self):
            events.append(f"compute {self.number}")
            super().wait_gather()

        def wait_scatter(self):
            events.append(f"apply {self.number}")
            return super().wait_scatter()

    monkeypatch.setitem(Exchange.TRANSFERS, "single", Recorded)
    engine = Exchange(specs_of([(4, 4)] * 3), "single", None, torch.float32, 3 * 16 * 4)
    engine.run([0, 1, 2], lambda indices: {i: torch.ones(4, 4) for i in indices}, wholes_of, lambda updates: None)
    gathered, computed, applied = ([f"{what} {b}" for b in range(3)] for what in ("gather", "compute", "apply"))
    assert events == [*gathered[:2], computed[0], gathered[2], computed[1], applied[0], computed[2], *applied[1:]]


def test_replicas_share_the_work_where_it_costs_more_than_the_bytes():
    """By hand for Newton-Schulz of bfloat16 d x d matrices: 30 d^3 FLOPs on 2 d^2 bytes, 15 d a byte, against 8,000."""
    for size, shared in [(500, False), (570, True)]:
        specs = [MatrixSpec((size, size), 30.0 * size**3, (0, size, size))] * 8
        assert worth_sharing(specs, 2, 2, 2) is shared
        assert not worth_sharing(specs[:1], 2, 2, 2), "one matrix: nobody is spared anything"
