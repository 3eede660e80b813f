// The phases of a pass: embed, attend, project, mix, answer.
#include "step.h"

#include <algorithm>

#include "norm.h"
#include "tiles.h"

namespace tandem {
namespace {

// Up to here every thread normalises all rows for itself, which is faster than waiting for each other.
constexpr int REDUNDANT_ROWS = 4;

// Into how many pieces a phase is cut: more balance better, fewer stream memory longer.
constexpr int PIECES_PER_THREAD = 4, ATTENTION_PIECES_PER_THREAD = 16;

// Rows normalised or quantised at once.
constexpr int ROWS_PER_PIECE = 4;

constexpr int PHASES_PER_LAYER = 9;

int padded(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void Step::run(const Batch& batch, float* logits, float* hidden) {
    batch_ = &batch;
    logits_ = logits;
    hidden_ = hidden;
    plan(batch);
    last_lap_ = std::chrono::steady_clock::now();
    pool_.run(model_.layers * PHASES_PER_LAYER + 5, [this](int id) { forward(id); });
}

void Step::plan(const Batch& batch) {
    const Layer& layer = model_.layer[0];
    const int rows = batch.tokens;
    space_.hidden = padded(model_.hidden, 64);
    space_.residual.at_least(static_cast<size_t>(rows) * space_.hidden);
    space_.branch.at_least(static_cast<size_t>(rows) * space_.hidden);
    space_.queries.at_least(static_cast<size_t>(rows) * model_.heads * model_.head_width);
    space_.normed.reshape(rows, space_.hidden);
    space_.attended.reshape(rows, layer.out.k);
    space_.inner.reshape(rows, layer.down.k);
    space_.last.reshape(std::max(1, batch.wanted), space_.hidden);
    for (auto& own : space_.thread) {
        own.columns.at_least(static_cast<size_t>(ROW_CHUNK) * std::max<int>(PAIR, model_.head_width));
        own.expanded.at_least(static_cast<size_t>(std::max({layer.qkv.k, layer.out.k, layer.down.k})) * PAIR);
        if (rows <= REDUNDANT_ROWS) own.normed.reshape(rows, space_.hidden);
    }
    plan_attention(batch);
}

// Cut the step's queries into items of at most 16 rows that share one KV head of one sequence.
void Step::plan_attention(const Batch& batch) {
    items_.clear();
    const int group = model_.heads / model_.kv_heads, heads = std::min(group, TILE_ROWS), most = TILE_ROWS / heads;
    for (int s = 0; s < batch.sequences; ++s) {
        const int count = batch.query_start[s + 1] - batch.query_start[s];
        for (int kv = 0; kv < model_.kv_heads; ++kv)
            for (int h = 0; h < group; h += heads)
                for (int t = 0; t < count; t += most)
                    items_.push_back({s, kv, kv * group + h, std::min(heads, group - h), t, std::min(most, count - t)});
    }
}

void Step::forward(int id) {
    Walk walk{id};
    share(walk, batch_->tokens, ROWS_PER_PIECE, [&](int token) {
        embed(token);
        clear_new_block(token);
    });
    Norm pending{nullptr, nullptr};
    for (int i = 0; i < model_.layers; ++i) {
        const Layer& layer = model_.layer[i];
        const Activations& input = normalise(walk, pending, layer.before_attention, layer.qkv);
        lap(walk, &Profile::rest);
        project_heads(walk, layer, input);
        lap(walk, &Profile::linear);
        attend_all(walk, layer);
        lap(walk, &Profile::attention);
        const Activations& attended = fix(walk, space_.attended, layer.out);
        add_to_residual(walk, layer.out, attended, layer.after_attention.weight);
        lap(walk, &Profile::linear);
        const Activations& middle = normalise(walk, layer.after_attention, layer.before_mlp, layer.up);
        lap(walk, &Profile::rest);
        project_up(walk, layer, middle);
        const Activations& inner = fix(walk, space_.inner, layer.down);
        add_to_residual(walk, layer.down, inner, layer.after_mlp.weight);
        lap(walk, &Profile::linear);
        pending = layer.after_mlp;
    }
    share(walk, batch_->wanted, ROWS_PER_PIECE, [&](int r) {
        normalise_row(batch_->logits_at[r], pending, model_.final_norm, space_.last, r, model_.head);
    });
    if (batch_->hidden_wanted)
        share(walk, batch_->hidden_wanted, ROWS_PER_PIECE, [&](int r) {
            final_state(batch_->hidden_at[r], pending, hidden_ + static_cast<size_t>(r) * model_.hidden);
        });
    lap(walk, &Profile::rest);
    if (batch_->wanted) project_logits(walk);
    release_tiles();
    lap(walk, &Profile::linear);
}

// The next phase: work(0) to work(count - 1), `piece` of them at a time.
template <class Work>
void Step::share(Walk& walk, int count, int piece, Work work) {
    pool_.share(walk.phase++, (count + piece - 1) / piece, [&](int index) {
        for (int i = index * piece; i < std::min(count, (index + 1) * piece); ++i) work(i);
    });
}

void Step::lap(const Walk& walk, double Profile::*part) {
    if (walk.id) return;
    auto now = std::chrono::steady_clock::now();
    profile.*part += std::chrono::duration<double>(now - last_lap_).count();
    last_lap_ = now;
}

void Step::embed(int token) {
    const __m512 scale = _mm512_set1_ps(model_.embedding_scale);
    float* x = space_.residual.get() + static_cast<size_t>(token) * space_.hidden;
    const bf16* from = model_.embedding + static_cast<size_t>(batch_->token[token]) * model_.hidden;
    const bf16* place = model_.positions ? model_.positions + static_cast<size_t>(batch_->position[token]) * model_.hidden : nullptr;
    for (int i = 0; i < space_.hidden; i += 16) {
        __mmask16 m = lanes(model_.hidden - i);
        auto load = [&](const bf16* p) {
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p + i)), 16));
        };
        __m512 v = _mm512_mul_ps(load(from), scale);
        _mm512_storeu_ps(x + i, place ? _mm512_add_ps(v, load(place)) : v);
    }
}

