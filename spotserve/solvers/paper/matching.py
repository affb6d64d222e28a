"""Maximum-weight matching (Kuhn-Munkres, section 3.3): scipy's, and one that settles ties as the artifact does.

Both reach the same total. Which of several best matchings comes out decides who sends to whom, and so the artifact's
estimates of transfers: `kuhn_munkres` scans rows in order, columns in order, and takes for equal what differs by less
than one part in 100,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Weights = NDArray[np.float64]

NEAR = 1e-8
NEAR_SHARE = 1e-5
"""Equality of floats in the artifact: |a - b| <= NEAR + NEAR_SHARE * |b|."""


@dataclass(frozen=True, slots=True)
class Matching:
    """The column of each row, and what they weigh together."""

    columns: tuple[int, ...]
    total: float


Matcher = Callable[[Weights], Matching]
"""Matches every row with a column of its own; there must be at least as many columns as rows."""


def by_scipy(weights: Weights) -> Matching:
    """scipy's shortest augmenting paths."""
    assert weights.shape[0] <= weights.shape[1], "more rows than columns"
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return Matching(tuple(int(column) for column in columns), float(weights[rows, columns].sum()))


def kuhn_munkres(weights: Weights) -> Matching:
    """The Hungarian method with slacks, in the artifact's order of rows and columns."""
    assert weights.shape[0] <= weights.shape[1], "more rows than columns"
    labels = _Labels(weights.tolist())
    for _ in weights:
        labels.augment(labels.grow())
    columns = tuple(column for column in labels.column_of if column is not None)
    return Matching(columns, float(sum(weights[row, column] for row, column in enumerate(columns))))


@dataclass(slots=True)
class _Tree:
    """An alternating tree: its rows with their parents, the columns it reached, and each column's slack."""

    parent: dict[int, int | None]
    slack: list[float]
    nearest: list[int]
    reached: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Path:
    """An augmenting path: it ends at `row` and a free `column`."""

    row: int
    column: int
    tree: _Tree


class _Labels:
    """Row and column labels whose sums never fall below the weights, and the matching so far."""

    def __init__(self, weights: Sequence[Sequence[float]]) -> None:
        self._weights = weights
        self._row_label = [max(row) for row in weights]
        self._column_label = [0.0] * len(weights[0])
        self.column_of: list[int | None] = [None] * len(weights)
        self._row_of: list[int | None] = [None] * len(weights[0])

    def grow(self) -> _Path:
        """A tree from the first unmatched row until it meets a free column."""
        root = self.column_of.index(None)
        tree = _Tree({root: None}, self._slacks(root), [root] * len(self._column_label))
        to_scan = [root]
        while True:
            for row in to_scan:
                for column in self._tight(tree, row):
                    other = self._row_of[column]
                    if other is None:
                        return _Path(row, column, tree)
                    tree.reached.add(column)
                    to_scan.append(other)
                    self._join(tree, other, row)
            self._relax(tree)
            to_scan = []
            for column in self._slackless(tree):
                row, other = tree.nearest[column], self._row_of[column]
                if other is None:
                    return _Path(row, column, tree)
                tree.reached.add(column)
                if other not in tree.parent:
                    # The artifact scans the row that came near again, not the one that joins; its slacks cover that.
                    to_scan.append(row)
                    self._join(tree, other, row)

    def augment(self, path: _Path) -> None:
        """Swap matched and unmatched edges from the free column back to the root."""
        row: int | None = path.row
        column: int | None = path.column
        while row is not None and column is not None:
            self._row_of[column] = row
            self.column_of[row], column = column, self.column_of[row]
            row = path.tree.parent[row]

    def _slacks(self, row: int) -> list[float]:
        weights, label = self._weights[row], self._row_label[row]
        return [own + label - weight for own, weight in zip(self._column_label, weights, strict=True)]

    def _tight(self, tree: _Tree, row: int) -> list[int]:
        """Unreached columns whose edge to `row` has no slack to speak of."""
        label = self._row_label[row]
        return [
            column
            for column, weight in enumerate(self._weights[row])
            if column not in tree.reached and _near(weight, label + self._column_label[column])
        ]

    def _slackless(self, tree: _Tree) -> list[int]:
        return [column for column, slack in enumerate(tree.slack) if column not in tree.reached and _near(slack, 0.0)]

    def _join(self, tree: _Tree, row: int, parent: int) -> None:
        tree.parent[row] = parent
        for column, slack in enumerate(self._slacks(row)):
            if slack < tree.slack[column]:
                tree.slack[column], tree.nearest[column] = slack, row

    def _relax(self, tree: _Tree) -> None:
        """Lower the labels of the tree's rows until another column has no slack."""
        outside = [column for column in range(len(tree.slack)) if column not in tree.reached]
        step = min(tree.slack[column] for column in outside)
        for row in tree.parent:
            self._row_label[row] -= step
        for column in tree.reached:
            self._column_label[column] += step
        for column in outside:
            tree.slack[column] -= step


def _near(value: float, reference: float) -> bool:
    return abs(value - reference) <= NEAR + NEAR_SHARE * abs(reference)
