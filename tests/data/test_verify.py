"""500 mutations of shards and manifest: each is found, by the file's name, or provably changes nothing."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from data import manifest
from data.build import build
from data.loader import Loader
from data.manifest import verify_folder
from data.shards import HEADER_BYTES, open_shard, write_shard
from data.split import open_split

MUTATIONS = 500


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A prepared folder of four shards, and its config."""
    from data.config import DataConfig

    source = tmp_path_factory.mktemp("whole")
    (source / "text.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows[:40]))
    config = DataConfig("local", str(source), dir=str(source / "out"), tokenizer="byte", shard_tokens=12_000)
    build(config)
    assert len(list(config.folder.glob("*.bin"))) == 4
    return config


def flip(folder: Path, file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def flip_header(folder: Path, file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(min(12, len(content)))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def append(folder: Path, file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 9)))


def delete(folder: Path, file: Path, rng: random.Random) -> None:
    file.unlink()


def swap_files(folder: Path, file: Path, rng: random.Random) -> None:
    other = rng.choice(sorted(set(folder.iterdir()) - {file}))
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def swap_blocks(folder: Path, file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    size = rng.randrange(1, len(content) // 4)
    a, b = rng.randrange(len(content) // 2 - size), rng.randrange(len(content) // 2, len(content) - size)
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    file.write_bytes(content)


def header_field(folder: Path, file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at, value = rng.randrange(4), rng.choice([0, -1, 1, 2, 7, 2**31 - 1, 20240520, 20240801, rng.randrange(2**31)])
    content[4 * at : 4 * at + 4] = np.int32(value).tobytes()
    file.write_bytes(content)


def big_token(folder: Path, file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = HEADER_BYTES + 2 * rng.randrange((len(content) - HEADER_BYTES) // 2) if file.suffix == ".bin" else 0
    content[at : at + 2] = np.uint16(rng.randrange(257, 2**16)).tobytes()
    file.write_bytes(content)


def unknown_file(folder: Path, file: Path, rng: random.Random) -> None:
    write_shard(folder / f"local_train_{rng.randrange(10, 99):06d}.bin", [1, 2, 3])


def edit_manifest(folder: Path, file: Path, rng: random.Random) -> None:
    content = json.loads((folder / manifest.NAME).read_text())
    place = rng.choice([content, content["tokens"], content["settings"], content["tokenizer"], content["shards"][0]])
    key = rng.choice(sorted(place))
    place[key] = rng.choice([None, 0, -1, "", [], {}, "../x.bin", 1e308, True])
    (folder / manifest.NAME).write_text(json.dumps(content))


def respace_manifest(folder: Path, file: Path, rng: random.Random) -> None:
    content = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps(content, indent=rng.randrange(8)))


KINDS = [flip, flip_header, truncate, append, delete, swap_files, swap_blocks, header_field, big_token, unknown_file,
         edit_manifest, respace_manifest]  # fmt: skip


def use(config) -> None:
    """What training does with the folder: open it and read every batch of an epoch, and both splits' tokens."""
    split = open_split(config)
    loader = Loader(split.train, seq_len=64, batch_sequences=8, vocab_size=split.vocab_size)
    for step in range(loader.windows_per_epoch // 8):
        for inputs, targets in loader.batch(step):
            assert int(inputs.min()) >= 0 and int(targets.max()) < 257
    loader.close()


def state(folder: Path) -> tuple:
    """The tokens of every shard and the meaning of the manifest."""
    tokens = {file.name: open_shard(file).tobytes() for file in sorted(folder.glob("*.bin"))}
    path = folder / manifest.NAME
    return tokens, json.loads(path.read_bytes()) if path.exists() else None


def test_an_untouched_folder_is_good(whole):
    assert verify_folder(whole.folder) == []
    use(whole)


def test_mutations(whole, tmp_path):
    rng, good, harmless = random.Random(0), state(whole.folder), 0
    config = type(whole)("local", whole.source, dir=str(tmp_path / "copy"), tokenizer="byte")
    for number in range(MUTATIONS):
        shutil.rmtree(config.folder, ignore_errors=True)
        shutil.copytree(whole.folder, config.folder)
        before = {file.name: file.read_bytes() for file in config.folder.iterdir()}
        kind = KINDS[number % len(KINDS)]
        kind(config.folder, rng.choice(sorted(config.folder.iterdir())), rng)
        after = {file.name: file.read_bytes() for file in config.folder.iterdir()}
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

        found = verify_folder(config.folder)
        if found:
            assert changed, f"{kind.__name__}: a problem though nothing changed"
            assert any(name in line for name in changed for line in found), f"{kind.__name__}: {found}"
        else:  # a deleted manifest leaves shards like the speedrun's own, which have none
            assert state(config.folder) == good or changed == {manifest.NAME} and kind is delete, (
                f"mutation {number}, {kind.__name__}, passed unseen"
            )
            harmless += 1
        try:
            use(config)
        except UserError as error:
            assert found, f"{kind.__name__}: an error in training but not for verify: {error}"
            assert "\n" not in str(error) and any(name in str(error) for name in [*changed, str(config.folder)])
    assert harmless < MUTATIONS / 5
    print(f"{MUTATIONS} mutations, {MUTATIONS - harmless} found by name, {harmless} that changed no token")


def test_training_finds_what_is_cheap_to_see(whole, tmp_path, mistake):
    """Headers, sizes, counts, missing and additional files, and an altered manifest; content is verify's."""
    for kind in (truncate, append, delete, unknown_file, flip_header):
        config = type(whole)("local", whole.source, dir=str(tmp_path / kind.__name__), tokenizer="byte")
        shutil.copytree(whole.folder, config.folder)
        kind(config.folder, config.folder / "local_train_000002.bin", random.Random(1))
        with mistake(str(config.folder / "local_train_")):
            open_split(config)


def test_without_a_manifest_headers_are_checked(whole, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(whole.folder, folder)
    (folder / manifest.NAME).unlink()
    assert verify_folder(folder) == []
    truncate(folder, folder / "local_val_000000.bin", random.Random(0))
    assert len(verify_folder(folder)) == 1 and "local_val_000000.bin" in verify_folder(folder)[0]
    assert "holds no shards" in verify_folder(tmp_path)[0] and "no such folder" in verify_folder(tmp_path / "none")[0]
