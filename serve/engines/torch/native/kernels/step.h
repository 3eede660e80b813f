// One forward pass of a decoder over a batch: every thread runs `forward`, phase by phase.
#pragma once
#include <chrono>

#include "pool.h"
#include "workspace.h"

namespace tandem {

// Seconds of thread 0 by part of the step, summed over steps.
struct Profile {
    double linear = 0, attention = 0, rest = 0;
};

class Step {
   public:
    Step(const Model& model, Pool& pool) : model_(model), pool_(pool) { space_.thread.resize(pool.size()); }

    // logits is [wanted][vocabulary], hidden [hidden_wanted][model.hidden]. No row may be wanted as both.
    void run(const Batch& batch, float* logits, float* hidden);
    Profile profile;

   private:
    struct Item {
        int sequence, kv_head, first_head, heads, first_token, tokens;
    };

    // How far one thread has come.
    struct Walk {
        int id;
        int phase = 0;
    };

    void plan(const Batch& batch);
    void plan_attention(const Batch& batch);
    void forward(int id);
    void embed(int token);
    void clear_new_block(int token);
    const Activations& normalise(Walk& walk, const Norm& pending, const Norm& norm, const Linear& consumer);
    void normalise_row(int row, const Norm& pending, const Norm& norm, const Activations& to, int to_row, const Linear& consumer);
    const Activations& fix(Walk& walk, OwnedActivations& a, const Linear& consumer);
    void project_heads(Walk& walk, const Layer& layer, const Activations& a);
    void finish_head(const Layer& layer, int head, int row, float* x);
    void attend_all(Walk& walk, const Layer& layer);
    void attend_item(const Layer& layer, const Item& item, AttentionScratch& scratch);
    void add_to_residual(Walk& walk, const Linear& w, const Activations& a, bool branch);
    void project_up(Walk& walk, const Layer& layer, const Activations& a);
    void final_state(int row, const Norm& pending, float* to);
    void project_logits(Walk& walk);
    template <class Work>
    void share(Walk& walk, int count, int piece, Work work);
    template <class Finish>
    void columns(Walk& walk, const Linear& w, const Activations& a, int group, Finish finish);
    void lap(const Walk& walk, double Profile::*part);

    const Model& model_;
    Pool& pool_;
    Workspace space_;
    const Batch* batch_ = nullptr;
    float *logits_ = nullptr, *hidden_ = nullptr;
    std::vector<Item> items_;
    std::chrono::steady_clock::time_point last_lap_;
};

}  // namespace tandem
