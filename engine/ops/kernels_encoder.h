// Part of kernels.cpp: encoder layers whose norms follow their sums, over whole texts.
//
// A layer is one call. Texts are taken in groups of about GROUP_TOKENS, and a thread takes a group through the whole
// layer: what is between two products stays in its caches, and threads wait for each other once a layer. What a text
// gives is the same in any group: the products' sums know no rows, and attention and norms go by the text alone.

constexpr i64 GROUP_TOKENS = 96;

enum { RELU = 0, GELU = 1, GELU_TANH = 2 };

// x Phi(x). The smaller tail of Phi by Abramowitz and Stegun 7.1.26, whose absolute error is below 1e-7.
INLINE vf gelu(vf x) {
    const vf z = (x < 0.0f ? -x : x) * 0.70710678f;
    const vf t = 1.0f / fma(z, splat(0.3275911f), splat(1.0f));
    vf p = fma(t, splat(1.061405429f), splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const vf tail = p * t * 0.5f * vexp(-z * z);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <int Kind>
INLINE vf activated(vf x) {
    if (Kind == RELU) return x < 0.0f ? vf{} : x;
    return Kind == GELU ? gelu(x) : gated<true>(x, splat(1.0f));
}

// What `linear` writes: each result is written once, so more can be done to it on the way.
template <class T, int Kind>
struct Activated {
    T x;
};
template <class T, int Kind>
INLINE void store(Activated<T, Kind>* p, vf x) { store(&p->x, activated<Kind>(x)); }
template <class T, int Kind>
INLINE void store1(Activated<T, Kind>* p, float x) { store1(&p->x, activated<Kind>(splat(x))[0]); }
template <class T>
struct Added {
    T x;
};
template <class T>
INLINE void store(Added<T>* p, vf x) { store(&p->x, load(&p->x) + x); }
template <class T>
INLINE void store1(Added<T>* p, float x) { store1(&p->x, load1(&p->x) + x); }

template <class T, int Kind>
void activate(const T* x, i64 ldx, T* out, i64 rows, i64 W, int threads) {
    const i64 chunk = std::max<i64>(1, 8192 / std::max<i64>(W, 1));
    parallel((rows + chunk - 1) / chunk, limit_threads(threads, (double)rows * W, 32768), [&](i64 c) {
        for (i64 r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) {
            i64 i = 0;
            for (; i + VL <= W; i += VL) store(out + r * W + i, activated<Kind>(load(x + r * ldx + i)));
            if (i < W) store_part(out + r * W + i, activated<Kind>(load_part(x + r * ldx + i, W - i)), W - i);
        }
    });
}

template <class T>
void activate_by(i64 kind, const T* x, i64 ldx, T* out, i64 rows, i64 W, int threads) {
    switch (kind) {
        case RELU: activate<T, RELU>(x, ldx, out, rows, W, threads); break;
        case GELU: activate<T, GELU>(x, ldx, out, rows, W, threads); break;
        default: activate<T, GELU_TANH>(x, ldx, out, rows, W, threads);
    }
}

// (x - mean) / sqrt(mean of (x - mean)^2 + eps) * weight + bias (may be null); out may be x.
template <class T>
INLINE void layer_norm_row(const T* x, const float* weight, const float* bias, T* out, i64 H, float eps) {
    const i64 whole = H / VL * VL;
    auto sum = [&](auto value, auto value1) {
        vf s[4] = {};
        i64 h = 0;
        for (; h + 4 * VL <= H; h += 4 * VL)
            for (int i = 0; i < 4; i++) s[i] = s[i] + value(load(x + h + i * VL));
        for (; h < whole; h += VL) s[0] = s[0] + value(load(x + h));
        float rest = 0;
        for (; h < H; h++) rest += value1(load1(x + h));
        return sum_lanes((s[0] + s[1]) + (s[2] + s[3])) + rest;
    };
    const float mean = sum([](vf v) { return v; }, [](float v) { return v; }) / (float)H;
    const float squares = sum([&](vf v) { return (v - mean) * (v - mean); }, [&](float v) { return (v - mean) * (v - mean); });
    const float scale = 1.0f / std::sqrt(squares / (float)H + eps);
    i64 h = 0;
    for (; h < whole; h += VL) {
        const vf y = (load(x + h) - mean) * scale * load(weight + h);
        store(out + h, bias ? y + load(bias + h) : y);
    }
    for (; h < H; h++) {
        const float y = (load1(x + h) - mean) * scale * weight[h];
        store1(out + h, bias ? y + bias[h] : y);
    }
}

template <class T>
void layer_norm(const T* x, i64 ldx, T* residual, i64 ldr, const float* weight, const float* bias, T* out, i64 ldo, i64 rows, i64 H,
                float eps, int threads) {
    const i64 chunk = std::max<i64>(1, 16384 / std::max<i64>(H, 1));
    parallel((rows + chunk - 1) / chunk, limit_threads(threads, (double)rows * H, 65536), [&](i64 c) {
        for (i64 r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) {
            const T* in = x + r * ldx;
            if (residual) {
                T* sums = residual + r * ldr;
                i64 h = 0;
                for (; h + VL <= H; h += VL) store(sums + h, load(in + h) + load(sums + h));
                for (; h < H; h++) store1(sums + h, load1(in + h) + load1(sums + h));
                in = sums;
            }
            layer_norm_row(in, weight, bias, out + r * ldo, H, eps);
        }
    });
}

// c[r][j] = sum over k in order of a[r][k] b[k][j], for R rows and `columns` (a multiple of VL) of b.
template <int R>
INLINE void rows_times(const float* a, i64 lda, const float* b, i64 ldb, i64 depth, float* c, i64 ldc, i64 columns) {
    i64 j = 0;
    for (; j + 2 * VL <= columns; j += 2 * VL) {
        vf s[R][2] = {};
        for (i64 k = 0; k < depth; k++) {
            const vf b0 = load(b + k * ldb + j), b1 = load(b + k * ldb + j + VL);
            for (int r = 0; r < R; r++) {
                const vf x = splat(a[r * lda + k]);
                s[r][0] = fma(x, b0, s[r][0]);
                s[r][1] = fma(x, b1, s[r][1]);
            }
        }
        for (int r = 0; r < R; r++) {
            store(c + r * ldc + j, s[r][0]);
            store(c + r * ldc + j + VL, s[r][1]);
        }
    }
    for (; j < columns; j += VL) {
        vf s[R] = {};
        for (i64 k = 0; k < depth; k++) {
            const vf b0 = load(b + k * ldb + j);
            for (int r = 0; r < R; r++) s[r] = fma(splat(a[r * lda + k]), b0, s[r]);
        }
        for (int r = 0; r < R; r++) store(c + r * ldc + j, s[r]);
    }
}
constexpr int QUERIES = 6;
void few_rows_times(int rows, const float* a, i64 lda, const float* b, i64 ldb, i64 depth, float* c, i64 ldc, i64 columns) {
    switch (rows) {
#define CASE(n) \
    case n: return rows_times<n>(a, lda, b, ldb, depth, c, ldc, columns);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// One head of one text of n tokens: q, k and v [n, ld], D numbers each (a multiple of VL); every query sees every key.
template <class T>
void attend_text(const T* q, const T* k, const T* v, i64 ld, i64 n, i64 D, float scale, T* out, i64 ldo) {
    const i64 padded = (n + VL - 1) / VL * VL;
    float* memory = (float*)scratch<10>((size_t)(D * padded + n * D + QUERIES * (padded + 2 * D)) * 4);
    float *turned = memory, *values = turned + D * padded, *p = values + n * D, *queries = p + QUERIES * padded,
          *result = queries + QUERIES * D;
    for (i64 t = 0; t < padded; t++)
        for (i64 d = 0; d < D; d += VL) {
            const vf key = t < n ? load(k + t * ld + d) : vf{};
            for (int i = 0; i < VL; i++) turned[(d + i) * padded + t] = key[i];
        }
    for (i64 t = 0; t < n; t++)
        for (i64 d = 0; d < D; d += VL) store(values + t * D + d, load(v + t * ld + d));
    for (i64 t0 = 0; t0 < n; t0 += QUERIES) {
        const int rows = (int)std::min<i64>(QUERIES, n - t0);
        for (int r = 0; r < rows; r++)
            for (i64 d = 0; d < D; d += VL) store(queries + r * D + d, load(q + (t0 + r) * ld + d) * scale);
        few_rows_times(rows, queries, D, turned, padded, D, p, padded, padded);
        float shares[QUERIES];
        for (int r = 0; r < rows; r++) {
            float* row = p + r * padded;
            for (i64 t = n; t < padded; t++) row[t] = -INFINITY;
            vf top = load(row);
            for (i64 t = VL; t < padded; t += VL) top = vmax(load(row + t), top);
            const vf most = splat(max_lanes(top));
            vf sum = {};
            for (i64 t = 0; t < padded; t += VL) {
                const vf e = vexp(load(row + t) - most);
                store(row + t, e);
                sum += e;
            }
            shares[r] = 1.0f / sum_lanes(sum);
        }
        few_rows_times(rows, p, padded, values, D, n, result, D, D);
        for (int r = 0; r < rows; r++)
            for (i64 d = 0; d < D; d += VL) store(out + (t0 + r) * ldo + d, load(result + r * D + d) * shares[r]);
    }
}

// ops/encoder.py builds it. Matrices are packed as for `linear`; biases may be null.
struct EncoderLayer {
    const void *qkv, *output, *up, *down;
    const float *qkv_bias, *output_bias, *up_bias, *down_bias, *norm, *norm_bias, *out_norm, *out_norm_bias;
    i64 type, width, heads, head_dim, inner, activation;
    float scale, eps, out_eps;
};

// Whole texts, from their first row on, through the layer, in place.
template <class T>
void encode_group(const EncoderLayer& s, T* x, const int32_t* starts, i64 texts, int threads) {
    const i64 H = s.width, W = s.heads * s.head_dim, D = s.head_dim, rows = starts[texts] - starts[0];
    auto matrix = [](const void* w, i64 K) { return Plain<T>{(const T*)w, steps_of<T>(K)}; };
    T* memory = (T*)scratch<11>((size_t)rows * std::max(4 * W, s.inner) * sizeof(T));
    T* attended = memory + rows * 3 * W;
    linear(x, H, rows, H, matrix(s.qkv, H), 3 * W, s.qkv_bias, memory, 3 * W, threads);
    parallel(texts * s.heads, threads, [&](i64 task) {
        const i64 text = task / s.heads, head = task % s.heads, first = starts[text] - starts[0];
        const T* q = memory + first * 3 * W + head * D;
        attend_text(q, q + W, q + 2 * W, 3 * W, starts[text + 1] - starts[text], D, s.scale, attended + first * W + head * D, W);
    });
    linear(attended, W, rows, W, matrix(s.output, W), H, s.output_bias, (Added<T>*)x, H, threads);
    layer_norm(x, H, (T*)nullptr, 0, s.norm, s.norm_bias, x, H, rows, H, s.eps, threads);
    const Plain<T> up = matrix(s.up, H);
    switch (s.activation) {
        case RELU: linear(x, H, rows, H, up, s.inner, s.up_bias, (Activated<T, RELU>*)memory, s.inner, threads); break;
        case GELU: linear(x, H, rows, H, up, s.inner, s.up_bias, (Activated<T, GELU>*)memory, s.inner, threads); break;
        default: linear(x, H, rows, H, up, s.inner, s.up_bias, (Activated<T, GELU_TANH>*)memory, s.inner, threads);
    }
    linear(memory, s.inner, rows, s.inner, matrix(s.down, s.inner), H, s.down_bias, (Added<T>*)x, H, threads);
    layer_norm(x, H, (T*)nullptr, 0, s.out_norm, s.out_norm_bias, x, H, rows, H, s.out_eps, threads);
}

// starts [texts + 1]: the first row of each text.
template <class T>
void encode(const EncoderLayer& s, T* x, const int32_t* starts, i64 texts, int threads) {
    const i64 tokens = starts[texts];
    if (!tokens) return;
    // As many groups as threads can share evenly; a text is in the group where its middle lies.
    i64 groups = (tokens + GROUP_TOKENS - 1) / GROUP_TOKENS;
    groups = (groups + threads - 1) / threads * threads;
    std::vector<i64> bounds{0};
    i64 most = 0;
    for (i64 t = 1; t <= texts; t++) {
        const i64 middle = t < texts ? (starts[t] + starts[t + 1]) / 2 : tokens, before = (starts[t - 1] + starts[t]) / 2;
        if (t < texts && middle * groups / tokens == before * groups / tokens) continue;
        most = std::max<i64>(most, starts[t] - starts[bounds.back()]);
        bounds.push_back(t);
    }
    const i64 count = (i64)bounds.size() - 1;
    auto group = [&](i64 g, int inner) {
        encode_group(s, x + (i64)starts[bounds[g]] * s.width, starts + bounds[g], bounds[g + 1] - bounds[g], inner);
    };
    // Few or uneven groups: all threads go through one after another.
    if (most * threads > tokens + GROUP_TOKENS / 2) {
        for (i64 g = 0; g < count; g++) group(g, threads);
    } else {
        parallel(count, threads, [&](i64 g) { group(g, 1); });
    }
}
