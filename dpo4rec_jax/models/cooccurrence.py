"""Where item embeddings begin: which items are met together, before any training.

Items are counted as neighbours as often as two interactions would share a list wherever it were
cut; the positive pointwise mutual information of the counts is factorised by a truncated SVD (Levy
and Goldberg 2014, *Neural word embedding as implicit matrix factorization*; for items Barkan and
Koenigstein 2016, arXiv 1603.04259, by sampling). It takes seconds and spares the epochs in which a
re-ranker would find out as much from the lists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Float32, Int

SMOOTHING = 0.75  # exponent of a neighbour's frequency: rare ones look less telling than they would
DENSE = 512  # of so many items the whole spectrum is computed


def spectrum(
    user_P: Int[np.ndarray, " P"],
    item_P: Int[np.ndarray, " P"],
    num_items: int,
    size: int,
    list_size: int,
) -> Float32[np.ndarray, "I D"]:
    """At most `size` coordinates of each item, the weightiest first, of mean square 1 over all.

    Interactions come by user and in time order, up to `list_size` of them in a list. Items without
    neighbours are at 0; where no two interactions share a list there are no coordinates.
    """
    weight = _information(_neighbours(user_P, item_P, num_items, list_size))
    if not weight.nnz:
        return np.zeros((num_items, 0), np.float32)
    if num_items <= DENSE:
        left_ID, value_D, _ = np.linalg.svd(weight.toarray())
        left_ID, value_D = left_ID[:, :size], value_D[:size]
    else:
        start_I = np.random.default_rng(0).standard_normal(num_items)  # the same result every time
        found: Any = scipy.sparse.linalg.svds(weight, k=min(size, num_items - 1), v0=start_I)
        left_ID, value_D = found[0][:, ::-1], found[1][::-1]
    point_ID = left_ID * np.sqrt(value_D)
    return (point_ID / np.sqrt((point_ID**2).mean())).astype(np.float32)


def _neighbours(
    user_P: np.ndarray, item_P: np.ndarray, num_items: int, list_size: int
) -> scipy.sparse.csr_array:
    """Symmetric; two interactions d apart share a list for `list_size` - d of its cuts."""
    shape = num_items, num_items
    count = scipy.sparse.csr_array(shape, dtype=np.float64)
    for apart in range(1, list_size):
        same_P = user_P[apart:] == user_P[:-apart]
        pair = item_P[:-apart][same_P], item_P[apart:][same_P]
        cuts = np.full(len(pair[0]), float(list_size - apart))
        count = count + scipy.sparse.coo_array((cuts, pair), shape=shape).tocsr()
    return scipy.sparse.csr_array(count + count.T)


def _information(count: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Symmetric positive pointwise mutual information, nats."""
    pair = count.tocoo()
    row, column = pair.coords
    total_I = np.asarray(count.sum(axis=1)).reshape(-1)
    share_I = total_I**SMOOTHING
    share_I /= max(share_I.sum(), 1.0)  # without neighbours there is nothing to share
    information = np.maximum(np.log(pair.data / (total_I[row] * share_I[column])), 0.0)
    weight = scipy.sparse.csr_array((information, (row, column)), shape=count.shape)
    both = scipy.sparse.csr_array((weight + weight.T) / 2.0)
    both.eliminate_zeros()
    return both
