"""A number for every training example, for penalties that remember something about each (its last prediction)."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, IterableDataset


__all__ = ["EXAMPLE_IDS", "with_example_ids"]

EXAMPLE_IDS = "example_ids"  # key of the batch; never handed to the model


class _Numbered(Dataset):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], EXAMPLE_IDS: index}


def with_example_ids(dataset: Any) -> Any:
    """`dataset` with its row numbers as `example_ids`; one that has such a column is left as it is.

    Raises:
        `ValueError`: for a stream, whose examples have no number.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"A penalty needs example ids, but {type(dataset).__name__} is a stream whose examples have no number. "
            "Use a dataset with a length."
        )
    if EXAMPLE_IDS in dataset[0]:
        return dataset
    if hasattr(dataset, "add_column"):  # of the datasets library
        return dataset.add_column(EXAMPLE_IDS, list(range(len(dataset))))
    return _Numbered(dataset)
