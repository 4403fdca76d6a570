"""A finished run's re-ranker, ready to score: `load_reranker(D).score(lists)`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dpo4rec_jax.config import Config, EncodeConfig, InputError
from dpo4rec_jax.data.prepared import Prepared
from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.stages.arms import Arm, arms_of, knowledge_of, lists_of, windows
from dpo4rec_jax.stages.encode import encoder_of
from dpo4rec_jax.weights import Encoder
from dpo4rec_jax.weights.reranker import load_members
from dpo4rec_jax.workspace import Workspace

BATCH = 512  # lists a call of the compiled program; the vectors of 2048 leave a CPU's cache

CandidateList = Mapping[str, Any]


def load_reranker(
    workdir: str | Path, *, arm: str | None = None, ensemble: bool = False
) -> LoadedReranker:
    """The re-ranker of a finished run, ready to score.

    `arm` defaults to that of the last round (`dpo4rec-{r}`, or `kar`). The seed that was best on
    the validation users scores, or with `ensemble` the mean over all seeds.

    Raises InputError where the workspace is not one or has no such arm.
    """
    workspace = Workspace(Path(workdir))
    config = workspace.config()
    round, found = _find_arm(config, workspace, arm)
    prepared = Prepared.load(workspace.stage_dir("prepare"), prompts=False)
    members = load_members(found.file(workspace, round))
    params_R = members.seed_params
    if not ensemble:
        best = _best_seed(found.file(workspace, round).with_suffix(".json"), members.seeds)
        params_R = members.slice(best, best + 1)
    trained = config.rank.model_copy(update={"ease": members.config.ease})
    lists = lists_of(prepared, knowledge_of(found, prepared), trained, config.seed)
    return LoadedReranker(
        config=members.config,
        params_R=jax.tree.map(jnp.asarray, params_R),
        user_id=prepared.user_id,
        item_id=prepared.item_id,
        attribute_IAM=prepared.attribute_IAM,
        user_UF=None if lists.user_UCF is None else np.asarray(lists.user_UCF[:, 0]),
        item_IF=None if lists.item_IF is None else np.asarray(lists.item_IF),
        windows=windows(prepared) if members.config.reads_windows else None,
        affinity_UI=None if lists.affinity_UI is None else np.asarray(lists.affinity_UI),
        encoder=partial(encoder_of, config, workspace),
        encode=config.encode,
    )


class LoadedReranker:
    """Scores candidate lists of known users and items, and of new ones that have been described.

    What the adaptors make of every user and item is held on the device; scoring a list is a lookup
    and one pass of the backbone.
    """

    def __init__(
        self,
        config: RerankerConfig,
        params_R: Any,
        user_id: Sequence[str],
        item_id: Sequence[str],
        attribute_IAM: np.ndarray,
        user_UF: np.ndarray | None,
        item_IF: np.ndarray | None,
        windows: tuple[np.ndarray, np.ndarray] | None,
        affinity_UI: np.ndarray | None,
        encoder: Any,
        encode: EncodeConfig,
    ):
        self.config = config
        self._params_R = params_R
        self._users = {id: index for index, id in enumerate(user_id)}
        self._items = {id: index for index, id in enumerate(item_id)}
        self._attribute_IAM = np.asarray(attribute_IAM)
        self._user_UF, self._item_IF, self._windows = user_UF, item_IF, windows
        self._affinity_UI = affinity_UI
        self._encoder, self._encode = encoder, encode
        self._adapt()

    def describe(
        self, users: Mapping[str, str] | None = None, items: Mapping[str, str] | None = None
    ) -> None:
        """Adds users and items by their texts, or gives known ones new texts.

        A new item has no attributes, the mean of the id embeddings and no affinity to what anyone
        liked; a new user no history.
        """
        users, items = dict(users or {}), dict(items or {})
        if (users and self._user_UF is not None) or (items and self._item_IF is not None):
            encoder: Encoder = self._encoder()
            if self._user_UF is not None:
                self._user_UF = self._added(encoder, self._users, self._user_UF, users)
            if self._item_IF is not None:
                self._item_IF = self._added(encoder, self._items, self._item_IF, items)
        for known, new in ((self._users, users), (self._items, items)):
            for id in new:
                known.setdefault(id, len(known))
        self._grow_items()
        self._grow_windows()
        self._grow_affinities()
        self._adapt()

    def score(self, lists: Iterable[CandidateList]) -> list[Float32[np.ndarray, " N"]]:
        """One array of scores a list `{"user": raw id, "items": [raw ids]}`, larger is better.

        Raises InputError for an unknown user or item, naming the list by its place from 1.
        """
        return list(self.stream(lists))

    def stream(
        self, lists: Iterable[CandidateList], source: str = "list "
    ) -> Iterator[Float32[np.ndarray, " N"]]:
        """`score`, a batch at a time; the next one is read while the device works."""
        numbered = enumerate(lists, 1)
        waiting = None
        while batch := list(itertools.islice(numbered, BATCH)):
            sent = self._send(batch, source)
            if waiting is not None:
                yield from _cut(*waiting)
            waiting = sent
        if waiting is not None:
            yield from _cut(*waiting)

    def _send(self, batch: list[tuple[int, CandidateList]], source: str):
        """Dispatches a batch; its scores are fetched later."""
        rows = [self._indices(one, f"{source}{number}") for number, one in batch]
        lengths = np.array([len(items) for _, items in rows])
        longest = max(int(lengths.max()), self.config.list_length)
        size = BATCH if len(rows) > 64 else 64  # a short input is not padded to a long one's size
        user_B = np.zeros(size, np.int32)
        item_BN = np.zeros((size, longest), np.int32)
        user_B[: len(rows)] = [user for user, _ in rows]
        mask_BN = np.arange(longest)[None] < np.pad(lengths, (0, size - len(rows)))[:, None]
        item_BN[mask_BN] = list(itertools.chain.from_iterable(items for _, items in rows))
        score_BN = _score(
            self.config,
            self._params_R,
            self._tables,
            jnp.asarray(user_B),
            jnp.asarray(item_BN),
            jnp.asarray(mask_BN),
        )
        return score_BN, lengths

    def _indices(self, one: CandidateList, where: str) -> tuple[int, list[int]]:
        user, items = one.get("user"), one.get("items")
        if not _is_id(user) or not isinstance(items, (list, tuple)) or not items:
            raise InputError(
                f'{where}: expected {{"user": raw id, "items": [raw ids]}}, got {one!r:.80}'
            )
        if self.config.backbone == "prm" and len(items) > self.config.list_length:
            raise InputError(
                f"{where}: {len(items)} candidates; prm learned positions up to "
                f"{self.config.list_length}: shorten the list or train with data.list_length"
            )
        user_index = self._users.get(str(user))
        if user_index is None and self._reads_users:
            raise InputError(f"{where}: unknown user {user!r:.80}; describe it by --texts")
        try:  # ids mostly come as text, and are many
            indices = [*map(self._items.__getitem__, items)]
        except (KeyError, TypeError):
            indices = [self._item_index(item, where) for item in items]
        if len(set(indices)) < len(indices):
            item = next(item for n, item in enumerate(items) if indices[n] in indices[:n])
            raise InputError(f"{where}: item {item!r:.80} stands twice; name each candidate once")
        return user_index or 0, indices

    @property
    def _reads_users(self) -> bool:
        config = self.config
        return bool(config.user_features) or config.reads_windows or config.ease is not None

    def _item_index(self, item: Any, where: str) -> int:
        if not _is_id(item):
            raise InputError(f"{where}: items: expected raw ids, got {item!r:.40}")
        if (index := self._items.get(str(item))) is None:
            raise InputError(f"{where}: unknown item {str(item)!r:.80}; describe it by --texts")
        return index

    def _added(
        self, encoder: Encoder, known: dict[str, int], vector_xF: np.ndarray, texts: dict[str, str]
    ) -> np.ndarray:
        """The vectors with those of the texts, in the place that each id has or will get."""
        if not texts:
            return vector_xF
        encoded = encoder.encode(
            list(texts.values()), max_tokens=self._encode.max_tokens, lines=self._encode.lines
        )
        new = [id for id in texts if id not in known]
        places = [known[id] if id in known else len(known) + new.index(id) for id in texts]
        grown = np.concatenate([vector_xF, np.zeros((len(new), vector_xF.shape[1]), np.float32)])
        grown[places] = encoded
        return grown

    def _grow_items(self) -> None:
        added = len(self._items) - self.config.num_items
        if added <= 0:
            return
        self.config = dataclasses.replace(self.config, num_items=len(self._items))
        unknown = np.full((added, *self._attribute_IAM.shape[1:]), -1, np.int32)
        self._attribute_IAM = np.concatenate([self._attribute_IAM, unknown])
        embedding_RIE = self._params_R["item_embed"]["embedding"]
        mean_R1E = embedding_RIE.mean(1, keepdims=True)
        grown = jnp.concatenate([embedding_RIE, jnp.repeat(mean_R1E, added, axis=1)], axis=1)
        self._params_R = {**self._params_R, "item_embed": {"embedding": grown}}

    def _grow_windows(self) -> None:
        if self._windows is None:
            return
        past_UH, rating_UH = self._windows
        added = ((0, len(self._users) - len(past_UH)), (0, 0))
        self._windows = np.pad(past_UH, added), np.pad(rating_UH, added, constant_values=-1)

    def _grow_affinities(self) -> None:
        if self._affinity_UI is not None:
            users, items = self._affinity_UI.shape
            added = (0, len(self._users) - users), (0, len(self._items) - items)
            self._affinity_UI = np.pad(self._affinity_UI, added)

    def _adapt(self) -> None:
        def each(adapt, vector_xF):
            if vector_xF is None or not self.config.adapts:
                return None
            return jax.lax.map(lambda p: adapt(self.config, p, vector_xF), self._params_R)

        vectors = _on_device(self._user_UF), _on_device(self._item_IF)
        self._tables = {
            "attributes": reranker.attribute_tables(self.config, jnp.asarray(self._attribute_IAM)),
            "windows": jax.tree.map(jnp.asarray, self._windows),
            "user": each(reranker.adapt_users, vectors[0]),
            "item": each(reranker.adapt_items, vectors[1]),
            "match": vectors if self.config.matches else None,
            "affinity": _on_device(self._affinity_UI),
        }


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int, np.integer)) and not isinstance(value, bool)


def _on_device(array: np.ndarray | None) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)


@partial(jax.jit, static_argnums=0)
def _score(config: RerankerConfig, params_R, tables, user_B, item_BN, mask_BN) -> jax.Array:
    """Mean over the members of the scores."""
    history = None
    if tables["windows"] is not None:
        past_BH, rating_BH = (window_UH[user_B] for window_UH in tables["windows"])
        history = reranker.History(past_BH, rating_BH)
    match = None
    if tables["match"] is not None:
        user_UF, item_IF = tables["match"]
        match = reranker.Match(user_UF[user_B], item_IF[item_BN])
    affinity_BN = None
    if tables["affinity"] is not None:
        affinity_BN = tables["affinity"][user_B[:, None], item_BN]

    def one(member):
        params, user_UO, item_IO = member
        user_BO = None if user_UO is None else user_UO[user_B]
        item_BNO = None if item_IO is None else item_IO[item_BN]
        knowledge = user_BO, item_BNO, history, match, affinity_BN
        return reranker.score(config, params, item_BN, mask_BN, tables["attributes"], *knowledge)

    return jax.lax.map(one, (params_R, tables["user"], tables["item"])).mean(0)


def _cut(score_BN: jax.Array, lengths: np.ndarray) -> Iterator[np.ndarray]:
    fetched = np.asarray(score_BN)
    return (fetched[row, :length] for row, length in enumerate(lengths))


def _find_arm(config: Config, workspace: Workspace, name: str | None) -> tuple[int, Arm]:
    known = []
    for round in reversed(range(config.rounds + 1)):
        for arm in arms_of(config, workspace, round):
            if not arm.file(workspace, round).exists():
                continue
            known.append(arm.name)
            if arm.name == name or (name is None and arm.name not in ("backbone", "kar-external")):
                return round, arm
    if not known:
        raise InputError(f"{workspace.path}: no re-ranker yet; run stage rank")
    raise InputError(f"--arm {name}: no such arm; there are {', '.join(known)}")


def _best_seed(path: Path, seeds: int) -> int:
    try:
        by_seed = json.loads(path.read_text(encoding="utf-8"))["validation_ndcg@5"]
        return int(np.argmax(np.array(by_seed, dtype=float).reshape(seeds)))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not the validation metrics of {seeds} seeds ({error}); run stage rank again, "
            "or score with --ensemble"
        ) from None
