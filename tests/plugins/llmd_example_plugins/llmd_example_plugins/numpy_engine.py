"""A Llama in NumPy, one row at a time: slow, short, and the same bits whatever else is in the batch.

Each product is a matrix times one row, each row attends alone, so neither batch mates nor chunks can be felt.
Source: Touvron et al. 2023, "LLaMA"; rotation in the half-split form of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serve_app.engine.engine import Done, EngineProfile, StepOutput
from serve_app.engine.load import LoadOptions, read_config
from serve_app.engine.sampler import SequenceDraw, opened_draws
from serve_app.errors import ConfigError, PipelineError, ProtocolError
from serve_app.messages.step import DRAW_EACH, DRAW_NEXT, DRAWN_LAST, StepPlan
from shard_tools.fetch import read_tensor
from shard_tools.manifest import Manifest
from shard_tools.store.block_store import BlockStore

Floats = npt.NDArray[np.float32]


def load_numpy(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> NumpyEngine:
    """`engine: numpy`. Raises ConfigError for another model than a Llama in float32 on a CPU."""
    config = read_config(store, manifest)
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") != "llama" or rope.get("rope_type", "default") != "default":
        raise ConfigError("the NumPy engine computes plain Llama models only")
    if options.device != "cpu" or options.dtype != "float32" or manifest.dtype != "float32":
        raise ConfigError("the NumPy engine computes float32 shards on a CPU: set pipeline.dtype to float32")
    if options.kv_dtype != "auto":
        raise ConfigError("the NumPy engine keeps keys and values in float32 only: set pipeline.kv_dtype to auto")
    weights: dict[str, Floats] = {}
    for unit in manifest.units_of(start, stop):
        for ref in unit.tensors:
            place = manifest.tensor(ref)
            tensor = np.empty(place.shape, np.float32)
            read_tensor(store, place, tensor.reshape(-1).view(np.uint8).data)
            weights[ref.name] = tensor
    return NumpyEngine(weights, config, manifest, start, stop, options.page_size)


@dataclass(slots=True)
class _Sequence:
    """What is known of an open sequence."""

    draw: SequenceDraw | None  # None where nothing is drawn
    length: int
    guesses: int = 0  # of these rows, how many at their end may turn out void
    pages: list[int] = field(default_factory=list)
    last: int | None = None


class NumpyEngine:
    """Implements serve_app.engine.engine.Engine."""

    def __init__(
        self, weights: dict[str, Floats], config: dict, manifest: Manifest, start: int, stop: int, page_size: int
    ) -> None:
        self._weights, self._layers, self._page_size = weights, range(start, stop), page_size
        self._embeds, self._head = start == 0, stop == manifest.n_layers
        self._vocab, self._hidden = manifest.vocab_size, manifest.hidden_size
        self._eps = np.float32(config["rms_norm_eps"])
        self._heads, self._kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._dim = config.get("head_dim") or self._hidden // self._heads
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self._frequencies = theta ** -(np.arange(0, self._dim, 2, dtype=np.float64) / self._dim)
        self._open: dict[int, _Sequence] = {}
        self._n_pages = 0
        self.profile = EngineProfile(
            description=f"llmd_example_plugins numpy {np.__version__}, float32, cpu",
            device="cpu",
            dtype="float32",
            hidden_size=self._hidden,
            parameter_bytes=sum(w.nbytes for w in weights.values()),
            kv_page_bytes=max(1, len(self._layers)) * 2 * self._kv_heads * self._dim * 4 * page_size,
            memory_bytes=1 << 30,
        )

    def reserve(self, n_pages: int, max_sequences: int) -> None:
        self._n_pages = n_pages
        shape = (2, n_pages * self._page_size, self._kv_heads, self._dim)  # keys and values, by place in a page
        self._cache = {layer: np.zeros(shape, np.float32) for layer in self._layers}

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False

    def launch(self, plan: StepPlan, rows: memoryview) -> Done:
        self._check(plan)
        received = self._resolved(plan, rows)
        draws = opened_draws(plan, self._vocab) if self._head else {}
        for seq, cached in plan.opens[["seq", "cached"]].tolist():
            self._open[seq] = _Sequence(draws.get(seq), cached)
        out, tokens, at, page = [], [], 0, 0
        for seq, start, count, new_pages, sample in plan.spans.tolist():
            sequence = self._open[seq]
            sequence.length, sequence.guesses = start, count - 1 if sample == DRAW_EACH else 0
            sequence.pages += plan.pages[page : page + new_pages].tolist()
            page += new_pages
            for row in received[at : at + count]:
                entering = self._weights["model.embed_tokens.weight"][row] if self._embeds else row
                out.append(self._row(entering, sequence))
                if self._head and sample == DRAW_EACH:
                    tokens.append(self._drawn(out[-1], sequence))
            at += count
            if self._head and sample == DRAW_NEXT:
                tokens.append(self._drawn(out[-1], sequence))
            if sample == DRAW_EACH:
                sequence.last = None  # which of its tokens count is not known here
        for seq in plan.closes["seq"].tolist():
            self._open.pop(seq, None)
        hidden = np.stack(out) if out else np.zeros((0, self._hidden), np.float32)
        came, left = (rows.reshape(-1).view(np.uint8).data for rows in (received, hidden))
        return Done(StepOutput(came, left, tuple(tokens)))

    def _row(self, x: Floats, sequence: _Sequence) -> Floats:
        """One row through every layer; its keys and values are kept."""
        for layer in self._layers:
            name = f"model.layers.{layer}"
            x = x + self._attended(self._norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", layer, sequence)
            inner = self._norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self._product(inner, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self._product(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
        sequence.length += 1
        return x

    def _attended(self, x: Floats, name: str, layer: int, sequence: _Sequence) -> Floats:
        angle = sequence.length * self._frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

        def rotated(heads: Floats) -> Floats:
            a, b = np.split(heads, 2, axis=1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)

        q, k, v = (self._product(x, f"{name}.{part}_proj").reshape(-1, self._dim) for part in "qkv")
        positions = np.arange(sequence.length + 1)
        places = np.array(sequence.pages)[positions // self._page_size] * self._page_size + positions % self._page_size
        self._cache[layer][:, places[-1]] = rotated(k), v
        keys, values = self._cache[layer][:, places]  # [length, kv_heads, dim]
        q = rotated(q).reshape(self._kv_heads, -1, self._dim)
        scores = np.einsum("hgd,lhd->hgl", q, keys) * np.float32(self._dim**-0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._product(np.einsum("hgl,lhd->hgd", weights, values).reshape(-1), f"{name}.o_proj")

    def _norm(self, x: Floats, name: str) -> Floats:
        return x / np.sqrt((x * x).mean() + self._eps) * self._weights[f"{name}.weight"]

    def _product(self, x: Floats, name: str) -> Floats:
        bias = self._weights.get(f"{name}.bias")
        product = self._weights[f"{name}.weight"] @ x
        return product if bias is None else product + bias

    def _drawn(self, row: Floats, sequence: _Sequence) -> int:
        name = "lm_head.weight" if "lm_head.weight" in self._weights else "model.embed_tokens.weight"
        logits = self._weights[name] @ self._norm(row, "model.norm")
        if not np.isfinite(logits).all():
            raise PipelineError("the last stage computed logits that are not finite")
        assert sequence.draw is not None
        sequence.last = sequence.draw.token(logits, sequence.length)
        return sequence.last

    def _resolved(self, plan: StepPlan, rows: memoryview) -> npt.NDArray:
        """The rows, [rows, hidden] or ids with the token drawn last in place of DRAWN_LAST. Raises ProtocolError."""
        wanted = plan.rows * (4 if self._embeds else self._hidden * 4)
        if len(rows) != wanted:
            raise ProtocolError(f"{len(rows)} bytes where {wanted} are expected")
        if not self._embeds:
            return np.frombuffer(rows, "<f4").reshape(plan.rows, self._hidden)
        ids = np.frombuffer(rows, "<u4").copy()
        seqs = np.repeat(plan.spans["seq"], plan.spans["count"])
        for i in np.flatnonzero(ids == DRAWN_LAST).tolist() if self._head else ():
            sequence = self._open.get(int(seqs[i]))
            if sequence is None or sequence.last is None:
                raise ProtocolError(f"sequence {int(seqs[i])} has drawn no token yet")
            ids[i] = sequence.last
        if len(ids) and int(ids.max()) >= self._vocab:
            raise ProtocolError(f"token id {int(ids.max())} in a vocabulary of {self._vocab}")
        return ids

    def _check(self, plan: StepPlan) -> None:
        """Returns if the plan continues what is open. Raises ProtocolError."""
        opens = dict(plan.opens[["seq", "cached"]].tolist())
        seqs_opened = plan.opens["seq"].tolist()
        for seqs in (seqs_opened, plan.spans["seq"].tolist()):
            if len(set(seqs)) != len(seqs):
                raise ProtocolError("a step that opens or runs one sequence twice")
        for seq in opens:
            if seq in self._open:
                raise ProtocolError(f"sequence {seq} is open already")
            if opens[seq] % self._page_size or (opens[seq] and seq not in plan.spans["seq"]):
                raise ProtocolError(f"sequence {seq} opens behind {opens[seq]} rows that cannot be there")
        if len(plan.pages) and int(plan.pages.max()) >= self._n_pages:
            raise ProtocolError(f"page {int(plan.pages.max())} of {self._n_pages}")
        for seq, start, count, new_pages, sample in plan.spans.tolist():
            known = self._open.get(seq)
            if known is None and seq not in opens:
                raise ProtocolError(f"sequence {seq} is not open")
            length, pages = (known.length, len(known.pages)) if known else (opens[seq], 0)
            guesses = known.guesses if known else 0
            if not length - guesses <= start <= length or (pages + new_pages) * self._page_size < start + count:
                raise ProtocolError(f"sequence {seq} does not go on at {start} with pages for {count} rows")
            if sample == DRAW_EACH and known is not None and known.draw is not None and known.draw.counts:
                raise ProtocolError(f"guesses of sequence {seq}, which is penalised for what it draws")
