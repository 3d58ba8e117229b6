"""OpenAI's (and common servers') request fields that this server does not act on, and what is done about each.

A field that would change the answer is refused unless its value is the one that changes nothing: silently ignoring it
would hand back an answer to another question. A field that only labels or hints is accepted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.errors import RequestError
from shard_tools.choice import nearest

# Values that mean "as if absent". null always does.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # OpenAI chat and completions
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    # widespread extensions of other servers
    "min_tokens": (0,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
}

HARMLESS = frozenset(
    (
        "user",
        "metadata",
        "parallel_tool_calls",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
)


def acted_on(body: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The fields of `body` that this server acts on, nulls left out. Raises RequestError naming any other field."""
    known = frozenset(known)
    kept = {}
    for name, value in body.items():
        if value is None and (name in known or name in NEUTRAL or name in HARMLESS):
            continue
        if name in known:
            kept[name] = value
        elif name in NEUTRAL:
            if not any(value == neutral and type(value) in _like(neutral) for neutral in NEUTRAL[name]):
                raise RequestError(f"{name} is not supported here{_except(NEUTRAL[name])}.", name)
        elif name not in HARMLESS:
            raise RequestError(f"Unknown field {name[:100]!r}{nearest(name, known | HARMLESS)}.", name[:100])
    return kept


def _like(neutral: object) -> tuple[type, ...]:
    return (int, float) if type(neutral) is int else (type(neutral),)  # true equals 1 in Python, not in JSON


def _except(values: tuple[object, ...]) -> str:
    return f"; leave it out (or send {' or '.join(map(repr, values))})" if values else "; leave it out"
