// Attention over keys and values in eight bits; a part of kernels.cpp. The layout is that of ops/attention/coded.py: a token
// has the codes of its heads, and after them a bf16 scale for each head, or two for keys whose front is the value.
// Queries are brought to sixteen bits, a scale for each row and part, and multiplied as integers: exact sums, so no order of
// them shows. Weights of values stay float32: they take the value's scale, and are summed over its codes in order of position.

INLINE i64 scales_at(i64 codes) { return (codes + 1) & ~(i64)1; }
INLINE float scale_of(const int8_t* token, i64 codes, i64 number) {
    bf16 bits;
    memcpy(&bits, token + scales_at(codes) + 2 * number, 2);
    return load1(&bits);
}
// Written out: GCC 12 widens vectors of bytes in halves, and short ones by way of the stack.
INLINE vf load_codes(const int8_t* p) {
#if defined(__AVX512F__) && VL == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && VL == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector((vb_any) * (const vb_any*)p, vf);
#endif
}

constexpr float TINY = 1e-30f;  // numbers below are zero: the inverse of their scale would not be finite

// The largest magnitude of n numbers; NaN where one is none.
template <class T>
INLINE float largest(const T* x, i64 n) {
    vf most = {};
    vi odd = {};
    for (i64 d = 0; d < n; d += VL) {
        const vf v = d + VL <= n ? load(x + d) : load_part(x + d, n - d);
        most = vmax((vf)((vu)v & 0x7fffffffu), most);
        odd |= v != v;
    }
    for (int i = 0; i < VL; i++)
        if (odd[i]) return NAN;
    return max_lanes(most);
}
INLINE vi rounded(vf x) {
    const vf magic = splat(12582912.0f);  // adding it rounds to an integer
    return __builtin_convertvector((x + magic) - magic, vi);
}

// One head's D numbers to codes and scales, a part before `split` and one after. Where not all of a part are finite, its scale
// is no number.
template <class T>
INLINE void write_codes(const T* x, i64 D, i64 split, int8_t* token, i64 codes, i64 head, i64 parts) {
    int8_t *to = token + head * D, *scales = token + scales_at(codes) + 2 * parts * head;
    for (i64 d0 = 0, d1; d0 < D; d0 = d1, scales += 2) {
        d1 = d0 < split ? split : D;
        const float top = largest(x + d0, d1 - d0), exact = top / 127;
        const bool finite = top < INFINITY, some = finite && top >= TINY;
        uint32_t bits;
        memcpy(&bits, &exact, 4);
        const bf16 scale = !finite ? 0x7fc0 : some ? (bf16)((bits + 0xffff) >> 16) : 0;  // up, so that no code is beyond 127
        memcpy(scales, &scale, 2);
        const float inverse = some ? 1 / load1(&scale) : 0;
        for (i64 d = d0; d < d1; d += VL) {
            const i64 n = std::min<i64>(VL, d1 - d);
            const vf v = n == VL ? load(x + d) : load_part(x + d, n);
            const vi q = some ? rounded(v * inverse) : vi{};
            int8_t bytes[VL];
            for (int i = 0; i < VL; i++) bytes[i] = (int8_t)q[i];
            memcpy(to + d, bytes, n);
        }
    }
}

constexpr int W = 2 * VL;  // 16-bit numbers of a vector
typedef int8_t vb __attribute__((vector_size(2 * VL), aligned(1), may_alias));
typedef int16_t vs_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
INLINE vs words(const int16_t* p) { return *(const vs_any*)p; }
INLINE vs words(const int8_t* p) {
#if defined(__AVX512BW__) && VL == 16
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && VL == 8
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(*(const vb*)p, vs);
#endif
}

// out[i] = sum of lanes of acc[i], for eight.
INLINE void fold8(const vi* acc, int32_t* out) {
#if defined(__AVX2__) && VL >= 8
    __m256i a[8];
    for (int i = 0; i < 8; i++) {
#if VL == 16
        a[i] = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)acc[i]), _mm512_extracti64x4_epi64((__m512i)acc[i], 1));
#else
        a[i] = (__m256i)acc[i];
#endif
    }
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(a[4], a[5]), _mm256_hadd_epi32(a[6], a[7]));
    _mm256_storeu_si256((__m256i*)out, _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)));
#else
    for (int i = 0; i < 8; i++) {
        int32_t s[VL];
        memcpy(s, &acc[i], sizeof s);
        out[i] = 0;
        for (int j = 0; j < VL; j++) out[i] += s[j];
    }
#endif
}

