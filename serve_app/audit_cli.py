"""`llmd audit`: what honest stages and draws err by, what becomes of one that is not honest, and how it comes back.

Exit codes: 0 done (demo: the cheat was found and nobody else blamed), 1 not so, 2 nothing could be measured.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.errors import InputError, LlmdError


def register(app: typer.Typer) -> None:
    """The commands are part of `app`, under `audit`."""
    audits = typer.Typer(no_args_is_help=True, help="Stages computed again by somebody else.")
    audits.command("calibrate")(calibrate)
    audits.command("demo")(demo)
    audits.command("readmit")(readmit)
    audits.command("proof")(proof)
    app.add_typer(audits, name="audit")


def calibrate(
    store: Annotated[Path, typer.Option("--store", help="Directory of blocks that holds the model.")],
    manifest: Annotated[str, typer.Option("--manifest", help="CID of the model.")],
    stages: Annotated[int, typer.Option("--stages", min=1, max=64)] = 2,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Honest requests to measure.")] = 100,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Answer tokens of each.")] = 40,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Requests that run side by side.")] = 8,
    dtype: Annotated[str, typer.Option("--dtype", help="What stages compute in.")] = "float32",
    replay_dtype: Annotated[str, typer.Option("--replay-dtype", help="What auditors compute in.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda, of stages.")] = "cpu",
    replay_device: Annotated[str, typer.Option("--replay-device", help="Of auditors; the running one's: cpu.")] = "cpu",
    engine: Annotated[str, typer.Option("--engine", help="Of the stages: auto, torch, cpu, gpu.")] = "auto",
    text: Annotated[Path | None, typer.Option("--text", help="To cut prompts from; default: Python's help.")] = None,
) -> None:
    """Measure honest stages and draws; put a calibration of each stage and a band of draws into the store."""
    _be_quiet()
    from serve_app.audit_demo import band_text, calibrated, choose_options, help_text
    from shard_tools.cid import Cid, Codec
    from shard_tools.fetch import load_manifest
    from shard_tools.store.directory import DirectoryStore

    try:
        if not store.expanduser().is_dir():
            raise InputError(f"{store} is no directory of blocks")
        blocks = DirectoryStore(store.expanduser())
        model = load_manifest(blocks, Cid.parse(manifest))
        prover, auditor = choose_options(dtype, device, engine), choose_options(replay_dtype, replay_device, "torch")
        try:
            prompts = help_text() if text is None else text.read_text()
        except (OSError, UnicodeError) as e:
            raise InputError(f"cannot read {text}: {e}") from e
        made, band = calibrated(blocks, model, prompts, stages, requests, tokens, at_once, prover, auditor)
        for calibration in made:
            cid = blocks.put(Codec.DAG_CBOR, calibration.encode())
            typer.echo(f"{cid}  layers [{calibration.start}, {calibration.stop})  {calibration.prover}")
            for t in calibration.tails:
                limit = t.limit(1e-6)
                typer.echo(f"  {t.tokens:>3} tokens: largest of {t.samples} {t.largest:.3e}, limit at 1e-6 {limit:.3e}")
        cid = blocks.put(Codec.DAG_CBOR, band.encode())
        typer.echo(f"{cid}  draws of {band.prover}\n  {band_text(band)}")
        typer.echo(
            f"For the config:\n  audit:\n    calibration: [{', '.join(str(c.cid) for c in made)}]\n    band: [{cid}]"
        )
    except LlmdError as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e


def demo(
    cheat: Annotated[
        str, typer.Option("--cheat", help="int8, fp8-kv, skip-layer, other-prompt; greedy, other-seed ...")
    ] = "int8",
    stage: Annotated[int, typer.Option("--stage", min=0, max=2, help="Which of three cheats.")] = 1,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Honest requests to calibrate by.")] = 40,
) -> None:
    """Let one of three stages of a real model cheat, and show how it is found: receipt, verdicts, quarantine, draws."""
    _be_quiet()
    from serve_app.audit_demo import run_demo

    try:
        raise typer.Exit(run_demo(cheat, stage, requests))
    except LlmdError as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e


def readmit(
    node: Annotated[str, typer.Argument(help="llmd-ed25519:..., as `llmd status` shows it.")],
    state_dir: Annotated[
        Path, typer.Option("--state-dir", help="identity.state_dir, where the Supervisor runs.")
    ] = Path("~/.llmd"),
) -> None:
    """Put a quarantined node on probation, once you have looked at it; the Supervisor sees it in a second or two."""
    from serve_app.audit.book import ask_to_readmit
    from shard_tools.signing import parse_key

    try:
        ask_to_readmit(state_dir.expanduser() / "audit", parse_key(node))
    except LlmdError as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e


def proof(
    file: Annotated[Path, typer.Argument(help="Of state_dir/audit/proofs or transit, or a client's llmd.evidence.")],
) -> None:
    """Check a proof that convicts a node: it needs nothing but the file, and no trust in whoever shows it."""
    from serve_app.receipts.equivocation import Equivocation
    from serve_app.receipts.evidence import shown_in, transit_proof
    from serve_app.receipts.misquote import MAX_MISQUOTE_BYTES, Misquote, decode_proof
    from serve_app.receipts.receipt import Receipt
    from serve_app.receipts.statement import StageStatement
    from shard_tools.signing import key_text

    try:
        with file.open("rb") as f:
            data = shown_in(f.read(2 * MAX_MISQUOTE_BYTES))
        transit = transit_proof(data)
        found = decode_proof(data) if transit is None else transit
        node = found.convicted()
    except OSError as e:
        typer.echo(f"llmd: cannot read {file}: {e.strerror}", err=True)
        raise typer.Exit(2) from e
    except LlmdError as e:
        typer.echo(f"llmd: {file} proves nothing: {e}", err=True)
        raise typer.Exit(1) from e
    if transit is not None:
        typer.echo(f"{key_text(node)} {transit.what}")
        return
    if isinstance(found, Misquote):
        receipt = Receipt.decode(found.receipt.payload)
        typer.echo(f"{key_text(node)}: {found.what}, of request {receipt.request_hash.hex()}")
        return
    assert isinstance(found, Equivocation)
    one, other = (StageStatement.decode(e.payload) for e in (found.first, found.second))
    typer.echo(f"{key_text(node)} signed two stories: statements number {one.seq} and {other.seq} of one session")
    for said in (one, other):
        typer.echo(f"  {said.seq}: request {said.request_hash.hex()}, stage {said.stage}, sent {said.out_root.hex()}")


def _be_quiet() -> None:
    """A pipeline that is closed behind its last answer says so as a failure, which it is where one serves."""
    logging.getLogger("serve_app.pipeline.head").setLevel(logging.CRITICAL)
