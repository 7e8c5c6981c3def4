"""Which rows are in which batch: a function of the seed, the same in every process and after every interruption."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Batches:
    """The batches of all epochs.

    Every step's batch is full: the last one of an epoch is filled up with rows of the epoch's beginning. It is
    therefore divided evenly, and a run gives the same on any number of processes.

    Args:
        size: the number of features.
        batch_size: features of a batch, over all processes.
        seed: of the order.
        lengths: the features' lengths, to put those of similar length together; `None` to leave the order to chance.
    """

    def __init__(self, size: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.steps_per_epoch = -(-size // batch_size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, step: int) -> list[int]:
        """The indices of the features of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._make(epoch))
        return self._epoch[1][place]

    def _make(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        order += [order[i % self.size] for i in range(-self.size % self.batch_size)]
        if self.lengths is None:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # Sort within stretches of the random order, then mix the batches: chance decides which rows meet. There are
        # four stretches at least: few rows, sorted as a whole, would make the same batches in every epoch.
        stretch = self.batch_size * min(50, max(1, self.steps_per_epoch // 4))
        batches = []
        for i in range(0, len(order), stretch):
            rows = sorted(order[i : i + stretch], key=self.lengths.__getitem__)
            batches += [rows[j : j + self.batch_size] for j in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def shares(batch: list[int], parts: int, process: int, processes: int) -> list[list[int]]:
    """What of a batch one process computes, in `parts` parts of equal size."""
    size = len(batch) // (processes * parts)
    return [batch[(part * processes + process) * size :][:size] for part in range(parts)]
