// The kernels of layers with a recurrent state, included by kernels.cpp: short convolutions, gated delta nets, state spaces.
//
// A sequence's tokens are taken one after another, each by the same operations in the same order, and the state between
// them is kept in full: so the bits of a token do not depend on how its prompt was cut into chunks, nor on its company.
// Rows that are held (held, where it is given, uint8 [rows]) leave their slot's state as it was.

struct StateRows {  // ops/state.py has one for every step
    const int32_t *slots, *indptr;  // [count], [count + 1]
    const uint8_t* held;            // [count], or null
    i64 count;
};

// ---------------------------------------------------------------- causal convolution

// One convolution per channel over a token and the taps - 1 before it, those of earlier steps from the slot's state
// [taps - 1][C], which then holds the row's last. weight [taps][C], the newest token's last.
template <class T, bool Silu>
void convolve(const T* x, i64 ldx, T* out, T* states, i64 stride, const float* weight, const float* bias, i64 taps, i64 C,
              const StateRows& rows, int threads) {
    const i64 block = 512, blocks = (C + block - 1) / block, before = taps - 1;
    threads = limit_threads(threads, (double)rows.indptr[rows.count] * C * taps, 65536);
    parallel(rows.count * blocks, threads, [&](i64 task) {
        const i64 row = task / blocks, c0 = task % blocks * block, c1 = std::min(C, c0 + block);
        const i64 first = rows.indptr[row], count = rows.indptr[row + 1] - first;
        T* state = states + rows.slots[row] * stride;
        auto at = [&](i64 t) { return t < 0 ? state + (t + before) * C : x + (first + t) * ldx; };
        auto one = [&](auto read, auto read_weight, i64 t, i64 c) {
            vf sum = {};
            for (i64 tap = 0; tap < taps; tap++) sum = fma(read_weight(weight + tap * C + c), read(at(t - before + tap) + c), sum);
            if (bias) sum = sum + read_weight(bias + c);
            return Silu ? gated<false>(sum, splat(1.0f)) : sum;
        };
        for (i64 t = 0; t < count; t++) {
            T* to = out + (first + t) * C;
            i64 c = c0;
            for (; c + VL <= c1; c += VL)
                store(to + c, one([](const T* p) { return load(p); }, [](const float* p) { return load(p); }, t, c));
            if (c < c1) {
                const i64 n = c1 - c;
                vf y = one([n](const T* p) { return load_part(p, n); }, [n](const float* p) { return load_part(p, n); }, t, c);
                store_part(to + c, y, n);
            }
        }
        if (rows.held && rows.held[row]) return;
        for (i64 t = 0; t < before; t++) memmove(state + t * C + c0, at(count - before + t) + c0, (c1 - c0) * sizeof(T));
    });
}

// ---------------------------------------------------------------- gated recurrence

struct Recurrence {
    const StateRows& rows;
    const void *q, *k, *v, *step, *share;  // by token; share is a delta net's alone
    const float *rate, *step_bias, *skip;  // [heads]; skip may be null
    float* states;                         // of slot 0: [heads][K][V]; `stride` floats further those of slot 1
    void* out;                             // [tokens][heads][V]
    i64 ldq, ldk, ldv, ld_step, ld_share, stride, key_heads, heads, K, V;
    float scale, least_step, most_step;
};

// Tokens whose keys and queries are brought into float32 at once.
constexpr int TOKENS = 32;
// Columns of a state that are held in L1 while TOKENS go through them.
constexpr int WIDTH = 2 * VL;

struct Gates {
    float decay[TOKENS], share[TOKENS], match[TOKENS];  // match: k . q
};

template <class T>
INLINE void widen(const T* from, float* to, i64 count, i64 padded) {
    i64 i = 0;
    for (; i + VL <= count; i += VL) store(to + i, load(from + i));
    if (i < padded) store(to + i, load_part(from + i, count - i));
}

// Brings both to length 1, the query then to `scale`.
INLINE void normalise(float* key, float* query, float scale, i64 padded) {
    vf of_key = {}, of_query = {};
    for (i64 i = 0; i < padded; i += VL) {
        const vf k = load(key + i), q = load(query + i);
        of_key = fma(k, k, of_key);
        of_query = fma(q, q, of_query);
    }
    const float key_scale = 1.0f / std::sqrt(sum_lanes(of_key) + 1e-6f), query_scale = scale / std::sqrt(sum_lanes(of_query) + 1e-6f);
    for (i64 i = 0; i < padded; i += VL) {
        store(key + i, load(key + i) * key_scale);
        store(query + i, load(query + i) * query_scale);
    }
}

INLINE float dot(const float* a, const float* b, i64 padded) {
    vf sum = {};
    for (i64 i = 0; i < padded; i += VL) sum = fma(load(a + i), load(b + i), sum);
    return sum_lanes(sum);
}

