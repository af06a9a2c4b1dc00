"""A source of one's own in one file: "12 squared is 144." for every number below `count`. docs/data.md has its YAML.

python scripts/prepare_data.py data=squares hydra.searchpath=[DIR]     # DIR/data/squares.yaml
python train.py experiment=smoke data=squares hydra.searchpath=[DIR]
"""

from collections.abc import Iterator

from data.documents import Batch, Cursor, Document, batch_documents


class Squares:
    name, revision = "squares", None

    def __init__(self, count: int = 10_000) -> None:
        self.count = count
        self.identity = f"count={count}"

    def batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        return batch_documents(self._documents(cursor["next"] if cursor else 0))

    def _documents(self, first: int) -> Iterator[tuple[Document, Cursor, float]]:
        for n in range(first, self.count):
            yield Document(f"{n} squared is {n * n}."), {"next": n + 1}, (n + 1) / self.count
