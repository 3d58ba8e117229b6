"""A person verifies a receipt with one command, down to the words, and learns in one line why one is refused."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from serve_app import receipt_cli
from serve_app.api.text import TextCodec
from serve_app.messages.request import Sampling
from serve_app.receipts.bundle import Bundle
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.fetch import read_file
from shard_tools.manifest import Manifest
from shard_tools.signing import key_text
from shard_tools.store.directory import DirectoryStore
from tests.serve_app.receipts.pipeline_of_three import NONCE, Cluster, a_request
from tests.tiny_models import write_tiny_checkpoint

APP = typer.Typer()
receipt_cli.register(APP)
APP.command("other")(lambda: None)  # one command alone would lose its name

MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]
ANSWER = "the sea is wide. STOP not this"
SPANS = ((0, 1), (1, 3), (3, 4))


@dataclass
class Desk:
    """A client's folder after one chat: what it sent, what it got, the operator's key, the model's blocks."""

    folder: Path
    manifest: Manifest
    cluster: Cluster
    bundle: Bundle
    sent: dict[str, Any]
    got: dict[str, Any]

    def save(self, **files: Any) -> None:
        for name, value in files.items():
            (self.folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())

    def verify(self, *options: str, receipt: str = "got", trust: str = "operator.pub") -> Result:
        key = trust if trust.startswith("llmd-ed25519:") else str(self.folder / trust)
        return CliRunner().invoke(APP, ["receipt", "verify", str(self.folder / receipt), "--trust", key, *options])

    def verify_text(self, receipt: str = "got", request: str = "sent") -> Result:
        return self.verify("--request", self.path(request), "--store", self.path("blocks"), receipt=receipt)

    def path(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    store = DirectoryStore(folder / "blocks")
    manifest = split(open_checkpoint(write_tiny_checkpoint(folder / "checkpoint")), store, "tiny")
    codec = TextCodec.from_files({file.path: read_file(store, file) for file in manifest.files})

    def shards_of(start: int, stop: int) -> Any:
        needed = sorted({ref.shard for unit in manifest.units_of(start, stop) for ref in unit.tensors})
        return tuple(manifest.shards[i].cid for i in needed)

    cluster = Cluster(spans=SPANS, now_s=int(time.time()) - 60, shards_of=shards_of)
    request = a_request(
        manifest=manifest.cid,
        prompt_ids=codec.encode_chat(MESSAGES),
        stop_ids=codec.stop_ids,
        sampling=Sampling(500_000, 0, 1_000_000, None),
        max_tokens=64,
    )
    out_ids = codec.encode(ANSWER, add_special_tokens=False)
    bundle = cluster.bundle(request, out_ids)
    sent = {
        "model": "tiny",
        "messages": MESSAGES,
        "temperature": 0.5,
        "max_tokens": 64,
        "stop": ["STOP"],
        "llmd": {"nonce": NONCE.hex()},
    }
    text = ANSWER[: ANSWER.index("STOP")]
    got = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "llmd": {"receipt": bundle.to_text()},
    }
    (folder / "operator.pub").write_text(key_text(cluster.operator.public) + "\n")
    desk = Desk(folder, manifest, cluster, bundle, sent, got)
    desk.save(sent=sent, got=got, raw=bundle.encode(), text=bundle.to_text().encode())
    return desk


def test_verifies_keys_tokens_layers_and_boundaries(desk: Desk) -> None:
    """With the operator's key alone; raw, as text, or inside the response; the key as file or text."""
    for receipt in ("got", "raw", "text"):
        result = desk.verify(receipt=receipt)
        assert result.exit_code == 0, result.output
        assert "verified: signatures, request, tokens, layers, boundaries" in result.output
        assert "not checked: that the nonce is yours (--nonce or --request); that the shards are" in result.output
        assert "Signed, not audited" in result.output
    assert desk.verify("--nonce", NONCE.hex(), trust=key_text(desk.cluster.operator.public)).exit_code == 0


def test_verifies_the_words_with_the_models_blocks(desk: Desk) -> None:
    """Template and tokens are run again; the answer is cut where the stop string begins."""
    result = desk.verify_text()
    assert result.exit_code == 0, result.output
    assert "shards, prompt text, nonce, answer text" in result.output
    assert "not checked" not in result.output
    desk.save(words=desk.got["choices"][0]["message"]["content"].encode())
    result = desk.verify(
        "--request", desk.path("sent"), "--response", desk.path("words"), "--store", desk.path("blocks"), receipt="raw"
    )
    assert result.exit_code == 0, result.output