// A block's unwritten values are multiplied by weights of zero, so they must be numbers: clear what an earlier owner left.
void Step::clear_new_block(int token) {
    if (batch_->slot[token] % BLOCK) return;
    const size_t size = static_cast<size_t>(model_.kv_heads) * model_.head_width * BLOCK;
    for (int i = 0; i < model_.layers; ++i)
        std::memset(model_.layer[i].values + batch_->slot[token] / BLOCK * size, 0, size * sizeof(bf16));
}

// Return the normalised residual stream; a pending branch is normalised and added to it first.
const Activations& Step::normalise(Walk& walk, const Norm& pending, const Norm& norm, const Linear& consumer) {
    const int rows = batch_->tokens;
    if (rows <= REDUNDANT_ROWS && !pending.weight) {
        OwnedActivations& own = space_.thread[walk.id].normed;
        for (int r = 0; r < rows; ++r) normalise_row(r, pending, norm, own, r, consumer);
        return own;
    }
    share(walk, rows, ROWS_PER_PIECE, [&](int r) { normalise_row(r, pending, norm, space_.normed, r, consumer); });
    return space_.normed;
}

void Step::normalise_row(int row, const Norm& pending, const Norm& norm, const Activations& to, int to_row, const Linear& consumer) {
    float* x = space_.residual.get() + static_cast<size_t>(row) * space_.hidden;
    const float* y = space_.branch.get() + static_cast<size_t>(row) * space_.hidden;
    if (pending.weight) add_normalised(x, y, model_.hidden, space_.hidden, pending, model_.norm_kind, model_.epsilon);
    tandem::normalise(x, model_.hidden, norm, model_.norm_kind, model_.epsilon, to, to_row);
    if (wants_fixed_point(consumer, to.rows)) quantise_row(to, to_row, consumer.kind == INT4);
}

