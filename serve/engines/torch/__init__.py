"""The embedded generative engine: continuous batching of any transformers causal decoder, on CPU or one GPU.

    torch_engine.py the Engine protocol: loading, checking, streaming
    startup.py     which runner, and how large a cache; check.py compares it with the model itself
    loop.py        the thread that steps; its two doors to asyncio: serve/engines/step_thread.py
    scheduler.py   which tokens of which sequences run in the next step (pure Python)
    blocks.py      which sequence holds which block of the cache, and prefixes kept for later (pure Python)
    batch.py       one step as a runner gets it: a flat row of tokens, and where each goes
    native/        the runner for x86 CPUs: a step in one C++ call
    runner.py      the runner for everything else: transformers' modules over
                   kv_cache.py, attention.py and linear.py
    recurrent.py   the runner for models that carry a state along a text (lstm)
    sampler.py     logits → tokens, each request by its own rules; serve/engines/grammar.py for JSON schemas
    logprobs.py    how likely the model found tokens
    pooling.py     hidden states → the vector of a text

Only load.py is called from outside (serve/engines/table.py names it); TorchEngine has the Engine protocol of
serve/engines/protocol.py, and serve/engines/text.py makes text of its tokens.
"""
