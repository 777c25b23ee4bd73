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

// What a call is about: rows of x, of y and of h (by their places in `rows`), and every adapter's branch, or null, in `table`.
template <class T>
struct LoraCall {
    const T* x;
    T* y;
    float* h;
    i64 ldx, ldy, ldh, K;
    const int32_t* rows;
    const LoraGroup* groups;
    const LoraBranch* const* table;
};

// One panel of A for the rows of a group: h = A x.
template <class T>
void lora_down(const LoraCall<T>& c, const LoraGroup& group, i64 panel) {
    const float* down = c.table[group.adapter]->down + panel * c.K * LORA_WIDTH;
    for (i64 k0 = 0; k0 < c.K; k0 += LORA_DEPTH) {
        const i64 count = std::min(LORA_DEPTH, c.K - k0);
        const float* a = down + k0 * LORA_WIDTH;
        for (i64 place = group.first; place < group.last; place++) {
            const T* in = c.x + c.rows[place] * c.ldx + k0;
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
            float* out = c.h + place * c.ldh + panel * LORA_WIDTH;
            for (int v = 0; v < LORA_VECTORS; v++) {
                const vf sum = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
                store(out + v * VL, k0 ? load(out + v * VL) + sum : sum);
            }
        }
    }
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

// Panels [begin, end) of a block of B for the rows of a group: y += gain y + offset + B h, rounded once.
template <class T>
void lora_up(const LoraCall<T>& c, const LoraGroup& group, const LoraBlock& block, i64 begin, i64 end) {
    const LoraBranch& branch = *c.table[group.adapter];
    auto run = [&](auto count, i64 place) {
        constexpr int Rows = decltype(count)::value;
        const float* inner[Rows];
        for (int r = 0; r < Rows; r++) inner[r] = c.h + (place + r) * c.ldh + block.rank_first;
        for (i64 p = begin; p < end; p++) {
            const i64 column = block.first + p * LORA_WIDTH;
            T* out[Rows];
            for (int r = 0; r < Rows; r++) out[r] = c.y + c.rows[place + r] * c.ldy + column;
            lora_up_panel<Rows>(out, inner, block.up + p * block.rank * LORA_WIDTH, block.rank, block.width - p * LORA_WIDTH,
                                branch.gain ? branch.gain + column : nullptr, branch.offset ? branch.offset + column : nullptr);
        }
    };
    i64 place = group.first;
    for (; place + 4 <= group.last; place += 4) run(std::integral_constant<int, 4>(), place);
    for (; place < group.last; place++) run(std::integral_constant<int, 1>(), place);
}

// Both passes; of an x that is null only the second, h being given. Threads meet once where there are groups enough for
// each to take whole ones, else between the passes, too.
template <class T>
void lora(const LoraCall<T>& c, i64 num_groups, int threads) {
    const i64 none = 0;
    i64 total = 0, most = 0;
    double work_down = 0, work_up = 0;
    std::vector<i64> own;
    for (i64 g = 0; g < num_groups; g++) {
        const LoraBranch* branch = c.table[c.groups[g].adapter];
        if (!branch) continue;
        own.push_back(g);
        i64 work = c.x && branch->down ? branch->ranks * c.K : none;
        const i64 count = c.groups[g].last - c.groups[g].first;
        work_down += (double)work * count;
        for (i64 b = 0; b < branch->num_blocks; b++) {
            const i64 each = branch->blocks[b].width * (branch->blocks[b].rank + 4);
            work_up += (double)each * count;
            work += each;
        }
        total += work * count;
        most = std::max(most, work * count);
    }
    auto panels_of = [](const LoraBlock& block) { return (block.width + LORA_WIDTH - 1) / LORA_WIDTH; };
    auto downs_of = [&](i64 g) {
        const LoraBranch* branch = c.table[c.groups[g].adapter];
        return c.x && branch->down ? branch->ranks / LORA_WIDTH : none;
    };
    if (most * 2 * threads <= total) {
        parallel((i64)own.size(), limit_threads(threads, work_down + work_up, 131072), [&](i64 index) {
            const LoraGroup& group = c.groups[own[index]];
            const LoraBranch* branch = c.table[group.adapter];
            for (i64 p = 0; p < downs_of(own[index]); p++) lora_down(c, group, p);
            for (i64 b = 0; b < branch->num_blocks; b++) lora_up(c, group, branch->blocks[b], 0, panels_of(branch->blocks[b]));
        });
        return;
    }
    struct Task { i64 group, block, panel; };
    std::vector<Task> downs, ups;
    for (i64 g : own) {
        const LoraBranch* branch = c.table[c.groups[g].adapter];
        for (i64 p = 0; p < downs_of(g); p++) downs.push_back({g, 0, p});
        for (i64 b = 0; b < branch->num_blocks; b++)
            for (i64 p = 0; p < panels_of(branch->blocks[b]); p += LORA_PANELS) ups.push_back({g, b, p});
    }
    parallel((i64)downs.size(), limit_threads(threads, work_down, 131072),
             [&](i64 index) { lora_down(c, c.groups[downs[index].group], downs[index].panel); });
    parallel((i64)ups.size(), limit_threads(threads, work_up, 131072), [&](i64 index) {
        const Task& task = ups[index];
        const LoraBlock& block = c.table[c.groups[task.group].adapter]->blocks[task.block];
        lora_up(c, c.groups[task.group], block, task.panel, std::min(panels_of(block), task.panel + LORA_PANELS));
    });
}