// The normalised residual of a row as float32, not rounded to what the head reads.
void Step::final_state(int row, const Norm& pending, float* to) {
    float* x = space_.residual.get() + static_cast<size_t>(row) * space_.hidden;
    const float* y = space_.branch.get() + static_cast<size_t>(row) * space_.hidden;
    if (pending.weight) add_normalised(x, y, model_.hidden, space_.hidden, pending, model_.norm_kind, model_.epsilon);
    const RowScale scale = row_scale(x, model_.hidden, model_.norm_kind, model_.epsilon);
    for (int i = 0; i < model_.hidden; i += 16)
        _mm512_mask_storeu_ps(to + i, lanes(model_.hidden - i), normed(x, model_.final_norm, scale, i));
}

// Return the activations with their fixed-point form where the consumer reads it.
const Activations& Step::fix(Walk& walk, OwnedActivations& a, const Linear& consumer) {
    if (!wants_fixed_point(consumer, a.rows)) return a;
    if (a.rows <= REDUNDANT_ROWS) {
        OwnedActivations& own = space_.thread[walk.id].fixed;
        own.follow(a);
        for (int r = 0; r < a.rows; ++r) quantise_row(own, r, consumer.kind == INT4);
        return own;
    }
    share(walk, a.rows, ROWS_PER_PIECE, [&](int r) { quantise_row(a, r, consumer.kind == INT4); });
    return a;
}

// Compute all columns of a linear layer, `group` pairs at a time; finish(index of the group, first row, rows, values,
// stride) gets the products of up to ROW_CHUNK rows while they are in cache.
template <class Finish>
void Step::columns(Walk& walk, const Linear& w, const Activations& a, int group, Finish finish) {
    ThreadSpace& own = space_.thread[walk.id];
    const int groups = w.n / PAIR / group, chunks = (a.rows + ROW_CHUNK - 1) / ROW_CHUNK, stride = group * PAIR;
    const int piece = std::max(1, groups / (pool_.size() * PIECES_PER_THREAD));
    share(walk, groups * chunks, piece, [&](int i) {
        const int row = i / groups * ROW_CHUNK, rows = std::min(ROW_CHUNK, a.rows - row);
        for (int p = 0; p < group; ++p)
            multiply(w, a, row, rows, i % groups * group + p, own.columns.get() + p * PAIR, stride, own.expanded.get());
        finish(i % groups, row, rows, own.columns.get(), stride);
    });
}

void Step::project_heads(Walk& walk, const Layer& layer, const Activations& a) {
    const int group = model_.head_width / PAIR;
    columns(walk, layer.qkv, a, group, [&](int head, int row, int rows, float* values, int stride) {
        for (int r = 0; r < rows; ++r) finish_head(layer, head, row + r, values + static_cast<size_t>(r) * stride);
    });
}

// One head of one token: bias, norm and rotation, then to the step's queries or to the cache.
void Step::finish_head(const Layer& layer, int head, int row, float* x) {
    const int width = model_.head_width, heads = model_.heads, kv_heads = model_.kv_heads;
    const bool value = head >= heads + kv_heads;
    if (layer.qkv.bias)
        for (int i = 0; i < width; i += 16)
            _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(layer.qkv.bias + head * width + i)));
    const float* norm = head < heads ? layer.query_norm : layer.key_norm;
    if (norm && !value) normalise_head(x, model_.head_dim, norm, model_.epsilon);
    if (layer.cosine && !value) {
        const size_t at = static_cast<size_t>(batch_->position[row]) * (model_.rotary_dim / 2);
        rotate(x, layer.cosine + at, layer.sine + at, model_.rotary_dim / 2);
    }
    alignas(64) bf16 rounded[MOST_WIDTH];
    bf16* to = head < heads ? space_.queries.get() + (static_cast<size_t>(row) * heads + head) * width : rounded;
    for (int i = 0; i < width; i += 32) store_bf16(to + i, _mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + 16));
    const Cache cache{layer.keys, layer.values, kv_heads, width};
    if (value)
        write_value(cache, batch_->slot[row], head - heads - kv_heads, rounded);
    else if (head >= heads)
        write_key(cache, batch_->slot[row], head - heads, rounded);
}

