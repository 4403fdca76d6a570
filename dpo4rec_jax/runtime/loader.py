"""Feeds rows of [prompt | completions] to a training loop: shuffled, bucketed, resumable (grain).

The whole order is a function of (row lengths, seed): each epoch is a permutation cut into
optimizer steps; a step's rows are sorted by length and cut into microbatches of one fixed number of
rows, so that long rows pad only each other; and all microbatch shapes of the run are merged into a
few, since each one is a program to compile. An iterator's position is therefore one number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grain
import numpy as np

from dpo4rec_jax.config import InputError

Tokens = Sequence[int]

MOST_SHAPES_MERGED = 96  # merging is cubic in the number of different shapes


class Shape(NamedTuple):
    """Padded tokens of a microbatch's prompts and of each of its completions; `packed` those of all
    completions of a row together, where they are to stand behind each other, 0 where not."""

    prompt: int
    completion: int
    packed: int = 0


@dataclass(frozen=True)
class Rows:
    """Prompts, each with the same number C of completions (an absent one is empty), as token ids.

    `extra` holds one value (or array) a row under each name; batches carry them along.
    """

    prompts: Sequence[Tokens]
    completions: Sequence[Sequence[Tokens]]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @functools.cached_property
    def shapes(self) -> np.ndarray:
        """Tokens of each prompt, of its longest completion and of all of them, [rows, 3]."""
        lengths = [[len(completion) for completion in row] for row in self.completions]
        prompts = [len(prompt) for prompt in self.prompts]
        return np.stack([prompts, *([f(row) for row in lengths] for f in (max, sum))], axis=1)

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows of these indices, in their order."""
        return Rows(
            [self.prompts[i] for i in indices],
            [self.completions[i] for i in indices],
            {name: values[np.asarray(indices, int)] for name, values in self.extra.items()},
        )


@dataclass(frozen=True)
class Microbatch:
    rows: tuple[int, ...]
    shape: Shape
    ends_step: bool


def batch_of(rows: Rows, indices: Sequence[int], shape: Shape, size: int) -> dict[str, np.ndarray]:
    """Padded arrays of `size` rows; those beyond `indices` repeat the first and have mask False.

    prompt_BT, completion_BCT, prompt_length_B, completion_length_BC, mask_B, index_B and `extra`;
    packed_BW where the shape is packed (see `completion_token_logps`). Lengths, not pad ids, tell
    what is real: an end-of-text id may serve as padding elsewhere.
    """
    filled = np.asarray([*indices, *[indices[0]] * (size - len(indices))])
    num_completions = len(rows.completions[indices[0]])
    prompt_BT = np.zeros((size, shape.prompt), np.int32)
    completion_BCT = np.zeros((size, num_completions, shape.completion), np.int32)
    prompt_length_B = np.zeros(size, np.int32)
    completion_length_BC = np.zeros((size, num_completions), np.int32)
    packed_BW = np.full((size, shape.packed), -1, np.int32)
    for b, row in enumerate(filled):
        prompt = rows.prompts[row]
        prompt_BT[b, : len(prompt)] = prompt
        prompt_length_B[b] = len(prompt)
        start = 0
        for c, completion in enumerate(rows.completions[row]):
            completion_BCT[b, c, : len(completion)] = completion
            completion_length_BC[b, c] = len(completion)
            if shape.packed:
                first, stop = c * shape.completion, start + len(completion)
                packed_BW[b, start:stop] = first + np.arange(len(completion))
                start = stop
    return {
        "prompt_BT": prompt_BT,
        "completion_BCT": completion_BCT,
        "prompt_length_B": prompt_length_B,
        "completion_length_BC": completion_length_BC,
        "mask_B": np.arange(size) < len(indices),
        "index_B": filled.astype(np.int32),
        **({"packed_BW": packed_BW} if shape.packed else {}),
        **{name: values[filled] for name, values in rows.extra.items()},
    }


def in_order(
    rows: Rows, size: int, *, max_shapes: int, multiple: int = 16, pack: bool = False
) -> list[Microbatch]:
    """Every row once, longest first: for passes that only evaluate."""
    order = sorted(range(len(rows)), key=lambda i: (*(-rows.shapes[i]), i))
    return _shaped(rows, _cut(order, size), max_shapes, multiple, pack)


def shuffled(
    rows: Rows,
    *,
    seed: int,
    epochs: int,
    step_rows: int,
    microbatch_rows: int,
    max_shapes: int,
    multiple: int = 16,
    pack: bool = False,
) -> list[Microbatch]:
    """The microbatches of a whole training run. The last step of an epoch may hold fewer rows."""
    order: Any = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(epochs)
    microbatches: list[tuple[tuple[int, ...], bool]] = []
    for epoch in range(epochs):
        start = epoch * len(rows)
        of_epoch = [int(order[start + i]) for i in range(len(rows))]
        for step in range(0, len(rows), step_rows):
            of_step = sorted(
                of_epoch[step : step + step_rows], key=lambda i: (*(-rows.shapes[i]), i)
            )
            microbatches += _cut(of_step, microbatch_rows)
    return _shaped(rows, microbatches, max_shapes, multiple, pack)


