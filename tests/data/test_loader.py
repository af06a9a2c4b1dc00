"""The order of the data: the same for every number of ranks and any accumulation, and a function of the step alone."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORE_INDEX, Loader, document_ids, eval_batches
from data.permutation import permute
from data.shards import header, write_shard


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(sizes): shards of these many tokens; together they count 0, 1, 2, …, so a token says where it is."""

    def write(sizes: list[int]) -> list:
        folder, start = tmp_path_factory.mktemp("shards"), 0
        for index, size in enumerate(sizes):
            write_shard(folder / f"{index}.bin", np.arange(start, start + size))
            start += size
        return sorted(folder.iterdir())

    return write


def global_batch(loaders: list[Loader], step: int) -> np.ndarray:
    """The windows [batch_sequences, seq_len + 1] of a step, put together from all ranks' micro-batches."""
    rows = []
    for loader in loaders:
        for inputs, targets in loader.batch(step):
            assert inputs.shape == targets.shape == (loader.micro_batch, loader.seq_len)
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            rows.append(torch.cat([inputs, targets[:, -1:]], dim=1).numpy())
    return np.concatenate(rows)


def ranks(files, world_size: int, micro_batch: int | None = None, **keys) -> list[Loader]:
    return [Loader(files, rank=r, world_size=world_size, micro_batch=micro_batch, **keys) for r in range(world_size)]


def speedrun(sizes: list[int], batch_tokens: int):
    """The simple loader of modded-nanogpt's early records: yields the contiguous tokens of each global batch."""
    starts = np.cumsum([0, *sizes])
    while True:
        for start, size in zip(starts, sizes, strict=False):
            tokens, position = np.arange(start, start + size), 0
            while position + batch_tokens + 1 <= len(tokens):
                yield tokens[position : position + batch_tokens + 1]
                position += batch_tokens


SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 12 * 8)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(1, 8), st.integers(1, 4), st.sampled_from([1, None]))
def test_sequential_is_the_speedrun_s_order(make, sizes, seq_len, world_size, micro_batch):
    loaders = ranks(make(sizes), world_size, micro_batch, seq_len=seq_len, batch_sequences=12)
    expected = speedrun(sizes, 12 * seq_len)
    for step in range(12):
        run = next(expected)
        windows = [run[i * seq_len : (i + 1) * seq_len + 1] for i in range(12)]
        assert np.array_equal(global_batch(loaders, step), windows)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(1, 8), st.sampled_from(["sequential", "shuffled"]), st.integers(0, 2**40), st.data())