void Step::attend_all(Walk& walk, const Layer& layer) {
    const int count = static_cast<int>(items_.size());
    const int piece = std::max(1, count / (pool_.size() * ATTENTION_PIECES_PER_THREAD));
    share(walk, count, piece, [&](int i) { attend_item(layer, items_[i], *space_.thread[walk.id].attention); });
}

void Step::attend_item(const Layer& layer, const Item& item, AttentionScratch& scratch) {
    const int width = model_.head_width, s = item.sequence;
    const int first = batch_->query_start[s], count = batch_->query_start[s + 1] - first;
    const int row = first + item.first_token;
    const bf16* query = space_.queries.get() + (static_cast<size_t>(row) * model_.heads + item.first_head) * width;
    const AttentionItem todo{query, model_.heads * width, item.tokens, item.heads, batch_->context[s] - count + item.first_token + 1,
                             batch_->blocks + static_cast<size_t>(s) * batch_->most_blocks, item.kv_head};
    const AttentionRule rule{model_.attention_scale, model_.attention_softcap, layer.window};
    attend({layer.keys, layer.values, model_.kv_heads, width}, todo, rule, scratch);
    for (int t = 0, r = 0; t < item.tokens; ++t)
        for (int h = 0; h < item.heads; ++h, ++r)
            for (int c = 0; c < width; c += 32)
                store_bf16(space_.attended.chunk(row + t, ((item.first_head + h) * width + c) / 32),
                           _mm512_load_ps(scratch.sums[r] + c), _mm512_load_ps(scratch.sums[r] + c + 16));
}

// The residual stream, or a branch that is normalised before it joins, takes the layer's output.
void Step::add_to_residual(Walk& walk, const Linear& w, const Activations& a, bool branch) {
    float* base = branch ? space_.branch.get() : space_.residual.get();
    columns(walk, w, a, 1, [&](int pair, int row, int rows, float* values, int stride) {
        for (int r = 0; r < rows; ++r)
            for (int h = 0; h < PAIR; h += 16) {
                const int column = pair * PAIR + h;
                float* x = base + static_cast<size_t>(row + r) * space_.hidden + column;
                __m512 v = _mm512_loadu_ps(values + static_cast<size_t>(r) * stride + h);
                if (w.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(w.bias + column));
                _mm512_storeu_ps(x, branch ? v : _mm512_add_ps(v, _mm512_loadu_ps(x)));
            }
    });
}

void Step::project_up(Walk& walk, const Layer& layer, const Activations& a) {
    const Activations& to = space_.inner;
    const float* bias = layer.up.bias;
    columns(walk, layer.up, a, 1, [&](int pair, int row, int rows, float* values, int stride) {
        for (int r = 0; r < rows; ++r) {
            const float* y = values + static_cast<size_t>(r) * stride;
            __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
            if (bias) {
                low = _mm512_add_ps(low, _mm512_loadu_ps(bias + pair * PAIR));
                high = _mm512_add_ps(high, _mm512_loadu_ps(bias + pair * PAIR + 16));
            }
            low = activate(model_.activation, low);
            if (model_.gated)
                store_bf16(to.chunk(row + r, pair / 2) + pair % 2 * 16, _mm512_mul_ps(low, high));
            else
                store_bf16(to.chunk(row + r, pair), low, activate(model_.activation, high));
        }
    });
}

void Step::project_logits(Walk& walk) {
    const int vocabulary = model_.vocabulary;
    columns(walk, model_.head, space_.last, 1, [&](int pair, int row, int rows, float* values, int stride) {
        for (int r = 0; r < rows; ++r)
            for (int h = 0; h < PAIR; h += 16) {
                const int column = pair * PAIR + h;
                __m512 v = _mm512_loadu_ps(values + static_cast<size_t>(r) * stride + h);
                if (model_.head.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(model_.head.bias + column));
                if (model_.logit_softcap > 0) {
                    __m512 cap = _mm512_set1_ps(model_.logit_softcap);
                    v = _mm512_mul_ps(tanh512(_mm512_div_ps(v, cap)), cap);
                }
                float* to = logits_ + static_cast<size_t>(row + r) * vocabulary + column;
                _mm512_mask_storeu_ps(to, lanes(vocabulary - column), v);
            }
    });
}

}  // namespace tandem
