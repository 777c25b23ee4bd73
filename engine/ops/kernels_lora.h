// The kernels of LoRA adapters, included by kernels.cpp: what they add to a linear layer's output, y += B (A x).
//
// Rows stand in groups, each of one adapter; a group reads its adapter's matrices once. Every sum is of one row, in an
// order that its place, its company and the threads do not change.

// Numbers side by side in a panel: outputs of A, and outputs of B.
constexpr i64 LORA_WIDTH = 16;
constexpr int LORA_VECTORS = LORA_WIDTH / VL;
// Inputs of A that are summed from zero; their share of a panel stays in L1.
constexpr i64 LORA_DEPTH = 512;
// Panels of B that are one task.
constexpr i64 LORA_PANELS = 32;

// What one adapter does at one layer; ops/lora.py writes it. down: A as [ranks / 16][inputs][16], zero padded; null where there is
// none. gain, offset: float32 by output, or null. Blocks cover the outputs that change, each at most once.
struct LoraBlock {
    i64 first, width, rank_first, rank;  // outputs [first, first + width) are of ranks [rank_first, rank_first + rank)
    const float* up;                     // [ceil(width / 16)][rank][16]
};
struct LoraBranch {
    const float* down;
    i64 ranks, num_blocks;
    const LoraBlock* blocks;
    const float *gain, *offset;
};
struct LoraGroup {
    int32_t adapter, first, last;  // the adapter of rows[first, last)
};

// h [places in rows][ldh] = A x. table: of every adapter's branch, or null.
template <class T>
void lora_down(const T* x, i64 ldx, i64 K, const int32_t* rows, const LoraGroup* groups, i64 num_groups, const LoraBranch* const* table,
               float* h, i64 ldh, int threads) {
    struct Task { i64 group, panel; };
    std::vector<Task> tasks;
    double work = 0;
    for (i64 g = 0; g < num_groups; g++) {
        const LoraBranch* branch = table[groups[g].adapter];
        if (!branch || !branch->down) continue;
        for (i64 p = 0; p < branch->ranks / LORA_WIDTH; p++) tasks.push_back({g, p});
        work += (double)branch->ranks * K * (groups[g].last - groups[g].first);
    }
    parallel((i64)tasks.size(), limit_threads(threads, work, 131072), [&](i64 index) {
        const LoraGroup& group = groups[tasks[index].group];
        const i64 panel = tasks[index].panel;
        const float* down = table[group.adapter]->down + panel * K * LORA_WIDTH;
        for (i64 k0 = 0; k0 < K; k0 += LORA_DEPTH) {
            const i64 count = std::min(LORA_DEPTH, K - k0);
            const float* a = down + k0 * LORA_WIDTH;
            for (i64 place = group.first; place < group.last; place++) {
                const T* in = x + rows[place] * ldx + k0;
                // Every fourth input is added up apart: more sums at a time than the latency of an addition.
                vf sums[4][LORA_VECTORS] = {};
                auto step = [&](i64 k, int chain) __attribute__((always_inline)) {
                    const vf value = splat(load1(in + k));
                    for (int v = 0; v < LORA_VECTORS; v++)
                        sums[chain][v] = fma(load(a + k * LORA_WIDTH + v * VL), value, sums[chain][v]);
                };
                i64 k = 0;
                for (; k + 4 <= count; k += 4) {
                    step(k, 0);
                    step(k + 1, 1);
                    step(k + 2, 2);
                    step(k + 3, 3);
                }
                for (int chain = 0; k < count; k++, chain++) step(k, chain);
                float* out = h + place * ldh + panel * LORA_WIDTH;
                for (int v = 0; v < LORA_VECTORS; v++) {
                    const vf sum = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
                    store(out + v * VL, k0 ? load(out + v * VL) + sum : sum);
                }
            }
        }
    });
}

// One panel of B for Rows rows.
template <int Rows, class T>
INLINE void lora_up_panel(T* const* y, const float* const* h, const float* up, i64 rank, i64 width, const float* gain, const float* offset) {
    vf sums[Rows][LORA_VECTORS] = {};
    for (i64 j = 0; j < rank; j++)
        for (int v = 0; v < LORA_VECTORS; v++) {
            const vf b = load(up + j * LORA_WIDTH + v * VL);
            for (int r = 0; r < Rows; r++) sums[r][v] = fma(b, splat(h[r][j]), sums[r][v]);
        }
    for (int v = 0; v < LORA_VECTORS; v++) {
        const i64 at = v * VL, left = width - at;
        if (left <= 0) break;
        const bool whole = left >= VL;
        for (int r = 0; r < Rows; r++) {
            const vf before = whole ? load(y[r] + at) : load_part(y[r] + at, left);
            vf added = sums[r][v];
            if (offset) added = added + (whole ? load(offset + at) : load_part(offset + at, left));
            if (gain) added = fma(whole ? load(gain + at) : load_part(gain + at, left), before, added);
            if (whole) store(y[r] + at, before + added);
            else store_part(y[r] + at, before + added, left);
        }
    }
}

// y += gain y + offset + B h, rounded once.
template <class T>
void lora_up(T* y, i64 ldy, const int32_t* rows, const LoraGroup* groups, i64 num_groups, const LoraBranch* const* table, const float* h,
             i64 ldh, int threads) {
    struct Task { i64 group; const LoraBlock* block; i64 panel; };
    std::vector<Task> tasks;
    double work = 0;
    for (i64 g = 0; g < num_groups; g++) {
        const LoraBranch* branch = table[groups[g].adapter];
        if (!branch) continue;
        for (i64 b = 0; b < branch->num_blocks; b++) {
            const LoraBlock* block = branch->blocks + b;
            for (i64 p = 0; p * LORA_WIDTH < block->width; p += LORA_PANELS) tasks.push_back({g, block, p});
            work += (double)block->width * (block->rank + 4) * (groups[g].last - groups[g].first);
        }
    }
    parallel((i64)tasks.size(), limit_threads(threads, work, 131072), [&](i64 index) {
        const LoraGroup& group = groups[tasks[index].group];
        const LoraBranch& branch = *table[group.adapter];
        const LoraBlock& block = *tasks[index].block;
        const i64 panels = (block.width + LORA_WIDTH - 1) / LORA_WIDTH;
        const i64 end = std::min(panels, tasks[index].panel + LORA_PANELS);
        auto run = [&](auto count, i64 place) {
            constexpr int Rows = decltype(count)::value;
            const float* inner[Rows];
            for (int r = 0; r < Rows; r++) inner[r] = h + (place + r) * ldh + block.rank_first;
            for (i64 p = tasks[index].panel; p < end; p++) {
                const i64 column = block.first + p * LORA_WIDTH;
                T* out[Rows];
                for (int r = 0; r < Rows; r++) out[r] = y + rows[place + r] * ldy + column;
                lora_up_panel<Rows>(out, inner, block.up + p * block.rank * LORA_WIDTH, block.rank, block.width - p * LORA_WIDTH,
                                    branch.gain ? branch.gain + column : nullptr, branch.offset ? branch.offset + column : nullptr);
            }
        };
        i64 place = group.first;
        for (; place + 4 <= group.last; place += 4) run(std::integral_constant<int, 4>(), place);
        for (; place < group.last; place++) run(std::integral_constant<int, 1>(), place);
    });
}