// out[r][t] = q[r] . (codes of token t from `offset` on), for R rows `ldq` apart and C tokens at a time; n is a multiple of 8,
// `depth` one of W. What follows a token's codes counts nothing, for the query is padded with zeros.
template <int R, int C>
INLINE void dot_codes(const int16_t* q, i64 ldq, const int8_t* const* tokens, i64 offset, int n, int depth, int32_t* out) {
    for (int t = 0; t < n; t += C) {
        vi acc[R * C] = {};
        for (int d = 0; d < depth; d += W) {
            vs b[C];
            for (int c = 0; c < C; c++) b[c] = words(tokens[t + c] + offset + d);
            for (int r = 0; r < R; r++) {
                const vs a = words(q + r * ldq + d);
                for (int c = 0; c < C; c++) acc[r * C + c] = add_products(acc[r * C + c], a, b[c]);
            }
        }
        int32_t folded[R * C];
        for (int i = 0; i < R * C; i += 8) fold8(acc + i, folded + i);
        for (int r = 0; r < R; r++) memcpy(out + r * BLOCK + t, folded + r * C, C * 4);
    }
}

// What a task knows of pools of codes; nothing where they hold numbers.
template <class P>
struct Coded {
    static constexpr bool is = false;
    Coded(const Step&, const Task&, const int32_t*, int) {}
    void query(int, const float*) {}
};

template <>
struct Coded<int8_t> {
    static constexpr bool is = true;
    static constexpr int MOST_ROWS = 8;  // of a head: more have the codes of values as floats, once for all
    const Step& s;
    const Task& task;
    const int32_t* pages;
    const int parts, ldq;
    const int8_t *k_pool = nullptr, *v_pool = nullptr;
    int16_t* q;      // [all][ldq]
    float* q_scale;  // [all][parts]
    const int8_t *keys[BLOCK], *values[BLOCK];
    int first = 0, count = 0;
    float k_scale[2][BLOCK], v_scale[BLOCK];

    static int padded(i64 n) { return (int)((n + W - 1) / W * W); }
    Coded(const Step& s, const Task& task, const int32_t* pages, int all)
        : s(s), task(task), pages(pages), parts(s.split < s.D ? 2 : 1), ldq(padded(s.split) + padded(s.D - s.split)) {
        char* memory = (char*)scratch<8>((size_t)all * (ldq * sizeof(int16_t) + parts * sizeof(float)));
        q = (int16_t*)memory;
        q_scale = (float*)(memory + (size_t)all * ldq * sizeof(int16_t));
    }

    // Row r of the task, D floats: as large integers as its sums leave room for.
    void query(int r, const float* x) {
        int16_t* to = q + (size_t)r * ldq;
        for (int part = 0; part < parts; part++) {
            const i64 begin = part ? s.split : 0, n = part ? s.D - s.split : s.split;
            const float most = (float)std::min<i64>(32767, (((i64)1 << 31) - 1) / (127 * n)), top = largest(x + begin, n);
            const bool finite = top < INFINITY, some = finite && top >= TINY;
            q_scale[r * parts + part] = !finite ? NAN : some ? top / most : 0;
            const float inverse = most / top;
            for (i64 d = 0; d < padded(n); d += VL) {
                vf v = {};
                if (some && d < n) v = (d + VL <= n ? load(x + begin + d) : load_part(x + begin + d, n - d)) * inverse;
                const vi codes = rounded(v);
                for (int i = 0; i < VL; i++) to[d + i] = (int16_t)codes[i];
            }
            to += padded(n);
        }
    }

    // Positions [b0, b1) of the row from `from` on; places beside them repeat a neighbour.
    void find(const int8_t* keys_at, const int8_t* values_at, int from, int b0, int b1, int filled) {
        k_pool = keys_at;
        v_pool = values_at;
        first = from - b0;
        count = b1 - b0;
        i64 page = from / s.page_size, offset = from % s.page_size;
        for (int t = first; t < count; t++) {
            const i64 slot = (i64)pages[page] * s.page_size + offset;
            keys[t] = k_pool + slot * s.k_stride;
            values[t] = v_pool + slot * s.v_stride;
            if (++offset == s.page_size) offset = 0, page++;
        }
        for (int t = 0; t < first; t++) keys[t] = keys[first], values[t] = values[first];
        for (int t = count; t < filled; t++) keys[t] = keys[count - 1];
    }

