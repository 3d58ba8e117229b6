"""`llmd receipt verify` and `llmd receipt show`: a receipt, read by a person.

Exit codes: 0 verified, 1 refused (one line on stderr says why), 2 nothing could be checked (a file, key or model
is missing or unreadable).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve_app.errors import RequestError
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import CheckedReceipt, Expected, check, check_against_manifest
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.statement import StageStatement
from serve_app.transcript import (
    MAX_TRANSCRIPT_BYTES,
    find_receipt,
    parse_assurance,
    parse_nonce,
    parse_request,
    parse_response,
)
from shard_tools.cid import Cid
from shard_tools.errors import InputError, IntegrityError, LlmdError
from shard_tools.signing import PublicKey, key_text, parse_key, read_public_key

out = Console()
err = Console(stderr=True)

_File = Annotated[
    Path, typer.Argument(metavar="RECEIPT", help="Raw bytes, base64url text, or a saved response or stream.")
]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`, under `receipt`."""
    receipts = typer.Typer(no_args_is_help=True, help="What proves who answered, and with which model.")
    receipts.command("verify")(verify)
    receipts.command("show")(show)
    app.add_typer(receipts, name="receipt")


def verify(
    receipt: _File,
    trust: Annotated[list[str], typer.Option("--trust", help="Operator's public key, as text or a .pub file.")],
    request: Annotated[Path | None, typer.Option("--request", help="The JSON you sent; needs --store.")] = None,
    response: Annotated[Path | None, typer.Option("--response", help="What you got; needs --request.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of blocks that holds the model.")] = None,
    manifest: Annotated[str | None, typer.Option("--manifest", help="CID of the model you asked for.")] = None,
    nonce: Annotated[str | None, typer.Option("--nonce", help="The nonce you sent, 64 hex digits.")] = None,
    assurance: Annotated[
        str | None, typer.Option("--assurance", help="The level you asked for: signed, audited, exact.")
    ] = None,
    max_age_s: Annotated[int | None, typer.Option("--max-age-s", help="Refuse older receipts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a receipt offline: keys, request, tokens, layers and every boundary between stages."""

    def work() -> None:
        if request is not None and store is None:
            raise InputError("--request is read with the model's own tokenizer: say --store, where its blocks are")
        if response is not None and request is None:
            raise InputError("--response needs --request, whose stop strings end the text")
        now_s = int(time.time())
        data = _read(receipt)
        expected = Expected(
            manifest=None if manifest is None else Cid.parse(manifest),
            client_nonce=None if nonce is None else parse_nonce(nonce),
            assurance=None if assurance is None else parse_assurance(assurance),
            max_age_s=max_age_s,
        )
        operators = frozenset(_key(text) for text in trust)
        checked = check(find_receipt(data), operators, now_s=now_s, request=expected)
        done = ["signatures", "request", "tokens", "layers", "boundaries"] + ["nonce"] * (nonce is not None)
        if store is not None:
            done += _check_with_model(checked, store, request, response, data, now_s)
        if as_json:
            out.print_json(json.dumps(_as_json(checked) | {"verified": done}))
        else:
            _print_checked(checked, done)

    _exit_with(work)


def show(
    receipt: _File, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Print what a receipt says, without checking any of it."""

    def work() -> None:
        bundle = Bundle.decode(find_receipt(_read(receipt)))
        said = Receipt.decode(bundle.receipt.payload)
        statements = [StageStatement.decode(envelope.payload) for envelope in bundle.statements]
        fields = _receipt_json(said) | {"stages": [_statement_json(s) for s in statements], "verified": []}
        if as_json:
            out.print_json(json.dumps(fields))
            return
        table = Table("says", "", title="Not verified: `llmd receipt verify` does that", show_header=False)
        for name, value in fields.items():
            table.add_row(name, _plain(_cell(value)))
        out.print(table)

    _exit_with(work)


def _check_with_model(
    checked: CheckedReceipt, store: Path, request: Path | None, response: Path | None, data: bytes, now_s: int
) -> list[str]:
    # Imported here: a check of keys and roots alone needs neither tokenizers nor a store.
    from serve_app.api.text import TextCodec
    from serve_app.receipt_text import check_request, check_response
    from shard_tools.fetch import load_manifest, read_file
    from shard_tools.store.directory import DirectoryStore

    if not store.expanduser().is_dir():
        raise InputError(f"{store} is no directory of blocks")
    blocks = DirectoryStore(store.expanduser())
    model = load_manifest(blocks, checked.receipt.manifest)
    check_against_manifest(checked, model)
    done = ["shards"]
    if request is None:
        return done
    codec = TextCodec.from_files({file.path: read_file(blocks, file) for file in model.files})
    sent = parse_request(_read(request))
    check_request(checked, sent, codec, now_s)
    done.append("prompt text")
    if sent.nonce:
        done.append("nonce")
    got = parse_response(_read(response) if response is not None else data) if _has_text(response, data) else None
    if got is not None:
        check_response(checked, got, sent.stops, codec)
        done.append("answer text")
    return done


def _has_text(response: Path | None, data: bytes) -> bool:
    """Whether there is an answer to compare: in its own file, or around the receipt."""
    return response is not None or data.lstrip()[:1] == b"{" or data.lstrip().startswith(b"data:")


def _print_checked(checked: CheckedReceipt, done: list[str]) -> None:
    receipt = checked.receipt
    table = Table("checked", "found", title=f"Receipt {checked.cid}", title_justify="left")
    registry = f"version {checked.registry.version}, signed by {key_text(checked.operator)}"
    table.add_row("operator", registry)
    table.add_row("head", _plain(f"{checked.head_name}, {_time(receipt.issued_ms)}"))
    table.add_row("model", str(receipt.manifest))
    fresh = {
        "client-nonce": "a client's nonce is in it",
        "seed": "no nonce; the noise follows the request's seed",
        "none": "no freshness: nothing in it was chosen by the client alone",
    }
    table.add_row("level", receipt.assurance)
    table.add_row("request", f"{receipt.request_hash.hex()} ({fresh[receipt.freshness]})")
    table.add_row(
        "tokens", f"{receipt.n_prompt} of the prompt, {len(receipt.out_ids)} answered ({receipt.finish_reason})"
    )
    for s, name in zip(checked.statements, checked.stage_names, strict=True):
        table.add_row(
            f"stage {s.stage}",
            _plain(
                f"{name}: layers [{s.start}, {s.stop}) from {len(s.shards)} shards, {s.profile}\n"
                f"{s.n_rows} rows, in {s.in_root.hex()[:16]} out {s.out_root.hex()[:16]}"
            ),
        )
    out.print(table)
    out.print(f"verified: {', '.join(done)}", style="green", soft_wrap=True)
    left = {
        "nonce": "that the nonce is yours (--nonce or --request)",
        "shards": "that the shards are this model's (--store)",
        "prompt text": "the prompt's text (--store --request)",
        "answer text": "the answer's text (--store --request --response)",
    }
    if receipt.freshness != "client-nonce":
        del left["nonce"]
    missing = [text for name, text in left.items() if name not in done]
    if missing:
        out.print(f"not checked: {'; '.join(missing)}", style="yellow", soft_wrap=True)
    if receipt.assurance != "signed":
        out.print("To be audited: what was found stands at GET /v1/receipts/REQUEST_ID of the server.", style="dim")
    else:
        out.print("Signed, not audited: nobody computed this again.", style="dim")


def _as_json(checked: CheckedReceipt) -> dict[str, Any]:
    stages = [
        _statement_json(s) | {"name": name} for s, name in zip(checked.statements, checked.stage_names, strict=True)
    ]
    return _receipt_json(checked.receipt) | {
        "cid": str(checked.cid),
        "operator": key_text(checked.operator),
        "registry_version": checked.registry.version,
        "head": checked.head_name,
        "stages": stages,
    }


def _receipt_json(receipt: Receipt) -> dict[str, Any]:
    return {
        "manifest": str(receipt.manifest),
        "request_hash": receipt.request_hash.hex(),
        "attempt": receipt.attempt,
        "epoch": receipt.epoch,
        "freshness": receipt.freshness,
        "max_tokens": receipt.max_tokens,
        **asdict(receipt.sampling),
        "n_prompt": receipt.n_prompt,
        "out_ids": list(receipt.out_ids),
        "finish_reason": receipt.finish_reason,
        "issued_ms": receipt.issued_ms,
        "assurance": receipt.assurance,
    }


def _statement_json(s: StageStatement) -> dict[str, Any]:
    return {
        "stage": s.stage,
        "start": s.start,
        "stop": s.stop,
        "node": key_text(s.node),
        "shards": [str(cid) for cid in s.shards],
        "profile": s.profile,
        "n_rows": s.n_rows,
        "in_root": s.in_root.hex(),
        "out_root": s.out_root.hex(),
        "seq": s.seq,
        "ended_ms": s.ended_ms,
    }


def _exit_with(work: Callable[[], None]) -> None:
    try:
        work()
    except (IntegrityError, RequestError) as e:
        # RequestError: the model's template or tokenizer refuses what the client says it sent.
        err.print(_plain(f"refused: {e}"), style="red", soft_wrap=True)
        raise typer.Exit(1) from e
    except LlmdError as e:
        err.print(_plain(f"cannot check: {e}"), style="red", soft_wrap=True)
        raise typer.Exit(2) from e


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MAX_TRANSCRIPT_BYTES + 1)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e


def _key(text: str) -> PublicKey:
    return parse_key(text) if text.startswith("llmd-ed25519:") else read_public_key(Path(text))


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")


def _plain(text: str) -> Text:
    """Text as it is, whatever markup it looks like; a peer's control characters do not reach the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _cell(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 400 else f"{text[:397]}..."