class Feed(Iterator[tuple[Microbatch, dict[str, np.ndarray]]]):
    """Iterates over (microbatch, its arrays), read ahead in a thread; `position` is resumable."""

    def __init__(self, rows: Rows, microbatches: Sequence[Microbatch], size: int):
        self.microbatches = microbatches
        source = _Source(rows, microbatches, size)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __next__(self) -> tuple[Microbatch, dict[str, np.ndarray]]:
        number, arrays = next(self._iterator)
        return self.microbatches[number], arrays

    @property
    def position(self) -> dict[str, Any]:
        """JSON-able; what was read ahead but not yet returned does not count."""
        return {**self._iterator.get_state(), "microbatches": len(self.microbatches)}

    @position.setter
    def position(self, position: Mapping[str, Any]) -> None:
        state, cut = dict(position), len(self.microbatches)
        before = state.pop("microbatches", cut)
        if before != cut:
            raise InputError(
                f"the run was cut into {before} microbatches and is now cut into {cut}, so its "
                "place cannot be told; resume with the microbatch size and the mesh (data x fsdp) "
                "that it began with, or run without --resume"
            )
        self._iterator.set_state(state)


class _Source:
    """Random access to the arrays of a list of microbatches, as grain reads them."""

    def __init__(self, rows: Rows, microbatches: Sequence[Microbatch], size: int):
        self._rows, self._microbatches, self._size = rows, microbatches, size

    def __len__(self) -> int:
        return len(self._microbatches)

    def __getitem__(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        microbatch = self._microbatches[index]
        return index, batch_of(self._rows, microbatch.rows, microbatch.shape, self._size)


def _cut(order: Sequence[int], size: int) -> list[tuple[tuple[int, ...], bool]]:
    starts = range(0, len(order), size)
    return [(tuple(order[s : s + size]), s + size >= len(order)) for s in starts]


def _shaped(
    rows: Rows,
    microbatches: Sequence[tuple[tuple[int, ...], bool]],
    max_shapes: int,
    multiple: int,
    pack: bool,
) -> list[Microbatch]:
    """`pack` is for pairs: of many completions, the attention among those of a row would cost more
    than their padding. One completion has none but its own."""
    completions = len(rows.completions[0])
    exact = [rows.shapes[list(indices)].max(axis=0) for indices, _ in microbatches]
    if pack and completions == 2:
        longest = max(each[1] for each in exact)
        exact = [np.asarray((prompt, longest, both)) for prompt, _, both in exact]
    else:
        exact = [each[:2] for each in exact]
    rounded = [_rounded(each, multiple) for each in exact]
    while len(set(rounded)) > MOST_SHAPES_MERGED:
        multiple *= 2
        rounded = [_rounded(each, multiple) for each in exact]
    merged = merge_shapes(rounded, max_shapes, completions=completions)
    return [
        Microbatch(indices, merged[shape], ends_step)
        for (indices, ends_step), shape in zip(microbatches, rounded, strict=True)
    ]


def _rounded(lengths: np.ndarray, multiple: int) -> Shape:
    return Shape(*(max(1, -(-int(length) // multiple)) * multiple for length in lengths))


def merge_shapes(
    shapes: Sequence[Shape], max_shapes: int, *, completions: int = 1
) -> dict[Shape, Shape]:
    """Maps every shape to one of at most `max_shapes` that hold it, with little padding.

    Agglomerative: the two groups whose joint shape adds the fewest padded tokens become one, until
    few enough are left.
    """
    groups: dict[Shape, list[Shape]] = {shape: [shape] for shape in sorted(set(shapes))}
    uses = {shape: shapes.count(shape) for shape in groups}

    def tokens(shape: Shape) -> int:
        return shape.prompt + (shape.packed or completions * shape.completion)

    def joined(a: Shape, b: Shape) -> Shape:
        return Shape(*map(max, a, b))

    def added(a: Shape, b: Shape) -> int:
        both = tokens(joined(a, b))
        return uses[a] * (both - tokens(a)) + uses[b] * (both - tokens(b))

    while len(groups) > max_shapes:
        names = sorted(groups)
        pairs = ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
        first, second = min(pairs, key=lambda pair: added(*pair))
        joint = joined(first, second)
        members = groups.pop(first) + groups.pop(second)
        count = uses.pop(first) + uses.pop(second)
        groups[joint] = members + groups.get(joint, [])
        uses[joint] = count + uses.get(joint, 0)
    return {member: shape for shape, members in groups.items() for member in members}
