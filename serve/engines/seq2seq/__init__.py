"""The embedded engine of encoder-decoders: continuous batching of decoder steps, on CPU or one GPU.

    load.py        how a replica loads it: what its entry in serve/engines/table.py names
    replica.py     one text of a request → the source's tokens; predictions (v2 infer) beside streams
    engine.py      the Engine protocol: checking, streaming
    loop.py        the thread that steps; its two doors to asyncio: serve/engines/step_thread.py
    group.py       what a step's logits mean for sequences whose rows decode together
    decoder.py     transformers' modules: a source read once, then a step for rows that are at different places
    rows.py        the keys and values of these rows: joined, taken, dropped
    beams.py       beam search of one sequence (pure Python)
    sequence.py    what a request needs beside its rows, and what becomes of its tokens
    check.py       rows beside others say what they say alone, or each sequence runs by itself
    positions_internals.py   positions row by row, where a model has them in a table

Sampling and text are those of the engine `torch`: sampler.py, completion.py and sequence_text.py there.
"""