    // p[rows][BLOCK]: the scores of the rows of the task's head h.
    void scores(int h, int rows, int filled, float* p) {
        const i64 head = task.head0 + h, codes = s.kv_heads * s.D, v_codes = s.kv_heads * s.V;
        for (int t = 0; t < BLOCK; t++) k_scale[0][t] = k_scale[1][t] = v_scale[t] = 0;
        for (int t = first; t < count; t++)
            for (int part = 0; part < parts; part++) k_scale[part][t] = scale_of(keys[t], codes, head * parts + part);
        for (int t = first; t < count; t++) v_scale[t] = v_pool == k_pool ? k_scale[0][t] : scale_of(values[t], v_codes, head);
        const int16_t* qh = q + (size_t)h * rows * ldq;
        const float* scale = q_scale + h * rows * parts;
        for (int part = 0; part < parts; part++) {
            const i64 offset = head * s.D + (part ? s.split : 0);
            const int depth = padded(part ? s.D - s.split : s.split), at = part ? padded(s.split) : 0;
            int32_t dots[4 * BLOCK];
            for (int r = 0; r < rows;) {
                const int16_t* from = qh + (size_t)r * ldq + at;
                const int now = r + 4 <= rows ? 4 : r + 2 <= rows ? 2 : 1;
                if (now == 4) dot_codes<4, WIDE ? 4 : 2>(from, ldq, keys, offset, filled, depth, dots);
                else if (now == 2) dot_codes<2, 4>(from, ldq, keys, offset, filled, depth, dots);
                else dot_codes<1, 8>(from, ldq, keys, offset, filled, depth, dots);
                for (int i = 0; i < now; i++, r++) {
                    const float own = scale[r * parts + part];
                    for (int t = 0; t < filled; t += VL) {
                        // Products beyond the eighths that were filled are never looked at.
                        vi dot;
                        memcpy(&dot, dots + i * BLOCK + t, sizeof dot);
                        const vf x = __builtin_convertvector(dot, vf) * (load(k_scale[part] + t) * own);
                        store(p + r * BLOCK + t, part ? load(p + r * BLOCK + t) + x : x);
                    }
                }
            }
        }
    }

    // Weights of values become those of their codes.
    void weigh(int, int rows, float* p) const {
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < BLOCK; t += VL) store(p + r * BLOCK + t, load(p + r * BLOCK + t) * load(v_scale + t));
    }

    // The codes of values as floats, where many rows want them.
    bool widened(int h, int rows, int t0, int t1, int depth, float* buffer, const float** out) const {
        if (rows <= MOST_ROWS) return false;
        const i64 offset = (task.head0 + h) * s.V;
        for (int t = t0; t < t1; t++) {
            float* to = buffer + (t - t0) * depth;
            for (int d = 0; d < depth; d += VL) store(to + d, load_codes(values[t] + offset + d));
            out[t] = to;
        }
        return true;
    }

    // As accumulate_part does, from codes.
    template <int R, int V>
    static MEMBER void some_rows(float* o, const float* alpha, const float* p, const int8_t* const* v, i64 offset, int t0, int t1, int depth, int d) {
        vf acc[R][V];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) acc[r][i] = load(o + r * depth + d + i * VL) * alpha[r];
        for (int t = t0; t < t1; t++) {
            vf b[V];
            for (int i = 0; i < V; i++) b[i] = load_codes(v[t] + offset + d + i * VL);
            for (int r = 0; r < R; r++) {
                const vf a = splat(p[r * BLOCK + t]);
                for (int i = 0; i < V; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) store(o + r * depth + d + i * VL, acc[r][i]);
    }
    template <int V, class End>
    void rows_of(float* o, const float* alpha, const float* p, int rows, i64 offset, int t0, End end, int depth, int d) const {
        int r = 0;
        for (; r + 4 <= rows; r += 4) some_rows<4, V>(o + r * depth, alpha + r, p + r * BLOCK, values, offset, t0, end(r + 3), depth, d);
        const float *some = p + r * BLOCK, *factor = alpha + r;
        float* to = o + r * depth;
        if (rows - r == 3) some_rows<3, V>(to, factor, some, values, offset, t0, end(rows - 1), depth, d);
        if (rows - r == 2) some_rows<2, V>(to, factor, some, values, offset, t0, end(rows - 1), depth, d);
        if (rows - r == 1) some_rows<1, V>(to, factor, some, values, offset, t0, end(rows - 1), depth, d);
    }
    template <class End>
    void accumulate(int h, float* o, const float* alpha, const float* p, int rows, int t0, End end, int depth) const {
        const i64 offset = (task.head0 + h) * s.V;
        int d = 0;
        for (; d + 2 * VL <= depth; d += 2 * VL) rows_of<2>(o, alpha, p, rows, offset, t0, end, depth, d);
        for (; d < depth; d += VL) rows_of<1>(o, alpha, p, rows, offset, t0, end, depth, d);
    }
};
