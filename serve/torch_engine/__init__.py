"""The embedded generative engine: continuous batching of any transformers causal decoder, on CPU or one GPU.

    engine.py      the Engine protocol: loading, checking, streaming
    scheduler.py   which tokens of which sequences run in the next step (pure Python)
    runner.py      one step: tokens in, logits out
    attention.py   attention over the cache's slots, plugged into transformers' modules
    linear.py      weights packed for oneDNN
    loop.py        the thread that steps, and its two doors to asyncio
    kv_cache.py    keys and values, one row per running sequence
    sampler.py     logits → tokens, each request by its own rules and its own generator
    text.py        tokens → text that may be shown: whole characters, no stop strings

Only `engine.TorchEngine` is used from outside, through the Engine protocol of serve/engine.py.
"""