// A tile, WIDTH columns of [K][ld], takes the last token's S = decay S + k (x) d (Update), and the next token reads S^T k and S^T q of it
// (Read), in one pass: told is S^T q, read is S^T k where it is a delta net.
template <bool Update, bool Read, bool Delta>
INLINE void pass(float* tile, i64 ld, i64 K, const float* last, float decay, const vf* d, const float* key, const float* query,
                 vf* read, vf* told) {
    // Even rows and odd ones are added up apart: more sums at a time than the latency of an addition.
    const vf d0 = d[0], d1 = d[1];
    vf read0[2] = {}, read1[2] = {}, told0[2] = {}, told1[2] = {};
    auto row = [&](i64 i, int half) __attribute__((always_inline)) {
        float* at = tile + i * ld;
        vf s0 = load(at), s1 = load(at + VL);
        if (Update) {
            const vf kk = splat(last[i]);
            s0 = fma(kk, d0, s0 * decay);
            s1 = fma(kk, d1, s1 * decay);
            store(at, s0);
            store(at + VL, s1);
        }
        if (Read) {
            const vf qq = splat(query[i]);
            told0[half] = fma(s0, qq, told0[half]);
            told1[half] = fma(s1, qq, told1[half]);
            if (Delta) {
                const vf kk = splat(key[i]);
                read0[half] = fma(s0, kk, read0[half]);
                read1[half] = fma(s1, kk, read1[half]);
            }
        }
    };
    i64 i = 0;
    for (; i + 2 <= K; i += 2) {
        row(i, 0);
        row(i + 1, 1);
    }
    if (i < K) row(i, 0);
    read[0] = read0[0] + read0[1];
    read[1] = read1[0] + read1[1];
    told[0] = told0[0] + told0[1];
    told[1] = told1[0] + told1[1];
}

// A state [K][V] as tiles [K][WIDTH] one after the other, and back: in columns of [K][V] a tile would lie in few lines of L1.
template <bool Back>
INLINE void move_tiles(float* state, float* tiles, i64 K, i64 V) {
    for (i64 c0 = 0; c0 < V; c0 += WIDTH)
        for (i64 i = 0; i < K; i++, tiles += WIDTH)
            for (int n = 0; n < 2; n++) {
                float *whole = state + i * V + c0 + n * VL, *part = tiles + n * VL;
                const i64 left = V - c0 - n * VL;
                if (!Back) store(part, left >= VL ? load(whole) : load_part(whole, left));
                else if (left >= VL) store(whole, load(part));
                else store_part(whole, load(part), left);
            }
}

// d: of a delta net, share (v - decay S^T k), else share v. The output, (decay S + k (x) d)^T q, is decay S^T q + (k . q) d.
template <class T, bool Delta>
INLINE void run_tile(float* tile, i64 ld, const Recurrence& r, const Gates& gates, const float* k, const float* q, i64 padded, i64 head,
                     i64 token, i64 count, i64 c0) {
    const i64 K = r.K, width = std::min<i64>(WIDTH, r.V - c0);
    vf d[2] = {}, read[2], told[2];
    float decay = 1.0f;
    for (i64 t = 0; t < count; t++) {
        const float *key = k + t * padded, *query = q + t * padded;
        const T* value = (const T*)r.v + (token + t) * r.ldv + head * r.V + c0;
        T* out = (T*)r.out + ((token + t) * r.heads + head) * r.V + c0;
        if (t + 1 < count)  // the next token's lie far from these
            for (i64 i = 0; i < width; i += 64 / sizeof(T)) {
                __builtin_prefetch(value + r.ldv + i);
                __builtin_prefetch(out + r.heads * r.V + i, 1);
            }
        if (t) pass<true, true, Delta>(tile, ld, K, key - padded, decay, d, key, query, read, told);
        else pass<false, true, Delta>(tile, ld, K, key, decay, d, key, query, read, told);
        decay = gates.decay[t];
        for (int n = 0; n < 2; n++) {
            const i64 left = width - n * VL;
            if (left <= 0) break;
            vf v = left >= VL ? load(value + n * VL) : load_part(value + n * VL, left);
            d[n] = (Delta ? v - read[n] * decay : v) * gates.share[t];
            vf o = fma(d[n], splat(gates.match[t]), told[n] * decay);
            if (r.skip) o = fma(v, splat(r.skip[head]), o);
            if (left >= VL) store(out + n * VL, o);
            else store_part(out + n * VL, o, left);
        }
    }
    pass<true, false, Delta>(tile, ld, K, k + (count - 1) * padded, decay, d, k, q, read, told);
}

INLINE float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

