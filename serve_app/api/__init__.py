"""OpenAI's HTTP interface over any Generator.

One request: app -> chat or completions -> wire (parse, bound) -> text (template, tokens) -> admission
(GenerationRequest) -> answer (events to text, stop strings) -> reply (JSON or SSE).

What differs from OpenAI, on purpose:
    one answer a request (n = 1); no tools, logprobs or formats: such fields are refused by name, not ignored
    `top_k`, `min_p`, `repetition_penalty` (over prompt and answer) and `llmd` are not OpenAI's (extra_body of the
        official client); llmd is {"nonce": <64 hex digits>, "assurance": "signed", "audited" or "exact", "priority": -4
        to 4, "cache_salt": <64 printable characters at most>, "deadline_ms": <1 to 86,400,000>}, each of them optional;
        the header X-LLMD-Assurance says the same as llmd.assurance
    `timeout` (seconds, 0.001 to 86,400; or llmd.deadline_ms, not both): counted from when the body is there, in the
        queue and over deaths too. What has not ended then is cancelled everywhere: 504, code deadline_exceeded, which
        clients of OpenAI's do not send again (x-should-retry: false); in a stream an event with that error, and its end
    a request with the header `Idempotency-Key` (1 to 255 printable characters, in quotes or not) goes on, or its answer
        is kept, for 30 s without its client. The same body under the same key then gets every token so far, the rest
        and the same receipt, through whichever door; `stream`, `timeout` and their like may differ. Another body under
        that key: 422; the connection that such a retry leaves behind, if it lives: 409. Keys are of the API key shown
    an answer carries `llmd: {"request_id", "receipt"}`, a stream on the chunk that has the finish_reason; whole answers
        also the header x-llmd-receipt, the receipt bundle's CID
    usage counts every token that was generated and signed, those of a stop string included
    chat without max_tokens may fill the context; completions then stop at 16 tokens, as OpenAI's do
"""
