// The C functions that serve/engines/torch/native/library.py calls.
#include <vector>

#include "step.h"
#include "tiles.h"

using namespace tandem;

namespace {

struct Engine {
    Engine(const Model& m, int threads) : model(m), layers(m.layer, m.layer + m.layers), pool(threads), step(model, pool) {
        model.layer = layers.data();
    }
    Model model;
    std::vector<Layer> layers;
    Pool pool;
    Step step;
};

void fill(OwnedActivations& a, const bf16* x, int rows, int columns, int k) {
    a.reshape(rows, k);
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < k; ++c) a.chunk(r, c / 32)[c % 32] = c < columns ? x[static_cast<size_t>(r) * columns + c] : bf16(0);
        quantise_row(a, r, true);
    }
}

}  // namespace

extern "C" {

// Sizes of the structs, so that a mismatch with ctypes is found before it corrupts memory.
void tandem_sizes(int* sizes) {
    sizes[0] = sizeof(Linear);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Model);
    sizes[3] = sizeof(Batch);
}

int tandem_tiles() { return tiles_allowed(); }

Engine* tandem_create(const Model* model, int threads) { return new Engine(*model, threads); }

void tandem_destroy(Engine* engine) { delete engine; }

void tandem_step(Engine* engine, const Batch* batch, float* logits, float* hidden) {
    engine->step.run(*batch, logits, hidden);
}

// Seconds of linear layers, attention and the rest since the last call.
void tandem_profile(Engine* engine, double* seconds) {
    Profile& p = engine->step.profile;
    seconds[0] = p.linear;
    seconds[1] = p.attention;
    seconds[2] = p.rest;
    p = Profile();
}

// One linear layer on [rows][columns] bf16, for tests and measurements: `repeat` times, out is [rows][n] float.
// With `vectors`, AMX is not used whatever the rows.
void tandem_linear(const Linear* w, const bf16* x, int rows, int columns, int vectors, float* out) {
    OwnedActivations a;
    fill(a, x, rows, columns, w->k);
    Buffer<float> values;
    Buffer<bf16> expanded;
    values.at_least(static_cast<size_t>(ROW_CHUNK) * PAIR);
    expanded.at_least(static_cast<size_t>(w->k) * PAIR);
    for (int row = 0; row < rows; row += ROW_CHUNK)
        for (int pair = 0; pair < w->n / PAIR; ++pair) {
            const int count = rows - row < ROW_CHUNK ? rows - row : ROW_CHUNK;
            if (vectors)
                multiply_in_vectors(*w, a, row, count, pair, values.get(), PAIR);
            else
                multiply(*w, a, row, count, pair, values.get(), PAIR, expanded.get());
            for (int r = 0; r < count; ++r)
                for (int c = 0; c < PAIR; ++c)
                    out[static_cast<size_t>(row + r) * w->n + pair * PAIR + c] =
                        values.get()[r * PAIR + c] + (w->bias ? w->bias[pair * PAIR + c] : 0.0f);
        }
    release_tiles();
}

}  // extern "C"
