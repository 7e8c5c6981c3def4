"""Where virtual tokens stand: the placeholders among token ids."""

from __future__ import annotations

import torch
from torch import Tensor


class Placeholders:
    """The token ids in whose places the virtual tokens of an adapter stand.

    Args:
        ids: One id for each virtual token; or a single one, whose k-th place in a row has the k-th virtual token.
        count: The number of virtual tokens.
    """

    def __init__(self, ids: tuple[int, ...], count: int):
        self.ids, self.count = ids, count
        # The ids in ascending order and the virtual token of each, by device. Not for consecutive ids.
        self._sorted: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def are_counted(self) -> bool:
        """Whether one id stands for several virtual tokens, so that its places in a row are counted."""
        return len(self.ids) < self.count

    def find(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Find the places of virtual tokens.

        Args:
            token_ids: `[..., tokens]`.

        Returns:
            Whether each place has a virtual token, and which one: both in the shape of `token_ids`.
        """
        first = self.ids[0]
        if self.are_counted:
            found = token_ids == first
            which = found.cumsum(-1) - 1
            return found & (which < self.count), which
        if self.ids == tuple(range(first, first + self.count)):
            which = token_ids - first
            return (which >= 0) & (which < self.count), which
        ascending, order = self._get_sorted(token_ids.device)
        place = torch.searchsorted(ascending, token_ids.long()).clamp(max=self.count - 1)
        return ascending[place] == token_ids, order[place]

    def contain(self, token_ids: Tensor) -> Tensor:
        """Whether token ids are placeholders, also those that are one too many in their row."""
        return token_ids == self.ids[0] if self.are_counted else self.find(token_ids)[0]

    def _get_sorted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._sorted:
            order = sorted(range(self.count), key=self.ids.__getitem__)
            ascending = [self.ids[index] for index in order]
            self._sorted[device] = torch.tensor(ascending, device=device), torch.tensor(order, device=device)
        return self._sorted[device]