def test_ranks_accumulation_and_resuming_change_nothing(make, sizes, seq_len, order, seed, data):
    files = make(sizes)
    keys = {"seq_len": seq_len, "batch_sequences": 12, "order": order, "seed": seed}
    one = ranks(files, 1, **keys)
    reference = [global_batch(one, step) for step in range(6)]
    for world_size in (1, 2, 3, 4):
        micro_batch = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if (12 // world_size) % n == 0]))
        start = data.draw(st.integers(0, 5))
        resumed = ranks(files, world_size, micro_batch, **keys)
        for step in range(start, 6):
            assert np.array_equal(global_batch(resumed, step), reference[step])


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(1, 8), st.integers(0, 2**40))
def test_shuffled_gives_each_window_once_an_epoch(make, sizes, seq_len, seed):
    loader = Loader(make(sizes), seq_len=seq_len, batch_sequences=12, order="shuffled", seed=seed)
    starts = np.cumsum([0, *sizes])
    every = {int(s) + o for s, size in zip(starts, sizes, strict=False) for o in range(0, size - seq_len, seq_len)}
    assert loader.windows_per_epoch == len(every)
    steps = -(-3 * len(every) // 12)  # three epochs, the last batch runs into the fourth
    stream = [int(starts[shard]) + offset for step in range(steps) for shard, offset in loader.windows(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * len(every) : (epoch + 1) * len(every)]) == sorted(every)
    if len(every) > 30:
        assert stream[: len(every)] != stream[len(every) : 2 * len(every)], "each epoch has its own order"


def test_seed_decides_the_shuffle(make):
    files = make([4000])
    one, same, other = (
        Loader(files, seq_len=8, batch_sequences=12, order="shuffled", seed=seed).windows(3) for seed in (1, 1, 2)
    )
    assert one == same != other


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_permute_is_a_permutation(n, seed):
    assert sorted(permute(np.arange(n), n, seed)) == list(range(n))


def test_permute_looks_random():
    n = 100_000
    image = permute(np.arange(n), n, 7)
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 0.02
    assert abs(np.mean(np.diff(image) > 0) - 0.5) < 0.01
    fixed = np.sum(image == np.arange(n))
    assert fixed < 10, "a random permutation has one fixed point on average"
    assert np.mean(image == permute(np.arange(n), n, 8)) < 1e-3


def test_ten_billion_tokens_shuffle_in_little_memory(tmp_path):
    """100 shards of 100M tokens (sparse files), opened and read in shuffled order; allocations traced."""
    for i in range(100):
        with open(tmp_path / f"{i:03d}.bin", "wb") as file:
            file.write(header(10**8, np.dtype("<u2")))
            file.truncate(1024 + 2 * 10**8)
    tracemalloc.start()
    keys = {"seq_len": 1024, "batch_sequences": 512, "order": "shuffled", "seed": 1, "world_size": 64}
    loader = Loader(sorted(tmp_path.iterdir()), **keys)
    assert loader.windows_per_epoch == 100 * (10**8 // 1024)
    shards = {shard for step in (0, 5, 19_072, 40_000) for shard, _ in loader.windows(step)}
    loader.batch(19_072)  # straddles the first two epochs
    loader.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and len(shards) == 100


def test_the_next_step_is_read_in_the_background(make, monkeypatch):
    loader = Loader(make([4000]), seq_len=8, batch_sequences=4)
    read, done = loader._read, threading.Event()
    calls = []

    def spy(step):
        calls.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            done.set()
        return read(step)

    monkeypatch.setattr(loader, "_read", spy)
    loader.batch(0)
    assert done.wait(10), "step 1 was not read ahead"
    loader.batch(1)
    loader.batch(5)
    loader.close()
    assert [step for step, _ in calls][:3] == [0, 1, 2] and not any(main for _, main in calls)
    assert [step for step, _ in calls].count(1) == 1, "what was read ahead is used"


def test_less_than_a_batch_is_an_error(make, mistake):
    for order in ("sequential", "shuffled"):
        with mistake("32 tokens", "4 x 8", "train.batch_tokens", "prepare more data"):
            Loader(make([32]), seq_len=8, batch_sequences=4, order=order)
        assert Loader(make([33]), seq_len=8, batch_sequences=4, order=order).windows_per_epoch == 4
    with mistake("0 training shards"):
        Loader([], seq_len=8, batch_sequences=4)


def test_a_batch_that_does_not_divide_is_an_error(make, mistake):
    for world_size, micro_batch in [(5, None), (2, 4), (1, 7)]:
        with mistake("12 sequences", f"{world_size} ranks", str(micro_batch or 12 // world_size)):
            Loader(make([999]), seq_len=8, batch_sequences=12, world_size=world_size, micro_batch=micro_batch)
    with mistake("data.order=random", "sequential", "shuffled"):
        Loader(make([999]), seq_len=8, batch_sequences=12, order="random")


def test_a_token_outside_the_vocabulary_is_named(tmp_path, mistake):
    tokens = np.zeros(200, np.uint16)
    tokens[100] = 300
    write_shard(tmp_path / "odd.bin", tokens)
    loader = Loader([tmp_path / "odd.bin"], seq_len=8, batch_sequences=4, vocab_size=257)
    for step in (0, 1, 2):
        loader.batch(step)
    said = str(tmp_path / "odd.bin"), "300", "96", "not in the vocabulary of 257", "data.tokenizer"
    with mistake(*said):
        loader.batch(3)
    evaluation = eval_batches([tmp_path / "odd.bin"], seq_len=8, tokens=None, micro_batch=4, vocab_size=257)
    with mistake(*said):
        list(evaluation)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(lambda sizes: max(sizes) > 1),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.none() | st.integers(1, 1000),
)
def test_evaluation_scores_each_target_once_on_any_number_of_ranks(make, sizes, seq_len, micro, world_size, tokens):
    files, starts = make(sizes), np.cumsum([0, *sizes])
    each = [
        list(eval_batches(files, seq_len=seq_len, tokens=tokens, micro_batch=micro, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in each}) == 1, "a rank with fewer batches hangs the others"
    scored = []
    for inputs, targets in (batch for batches in each for batch in batches):
        assert inputs.shape == targets.shape == (micro, seq_len)
        counts = targets != IGNORE_INDEX
        assert torch.equal(inputs[counts] + 1, targets[counts])
        scored += targets[counts].tolist()
    targets = [t for s, size in zip(starts, sizes, strict=False) for t in range(int(s) + 1, int(s) + size)]
    assert scored == targets[:tokens]


def test_document_ids_count_document_starts():
    inputs = torch.tensor([[5, 9, 1, 9, 9, 2], [9, 1, 1, 1, 9, 1]])
    assert document_ids(inputs, 9).tolist() == [[0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 2, 2]]