template <class T, bool Delta>
void recur(const Recurrence& r, int threads) {
    const StateRows& rows = r.rows;
    const i64 padded = (r.K + VL - 1) / VL * VL, tokens = rows.indptr[rows.count], across = (r.V + WIDTH - 1) / WIDTH;
    threads = limit_threads(threads, (double)tokens * r.heads * r.K * r.V, 65536);
    parallel(rows.count * r.heads, threads, [&](i64 task) {
        const i64 row = task / r.heads, head = task % r.heads, key_head = head / (r.heads / r.key_heads);
        const i64 first = rows.indptr[row], end = rows.indptr[row + 1];
        const bool held = rows.held && rows.held[row];
        const bool tiled = end - first > 1 || held || r.V % WIDTH;  // for one token a copy would not pay
        float* state = r.states + rows.slots[row] * r.stride + head * r.K * r.V;
        float* k = (float*)scratch<2>((2 * TOKENS * padded + across * r.K * WIDTH) * sizeof(float));
        float *q = k + TOKENS * padded, *tiles = q + TOKENS * padded;
        Gates gates;
        // Tiles go through it in columns: fetched in order, it comes at the speed of the memory.
        for (i64 i = 0; i < r.K * r.V; i += 16) __builtin_prefetch(state + i, 1, 2);
        if (tiled) move_tiles<false>(state, tiles, r.K, r.V);
        for (i64 token = first; token < end; token += TOKENS) {
            const i64 count = std::min<i64>(TOKENS, end - token);
            for (i64 t = 0; t < count; t++) {
                float *key = k + t * padded, *query = q + t * padded;
                widen((const T*)r.k + (token + t) * r.ldk + key_head * r.K, key, r.K, padded);
                widen((const T*)r.q + (token + t) * r.ldq + key_head * r.K, query, r.K, padded);
                if (Delta) normalise(key, query, r.scale, padded);
                gates.match[t] = dot(key, query, padded);
                float step = softplus(load1((const T*)r.step + (token + t) * r.ld_step + head) + r.step_bias[head]);
                step = std::min(std::max(step, r.least_step), r.most_step);
                gates.decay[t] = std::exp(-r.rate[head] * step);
                gates.share[t] = Delta ? 1.0f / (1.0f + std::exp(-load1((const T*)r.share + (token + t) * r.ld_share + head))) : step;
            }
            for (i64 c = 0; c < across; c++) {
                if (tiled) run_tile<T, Delta>(tiles + c * r.K * WIDTH, WIDTH, r, gates, k, q, padded, head, token, count, c * WIDTH);
                else run_tile<T, Delta>(state + c * WIDTH, r.V, r, gates, k, q, padded, head, token, count, c * WIDTH);
            }
        }
        if (tiled && !held) move_tiles<true>(state, tiles, r.K, r.V);
    });
}

// ---------------------------------------------------------------- gates

// x sigmoid(gate), or x silu(gate).
template <class T, bool Silu>
void gate(const T* x, i64 ldx, const T* gates, i64 ldg, T* out, i64 rows, i64 width, int threads) {
    threads = limit_threads(threads, (double)rows * width, 32768);
    const i64 chunk = std::max<i64>(1, 4096 / std::max<i64>(width, 1));
    auto one = [](vf g, vf v) { return Silu ? gated<false>(g, v) : v / (vexp(-g) + 1.0f); };
    parallel((rows + chunk - 1) / chunk, threads, [&](i64 c) {
        for (i64 r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) {
            const T *in = x + r * ldx, *g = gates + r * ldg;
            T* to = out + r * width;
            i64 i = 0;
            for (; i + VL <= width; i += VL) store(to + i, one(load(g + i), load(in + i)));
            if (i < width) store_part(to + i, one(load_part(g + i, width - i), load_part(in + i, width - i)), width - i);
        }
    });
}

// An RMS norm over each of `parts` equal parts of a row, and silu(gate): of what goes in (First), or of what comes out.
// weight: of one part, or (step = width) of every part its own.
template <class T, bool First>
void gated_norm(const T* x, i64 ldx, const T* gates, i64 ldg, const float* weight, i64 step, T* out, i64 rows, i64 parts, i64 width,
                float eps, int threads) {
    threads = limit_threads(threads, (double)rows * parts * width, 32768);
    parallel(rows, threads, [&](i64 r) {
        for (i64 p = 0; p < parts; p++) {
            const T *in = x + r * ldx + p * width, *g = gates + r * ldg + p * width;
            const float* w = weight + p * step;
            T* to = out + (r * parts + p) * width;
            auto value = [&](i64 i, i64 n) {
                vf v = n >= VL ? load(in + i) : load_part(in + i, n);
                return First ? gated<false>(n >= VL ? load(g + i) : load_part(g + i, n), v) : v;
            };
            vf sum = {};
            for (i64 i = 0; i < width; i += VL) {
                vf v = value(i, width - i);
                sum = fma(v, v, sum);
            }
            const float scale = 1.0f / std::sqrt(sum_lanes(sum) / (float)width + eps);
            for (i64 i = 0; i < width; i += VL) {
                const i64 n = width - i;
                vf v = value(i, n) * scale * (n >= VL ? load(w + i) : load_part(w + i, n));
                if (!First) v = gated<false>(n >= VL ? load(g + i) : load_part(g + i, n), v);
                if (n >= VL) store(to + i, v);
                else store_part(to + i, v, n);
            }
        }
    });
}
