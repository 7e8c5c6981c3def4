"""Which rows are in which batch."""

import pytest

from prefix_adapter.training.batches import Batches, split_batch

SIZES = [(1, 4), (7, 3), (48, 8), (50, 8), (5, 50), (1000, 4)]


def epoch_of(batches: Batches, epoch: int) -> list[list[int]]:
    return [batches[step] for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_an_epoch_has_every_row_in_full_batches(size, batch_size, grouped):
    lengths = [1 + (7 * i) % 30 for i in range(size)] if grouped else None
    batches = Batches(size, batch_size, 3, lengths)
    for epoch in range(3):
        found = epoch_of(batches, epoch)
        assert all(len(batch) == batch_size for batch in found)
        rows = [i for batch in found for i in batch]
        assert set(rows) == set(range(size))
        # The last batch is filled up with further rows, spread over all of them.
        fewest = len(rows) // size
        assert all(fewest <= rows.count(i) <= fewest + 1 for i in range(size))
        assert len(rows) - size < batch_size


@pytest.mark.parametrize("grouped", [False, True])
def test_step_does_not_depend_on_earlier_reads(grouped):
    lengths = [1 + (7 * i) % 30 for i in range(50)] if grouped else None
    in_order = Batches(50, 8, 3, lengths)
    expected = [in_order[step] for step in range(21)]
    for step in (20, 3, 13, 4, 0):
        assert Batches(50, 8, 3, lengths)[step] == expected[step]
    backwards = Batches(50, 8, 3, lengths)
    assert [backwards[step] for step in reversed(range(21))] == expected[::-1]


@pytest.mark.parametrize("grouped", [False, True])
def test_epochs_and_seeds_differ(grouped):
    lengths = [1 + (7 * i) % 30 for i in range(50)] if grouped else None
    batches, other = Batches(50, 8, 3, lengths), Batches(50, 8, 4, lengths)
    assert epoch_of(batches, 0) != epoch_of(batches, 1)
    assert epoch_of(batches, 0) != epoch_of(other, 0)
    # The first epoch of the next seed differs from the second epoch of this one.
    assert epoch_of(batches, 1) != epoch_of(other, 0)


def test_grouping_saves_padding_and_mixes_the_batches():
    lengths = [1 + (37 * i) % 100 for i in range(400)]

    def padded(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch_of(batches, 0))

    grouped = Batches(400, 8, 0, lengths)
    assert padded(grouped) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < padded(Batches(400, 8, 0))
    longest = [max(lengths[i] for i in batch) for batch in epoch_of(grouped, 0)]
    assert longest != sorted(longest)
    # Rows of one batch are in different batches in the next epoch.
    first, second = ({frozenset(batch) for batch in epoch_of(grouped, epoch)} for epoch in (0, 1))
    assert not first & second


@pytest.mark.parametrize(("parts", "processes"), [(1, 1), (4, 1), (1, 4), (2, 3), (3, 4)])
def test_the_processes_share_a_batch(parts, processes):
    batch = list(range(100, 124))
    found = [split_batch(batch, parts, process, processes) for process in range(processes)]
    assert all(len(own) == parts for own in found)
    assert {len(part) for own in found for part in own} == {24 // (parts * processes)}
    # In the order in which they are computed: part by part, process by process.
    assert [i for part in range(parts) for own in found for i in own[part]] == batch
