"""The features of each batch: a function of the seed, identical in every process and after every interruption."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import torch


class Batches:
    """The batches of all epochs.

    Every batch is full: the last batch of an epoch is filled with features from the start of that epoch's order. Each
    batch therefore splits evenly, and a run gives the same result on any number of processes.

    Args:
        size: the number of features.
        batch_size: features of a batch, over all processes.
        seed: the seed of the order.
        lengths: the length of each feature, to put features of similar length into one batch; `None` for a random
            order.
    """

    def __init__(self, size: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.size, self.batch_size, self.seed, self.lengths = size, batch_size, seed, lengths
        self.steps_per_epoch = -(-size // batch_size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, step: int) -> list[int]:
        """The indices of the features of a step; steps are counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._make(epoch))
        return self._epoch[1][place]

    def task_steps(self, steps: int) -> list[int]:
        """The number of steps of each task among the first `steps` steps; here there is one task."""
        return [steps]

    def epochs(self, steps: int) -> float:
        """The number of epochs in the first `steps` steps."""
        return steps / self.steps_per_epoch

    def _make(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
        order = torch.randperm(self.size, generator=generator, device="cpu").tolist()
        order += [order[i % self.size] for i in range(-self.size % self.batch_size)]
        if self.lengths is None:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # Sort within chunks of the random order, then shuffle the batches. At least four chunks: a small data set
        # sorted as a whole would give the same batches in every epoch.
        chunk = self.batch_size * min(50, max(1, self.steps_per_epoch // 4))
        batches = []
        for i in range(0, len(order), chunk):
            rows = sorted(order[i : i + chunk], key=self.lengths.__getitem__)
            batches += [rows[j : j + self.batch_size] for j in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator, device="cpu").tolist()]


class JointBatches:
    """Batches of several tasks: for each step a task is drawn, and the step gets that task's next batch.

    Like `Batches`, a function of the seed. The features of all tasks are numbered consecutively, task after task.

    Args:
        batches: the batches of each task.
        exponent: a task is drawn with a probability proportional to its number of features to this power.
        seed: the seed of the draws.
    """

    def __init__(self, batches: Sequence[Batches], exponent: float, seed: int) -> None:
        self.batches = batches
        self.steps_per_epoch = sum(each.steps_per_epoch for each in batches)
        self._offsets = [0, *itertools.accumulate(each.size for each in batches)][:-1]
        sizes = [float(each.size) ** exponent for each in batches]
        self._weights = torch.tensor(sizes, dtype=torch.float64, device="cpu")  # where the generator is
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[int] = []
        self._counts: Counter[int] = Counter()
        self._places: list[int] = []

    def _draw(self, steps: int) -> None:
        while len(self._drawn) < steps:
            task = int(torch.multinomial(self._weights, 1, generator=self._generator))
            self._drawn.append(task)
            self._places.append(self._counts[task])
            self._counts[task] += 1

    def task_steps(self, steps: int) -> list[int]:
        """The number of steps of each task among the first `steps` steps."""
        self._draw(steps)
        return [self._drawn[:steps].count(task) for task in range(len(self.batches))]

    def epochs(self, steps: int) -> float:
        """The number of epochs in the first `steps` steps."""
        return steps / self.steps_per_epoch

    def __getitem__(self, step: int) -> list[int]:
        """The indices of the features of a step, all of one task."""
        self._draw(step + 1)
        task = self._drawn[step]
        return [self._offsets[task] + i for i in self.batches[task][self._places[step]]]

    def split_index(self, features: list[int]) -> tuple[int, list[int]]:
        """The task of some features of one task, and their indices among that task's features."""
        task = bisect_right(self._offsets, features[0]) - 1
        return task, [i - self._offsets[task] for i in features]


def split_batch(batch: list[int], parts: int, process: int, processes: int) -> list[list[int]]:
    """The micro-batches of one process: `parts` parts of equal size."""
    size = len(batch) // (processes * parts)
    return [batch[(part * processes + process) * size :][:size] for part in range(parts)]
