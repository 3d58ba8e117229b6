"""`llmd chat`, `complete`, `status` and `config check`. Exit codes: 0 done, 1 it could not be, 130 interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shard_tools.errors import LlmdError

if TYPE_CHECKING:
    from serve_app.client import Client

out = Console()
err = Console(stderr=True)

_Url = Annotated[
    str | None, typer.Option("--url", help="Where the server is; default: what LLMD_CONFIG, or the example, says.")
]
_KeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="File that holds the API key.")]
_Model = Annotated[str | None, typer.Option("--model", help="Default: the first that is served.")]
_Receipt = Annotated[
    Path | None,
    typer.Option("--receipt", help="Save the receipt here, request and response beside it."),
]
_MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of the answer.")]
_Temperature = Annotated[float | None, typer.Option("--temperature", min=0, max=2, help="0: always the likeliest.")]
_TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1)]
_TopK = Annotated[int | None, typer.Option("--top-k", min=0)]
_Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same answer.")]
_Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; up to four.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("chat")(chat)
    app.command("complete")(complete)
    app.command("status")(status)
    configs = typer.Typer(no_args_is_help=True, help="The config file.")
    configs.command("check")(config_check)
    configs.callback()(lambda: None)  # with it, one command still has to be named
    app.add_typer(configs, name="config")


def chat(
    question: Annotated[str | None, typer.Argument(help="Without one, a conversation begins.")] = None,
    url: _Url = None,
    api_key_file: _KeyFile = None,
    model: _Model = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions before the conversation.")] = None,
    receipt: _Receipt = None,
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    seed: _Seed = None,
    stop: _Stop = None,
) -> None:
    """Ask a question, or talk: the answer is printed as it comes."""

    def work() -> None:
        where = _where(url)
        client, name = _connect(where, api_key_file, model)
        options = _options(max_tokens, temperature, top_p, top_k, seed, stop)
        turns = [{"role": "system", "content": system}] if system else []
        if question is not None:
            _answer(client, "chat", {"model": name, "messages": [*turns, _user(question)], **options}, receipt)
            return
        err.print(f"{escape(name)} at {escape(where)}. An empty line or Ctrl-D ends, /new begins anew.", style="dim")
        opening = list(turns)
        while line := _line():
            if line == "/new":
                turns = list(opening)
                continue
            turns.append(_user(line))
            text = _answer(client, "chat", {"model": name, "messages": turns, **options}, receipt)
            turns.append({"role": "assistant", "content": text})

    _exit_with(work)


def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; no chat template is put around it.")],
    url: _Url = None,
    api_key_file: _KeyFile = None,
    model: _Model = None,
    receipt: _Receipt = None,
    max_tokens: _MaxTokens = 64,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    seed: _Seed = None,
    stop: _Stop = None,
) -> None:
    """Continue a text."""

    def work() -> None:
        client, name = _connect(_where(url), api_key_file, model)
        options = _options(max_tokens, temperature, top_p, top_k, seed, stop)
        _answer(client, "completion", {"model": name, "prompt": prompt, **options}, receipt)

    _exit_with(work)


def status(
    url: _Url = None,
    api_key_file: _KeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the cluster says of itself."""

    def work() -> None:
        from serve_app.client import Client

        state = Client(_where(url), api_key_file).state()
        if as_json:
            out.print_json(json.dumps(state))
        else:
            _print_state(state)

    _exit_with(work)


def config_check(
    file: Annotated[Path | None, typer.Argument(help="Default: LLMD_CONFIG, or the example.")] = None,
) -> None:
    """Read a config file as the server would, and say what it means or what is wrong."""

    def work() -> None:
        from serve_app.choices import check_choices
        from serve_app.config import config_path
        from serve_app.serve_file import load_config

        path = config_path(file)
        found = load_config(path)
        app = found.app
        check_choices(app)
        keys = "an API key is asked for" if app.ingress.api_keys else "no API key, this machine only"
        out.print(f"{escape(str(path))} is good.", style="green")
        store = app.model.store if isinstance(app.model.store, Path) else app.model.store.kind
        out.print(f"model {app.model.name} from {store}", markup=False, soft_wrap=True)
        out.print(
            f"{app.pipeline.stages} stages on {app.pipeline.device}, placed {app.pipeline.placement}", markup=False
        )
        out.print(f"{found.url}/v1 by {app.ingress.proxy}; {keys}", markup=False, soft_wrap=True)

    _exit_with(work)


def _where(url: str | None) -> str:
    from serve_app.config import config_path  # pydantic: --help need not wait for it
    from serve_app.serve_file import load_config

    return url or load_config(config_path(None)).url


def _connect(url: str, api_key_file: Path | None, model: str | None) -> tuple[Client, str]:
    from serve_app.client import Client  # imported here: openai takes a second, which --help need not wait

    client = Client(url, api_key_file)
    return client, model or client.first_model()


def _answer(client: Client, kind: Literal["chat", "completion"], body: dict[str, Any], receipt: Path | None) -> str:
    """Print the answer as it comes, keep its receipt if asked to; returns the text."""
    from serve_app.client import Conversation, fresh_nonce

    said = Conversation({})
    for piece in client.ask(kind, {**body, "llmd": fresh_nonce()}, said):
        sys.stdout.write(_shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    if receipt is not None:
        said.save(receipt)
        err.print(
            f"Receipt in {receipt}. Check it: llmd receipt verify {receipt} --trust OPERATOR.pub "
            f"[--store DIR --request {receipt}.request.json --response {receipt}.response.json]",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
    return said.text


def _shown(text: str) -> str:
    """On a terminal, without control characters: an answer must not move the cursor or rename the window."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    values = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _print_state(state: dict[str, Any], name: str = "") -> None:
    """Single facts as one table; a list of things, such as stages, as a table with a row for each, under it."""
    facts = Table(show_header=False, title=escape(name), title_justify="left")
    below: list[tuple[str, list[dict[str, Any]]]] = []
    for key, value in state.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            below.append((key, value))
        elif isinstance(value, dict):
            below.append((key, [value]))
        else:
            facts.add_row(escape(key), _cell(value))
    if facts.row_count:
        out.print(facts)
    for key, items in below:
        if isinstance(state[key], dict):
            _print_state(items[0], key)
        elif any(
            isinstance(value, list) and value and isinstance(value[0], dict) for i in items for value in i.values()
        ):
            for i, item in enumerate(items):
                _print_state(item, f"{key} {i}")
        else:
            _print_items(key, items)


def _print_items(name: str, items: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for item in items for key in item))
    table = Table(*map(escape, columns), title=escape(name), title_justify="left")
    for item in items:
        table.add_row(*(_cell(item.get(column)) for column in columns))
    out.print(table)


def _cell(value: object) -> str:
    return escape(value if isinstance(value, str) else "-" if value is None else json.dumps(value))


def _exit_with(work: Callable[[], None]) -> None:
    try:
        work()
    except LlmdError as e:
        err.print(str(e), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from e
    except KeyboardInterrupt as e:  # leaving the stream cancels the request on the server
        raise typer.Exit(130) from e