def test_json_says_what_was_verified(desk: Desk) -> None:
    """One JSON object, for programs."""
    result = desk.verify("--json", "--store", desk.path("blocks"))
    said = json.loads(result.output)
    assert said["verified"] == ["signatures", "request", "tokens", "layers", "boundaries", "shards"]
    assert [(s["start"], s["stop"]) for s in said["stages"]] == list(SPANS)
    assert said["manifest"] == str(desk.manifest.cid)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.output.startswith("refused: ") and result.output.count("\n") == 1, result.output
    assert all(word in result.output for word in words), result.output


def test_other_words_are_refused(desk: Desk) -> None:
    """A prompt or an answer that is not the receipt's, by one word or one stop string."""
    other = json.loads(json.dumps(desk.sent))
    other["messages"][0]["content"] = "Tell me of the sky."
    edited = json.loads(json.dumps(desk.got))
    edited["choices"][0]["message"]["content"] = "the sea is dry. "
    desk.save(
        other=other,
        edited=edited,
        longer=desk.sent | {"messages": [{"role": "system", "content": "Be rude."}, *MESSAGES]},
        warmer=desk.sent | {"temperature": 0.6},
        unstopped=desk.sent | {"stop": []},
        anonymous={k: v for k, v in desk.sent.items() if k != "llmd"},
    )
    refused(desk.verify_text(request="other"), "opening.prompt_ids", "differ first at token")
    refused(desk.verify_text(request="longer"), "opening.prompt_ids")
    refused(desk.verify_text(request="warmer"), "receipt.sampling", "another request")
    refused(desk.verify_text(request="anonymous"), "opening.nonce")
    refused(desk.verify_text(request="unstopped"), "receipt.out_ids")
    refused(desk.verify_text(receipt="edited"), "receipt.out_ids", "'wide", "'dry")


def test_refusals_are_one_line_and_exit_1(desk: Desk) -> None:
    """A flipped byte, another operator, another nonce, shards of no such layers, layers left out."""
    data = bytearray(desk.bundle.encode())
    data[len(data) // 2] ^= 1
    (desk.folder / "other.pub").write_text(key_text(Cluster(seed=b"other").operator.public))
    desk.save(flipped=bytes(data), garbage=b"not a receipt")
    refused(desk.verify(receipt="flipped"))
    refused(desk.verify(receipt="garbage"), "base64url")
    refused(desk.verify(trust="other.pub"), "registry", "is not the operator")
    refused(desk.verify("--nonce", "00" * 32), "opening.nonce")
    refused(desk.verify("--max-age-s", "1"), "receipt.issued_ms")
    refused(desk.verify("--manifest", str(desk.manifest.shards[0].cid)), "receipt.manifest")
    for name, spans, shards_of, word in (
        ("swapped", SPANS, lambda start, stop: desk.cluster.shards_of(0, stop), "shards"),
        ("short", SPANS[:2], desk.cluster.shards_of, "the stages end at layer 3, the model has 4"),
    ):
        liars = replace(desk.cluster, spans=spans, shards_of=shards_of, nodes=[])
        lie = liars.bundle(a_request(manifest=desk.manifest.cid))
        desk.save(**{name: lie.encode()})
        assert desk.verify(receipt=name).exit_code == 0
        refused(desk.verify("--store", desk.path("blocks"), receipt=name), word)


def test_what_cannot_be_checked_exits_2(desk: Desk) -> None:
    """Missing files, a bad key, a store without the model, options that need each other."""
    for result, word in (
        (desk.verify(receipt="absent"), "cannot read"),
        (desk.verify(trust="got"), "public key"),
        (desk.verify("--nonce", "xyz"), "nonce"),
        (desk.verify("--request", desk.path("sent")), "say --store"),
        (desk.verify("--response", desk.path("got")), "needs --request"),
        (desk.verify("--store", desk.path("nowhere")), "no directory"),
        (desk.verify("--store", desk.path("checkpoint")), "is not in"),
    ):
        assert result.exit_code == 2, result.output
        assert result.output.startswith("cannot check: ") and word in result.output, result.output


def test_show_prints_without_judging(desk: Desk) -> None:
    """Works without a key, and says that nothing was verified."""
    result = CliRunner().invoke(APP, ["receipt", "show", desk.path("raw")])
    assert result.exit_code == 0 and "Not verified" in result.output, result.output
    result = CliRunner().invoke(APP, ["receipt", "show", desk.path("raw"), "--json"])
    assert json.loads(result.output)["verified"] == []
