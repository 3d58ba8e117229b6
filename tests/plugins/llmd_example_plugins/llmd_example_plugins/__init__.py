"""An engine, a block store and a model index for llm-d."""
