// A decoder as plain data: what serve/engines/torch/native/library.py mirrors with ctypes. Pointers are borrowed.
#pragma once
#include "linear.h"

namespace tandem {

enum NormKind { RMS_NORM = 0, LAYER_NORM = 1 };

// All vectors are float32 and padded with zeros to a multiple of 64.
struct Norm {
    const float* weight;
    const float* bias;  // layer norm only, or null
};

struct Layer {
    Linear qkv;   // heads of queries, then of keys, then of values, each head_width columns
    Linear out;
    Linear up;    // gated: 16 columns of the gate and 16 of the input, alternating
    Linear down;
    Norm before_attention, after_attention;  // "after": Gemma's norms on a branch's output; weight null if none
    Norm before_mlp, after_mlp;
    const float* query_norm;  // [head_dim] or null
    const float* key_norm;
    const float* cosine;      // [positions][rotary_dim / 2], null without rotary embedding
    const float* sine;
    bf16* keys;               // see attention.h
    bf16* values;
    int32_t window;           // 0: every earlier token is visible
    int32_t unused;
};

struct Model {
    int32_t layers, hidden, heads, kv_heads, head_dim, head_width, rotary_dim, vocabulary;
    int32_t norm_kind, activation, gated, unused;
    float epsilon, attention_scale, attention_softcap, logit_softcap, embedding_scale, unused_float;
    const bf16* embedding;  // [vocabulary][hidden]
    const bf16* positions;  // [positions][hidden] or null
    Norm final_norm;
    Linear head;
    const Layer* layer;
};

// One step, as in serve/engines/torch/batch.py.
struct Batch {
    int32_t tokens, sequences, most_blocks, wanted, hidden_wanted, unused;
    const int32_t *token, *position, *slot, *query_start, *context, *blocks, *logits_at, *hidden_at;
};

}  // namespace tandem
