"""OpenAI's HTTP interface over any Generator.

One request: app -> chat or completions -> wire (parse, bound) -> text (template, tokens) -> admission
(GenerationRequest) -> answer (events to text, stop strings) -> reply (JSON or SSE).

What differs from OpenAI, on purpose:
    one answer a request (n = 1); no tools, logprobs or formats: such fields are refused by name, not ignored
    `top_k`, `min_p`, `repetition_penalty` (over prompt and answer) and `llmd` are not OpenAI's (extra_body of the
        official client); llmd is {"nonce": <64 hex digits>, "assurance": "signed" or "audited", "priority": -4 to 4,
        "cache_salt": <64 printable characters at most>}, each of them optional; X-LLMD-Assurance says the same
    an answer carries `llmd: {"request_id", "receipt"}`, a stream on the chunk that has the finish_reason; whole answers
        also the header x-llmd-receipt, the receipt bundle's CID
    usage counts every token that was generated and signed, those of a stop string included
    chat without max_tokens may fill the context; completions then stop at 16 tokens, as OpenAI's do
"""
