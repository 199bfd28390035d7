"""Rows of the cache and whose they are: samples join, read at their own pace, and leave.

A sample has a row for its prompt and, with guidance, a twin for the prompt with its condition dropped. Each different
prompt is read once: other rows get a copy, also those that join later.

Dimension key: B rows in use, W ids of a pass, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anygen.sampling.cache import Prompt
from anygen.sampling.engine import Engine
from tokenizers_mm.codes import IntArray

Owner = tuple[int, bool]
"""A sample, and whether this is its twin."""


class Rows:
    """Rows in use, and the hidden states after what they last read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.owners: list[Owner] = []
        self.row: dict[Owner, int] = {}
        self.hidden_BWD = torch.empty(0)
        self.cache = engine.new_cache(0, 1)
        self._capacity, self._uses = 0, Counter[bytes]()
        self._lengths: list[int] = []
        self._kept: dict[bytes, tuple[Prompt, Tensor]] = {}

    def expect(self, prompts: Iterable[IntArray], capacity: int) -> None:
        """What rows will ever want these prompts, at most `capacity` of them at once; a prompt wanted again is kept."""
        self._uses, self._capacity = Counter(prompt.tobytes() for prompt in prompts), capacity

    @torch.inference_mode()
    def join(self, prompts: Mapping[Owner, IntArray]) -> None:
        """Rows for these owners, each after its prompt."""
        owners = list(prompts)
        rows = self._new_rows(owners, [len(prompts[owner]) for owner in owners])
        of: dict[bytes, list[int]] = {}
        for owner, row in zip(owners, rows, strict=True):
            of.setdefault(prompts[owner].tobytes(), []).append(row)
        first = {key: prompts[self.owners[of[key][0]]] for key in of if key not in self._kept}
        hidden: dict[int, Tensor] = {}
        if first:
            read_BD = self.engine.prefill(list(first.values()), self.cache, [of[key][0] for key in first])
        for key, shared in of.items():
            if key in first:
                after_D = read_BD[list(first).index(key)]
                if shared[1:]:
                    self.cache.copy(shared[0], shared[1:])
            else:
                prompt, after_D = self._kept[key]
                self.cache.put(prompt, shared)
            hidden |= dict.fromkeys(shared, after_D)
            self._keep(key, shared, after_D)
        self._append_hidden(torch.stack([hidden[row] for row in rows]))

    def _new_rows(self, owners: Sequence[Owner], lengths: Sequence[int]) -> list[int]:
        needed = len(self.owners) + len(owners)
        self._reserve(max(needed, min(self._capacity, 2 * needed)), max([*self._lengths, *lengths]) + 1)
        rows = self.cache.append(len(owners))
        self.row |= dict(zip(owners, rows, strict=True))
        self.owners += owners
        self._lengths += lengths
        return rows

    def _reserve(self, num_rows: int, length: int) -> None:
        self.cache.reserve(num_rows, self.engine.room(length))

    def _keep(self, key: bytes, rows: Sequence[int], after_D: Tensor) -> None:
        """Keep a prompt as long as a row that has not joined will want it."""
        self._uses[key] -= len(rows)
        if self._uses[key] <= 0:
            self._kept.pop(key, None)
        elif key not in self._kept:
            self._kept[key] = (self.cache.take_out(rows[0]), after_D)

    def _append_hidden(self, new_BD: Tensor) -> None:
        if len(self.owners) == len(new_BD):
            self.hidden_BWD = new_BD[:, None]
            return
        new_BWD = new_BD.new_zeros(len(new_BD), *self.hidden_BWD.shape[1:])
        new_BWD[:, 0] = new_BD
        self.hidden_BWD = torch.cat([self.hidden_BWD, new_BWD])

    def confirm(self, index: int) -> None:
        """The first of a sample's guesses that is not confirmed yet was right: it stays in the cache."""
        for owner in ((index, False), (index, True)):
            if owner in self.row:
                self._lengths[self.row[owner]] += 1

    @torch.inference_mode()
    def leave(self, samples: Iterable[int]) -> None:
        """Give up the rows of these samples; the last rows take their places."""
        gone = set(samples)
        order = [row for row, (index, _) in enumerate(self.owners) if index not in gone]
        stay, movers = [row for row in order if row < len(order)], [row for row in order if row >= len(order)]
        holes = iter(movers)
        rows = [row if row in set(stay) else next(holes) for row in range(len(order))]
        self.cache.rearrange(rows)
        self.owners = [self.owners[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self.row = {owner: row for row, owner in enumerate(self.owners)}

    @torch.inference_mode()
    def read(self, new: Mapping[int, Sequence[int]], guesses: Mapping[int, Sequence[int]]) -> Tensor:
        """Read each sample's new ids and, after them, its guesses: hidden states after each, B x W x D.

        `hidden_BWD` then begins at the last new id. Guesses are taken back from the cache at the next call.
        """
        news = [new[index] for index, _ in self.owners]
        windows = [[*ids, *guesses[index]] for ids, (index, _) in zip(news, self.owners, strict=True)]
        width = max(map(len, windows))
        if self.hidden_BWD.shape[1] > 1:  # there were guesses
            self.cache.lengths_B = torch.tensor(self._lengths, device=self.engine.device)
        self._reserve(len(self.owners), max(self._lengths) + width)
        self._lengths = [length + len(ids) for length, ids in zip(self._lengths, news, strict=True)]
        if width == 1:
            ids_B = torch.tensor([ids[0] for ids in windows])
            self.hidden_BWD = self.engine.step(ids_B, self.cache)[:, None]
            return self.hidden_BWD
        counts_B = torch.tensor([len(window) for window in windows])
        ids_BW = torch.tensor([[*window, *[0] * (width - len(window))] for window in windows])
        hidden_BWD = self.engine.extend(ids_BW, self.cache, counts_B)
        most = 1 + max(map(len, guesses.values()))
        first_B1 = torch.tensor([[len(ids) - 1] for ids in news])
        offsets_BW = (first_B1 + torch.arange(most)).clamp(max=width - 1).to(hidden_BWD.device)
        self.hidden_BWD = hidden_BWD[torch.arange(len(windows), device=hidden_BWD.device)[:, None], offsets_BW]
        return hidden_BWD
