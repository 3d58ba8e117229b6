"""A model that cannot be served in stages is refused when it is loaded, with a reason, and never served wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from serve_app.engine.load import LoadOptions, load_engine
from serve_app.errors import ConfigError
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint, write_tokenizer


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (0, 1), (1, 2)])
def test_a_family_with_attention_of_its_own_is_refused(start: int, stop: int, tmp_path: Path) -> None:
    """BLOOM keeps no keys in our pages, so it would forget all but the rows of a step."""
    config = AutoConfig.for_model(
        "bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=512, max_position_embeddings=512
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    store = MemoryStore()
    manifest = split(open_checkpoint(tmp_path), store, "m")
    with pytest.raises(ConfigError, match=r"[bB]loom"):
        load_engine(store, manifest, start, stop, LoadOptions("cpu", "float32", 16, None))


def test_learned_positions_are_of_the_first_stage_only(tmp_path: Path) -> None:
    """GPT-2 adds them to whatever it is given; a later stage has no table of them and needs none."""
    store = MemoryStore()
    manifest = split(open_checkpoint(write_tiny_checkpoint(tmp_path, "gpt2", layers=2)), store, "m")
    first, last = (load_engine(store, manifest, i, i + 1, LoadOptions("cpu", "float32", 16, None)) for i in (0, 1))
    held = sum(tensor.size for unit in manifest.units[2:] for tensor in map(manifest.tensor, unit.tensors))
    assert last.profile.parameter_bytes == held < first.profile.parameter_bytes + held
