"""The forward pass of a decoder in C++ on x86 CPUs with AVX512-BF16, faster still with AMX.

kernels/       the C++: packed linear layers, paged attention, the whole step
build.py       compiles them once for this machine
library.py     the C functions and structs through ctypes
structure.py   what a transformers model computes, layer by layer, or why it is not known here
weights.py     its weights in the kernels' layouts: bf16, int8, int4
runner.py      NativeRunner, which the engine uses
"""
