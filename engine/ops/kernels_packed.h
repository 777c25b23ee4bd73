// Matrix products with weights that stay in GGUF's blocks: part of kernels.cpp, which includes this inside its namespace.
//
// A row of the input is brought to 16 bits in blocks of 32 with a float scale each; its products with the codes of a block
// are summed as integers, exactly, and only these sums meet the scales, in one fixed order along K. So a row has the same
// bits in any batch, and the error is that of 16 bits: 1e-5 of a block's largest input.

// How a type's weights are made: (code - offset) * scale (+ low).
enum Low { NO_LOW, PLUS, MINUS };                 // PLUS: a number like d beside it. MINUS: dmin times a byte, taken away
enum Table { PLAIN, IQ4, E2M1 };                  // what a code of four bits stands for
enum Unit { HALF, POWER, SINGLE, ONE };           // d: a float16, a byte that is an exponent, a float32, or nothing
// base, high: bits of a code, high ones apart. span: weights that share a scale; super: that share d. sub: a byte for every
// span that multiplies d, 1 without a sign, 2 with one, 3 for half a byte whose other half is the span's part of low, 4 for a float32
// in place of d and a byte. size: of super weights in the file.
#define FORMAT(name, number_, base_, high_, offset_, span_, super_, sub_, low_, table_, unit_, size_)                        \
    struct name {                                                                                                             \
        static constexpr int number = number_, base = base_, high = high_, offset = offset_, span = span_, super = super_,    \
                             sub = sub_, low = low_, table = table_, unit = unit_, size = size_;                              \
        static void split(const uint8_t* block, struct Split& to);                                                            \
    };
// numbers: those of the file format.
FORMAT(Q4_0, 2, 4, 0, 8, 32, 32, 0, NO_LOW, PLAIN, HALF, 18)
FORMAT(Q4_1, 3, 4, 0, 0, 32, 32, 0, PLUS, PLAIN, HALF, 20)
FORMAT(Q5_0, 6, 4, 1, 16, 32, 32, 0, NO_LOW, PLAIN, HALF, 22)
FORMAT(Q5_1, 7, 4, 1, 0, 32, 32, 0, PLUS, PLAIN, HALF, 24)
FORMAT(Q8_0, 8, 8, 0, 0, 32, 32, 0, NO_LOW, PLAIN, HALF, 34)
FORMAT(Q2_K, 10, 2, 0, 0, 16, 256, 3, MINUS, PLAIN, HALF, 84)
FORMAT(Q3_K, 11, 2, 1, 4, 16, 256, 2, NO_LOW, PLAIN, HALF, 110)
FORMAT(Q4_K, 12, 4, 0, 0, 32, 256, 1, MINUS, PLAIN, HALF, 144)
FORMAT(Q5_K, 13, 4, 1, 0, 32, 256, 1, MINUS, PLAIN, HALF, 176)
FORMAT(Q6_K, 14, 4, 2, 32, 16, 256, 2, NO_LOW, PLAIN, HALF, 210)
FORMAT(IQ4_NL, 20, 4, 0, 0, 32, 32, 0, NO_LOW, IQ4, HALF, 18)
FORMAT(IQ4_XS, 23, 4, 0, 0, 32, 256, 2, NO_LOW, IQ4, HALF, 136)
FORMAT(TQ2_0, 35, 2, 0, 1, 32, 256, 0, NO_LOW, PLAIN, HALF, 66)
FORMAT(MXFP4, 39, 4, 0, 0, 32, 32, 0, NO_LOW, E2M1, POWER, 17)
// Not in files: codes with scales that are no float16.
FORMAT(INT4, 100, 4, 0, 8, 32, 32, 0, NO_LOW, PLAIN, SINGLE, 20)
FORMAT(INT4_LOW, 101, 4, 0, 0, 32, 32, 0, PLUS, PLAIN, SINGLE, 24)
FORMAT(INT8, 102, 8, 0, 0, 32, 32, 0, NO_LOW, PLAIN, SINGLE, 36)
FORMAT(INT8_LOW, 103, 8, 0, 0, 32, 32, 0, PLUS, PLAIN, SINGLE, 40)
FORMAT(FLOAT4, 104, 4, 0, 0, 16, 32, 4, NO_LOW, E2M1, ONE, 24)
#undef FORMAT
#define EVERY_FORMAT(DO) \
    DO(Q4_0) DO(Q4_1) DO(Q5_0) DO(Q5_1) DO(Q8_0) DO(Q2_K) DO(Q3_K) DO(Q4_K) DO(Q5_K) DO(Q6_K) DO(IQ4_NL) DO(IQ4_XS) DO(TQ2_0) DO(MXFP4) \
    DO(INT4) DO(INT4_LOW) DO(INT8) DO(INT8_LOW) DO(FLOAT4)

// ---- a block of the file, taken apart: codes in the order of the weights, d and dmin as they are, bytes of the spans

struct Split {
    uint8_t codes[256];
    uint8_t scales[16], lows[16];
    uint32_t d, m;     // as many of their bytes as there are
    uint32_t wide[2];  // scales that are floats
};

INLINE void put_nibbles(const uint8_t* from, int count, uint8_t* to) {  // low halves, then high ones
    for (int i = 0; i < count; i++) {
        to[i] = from[i] & 15;
        to[count + i] = from[i] >> 4;
    }
}
INLINE uint16_t u16_at(const uint8_t* p) { return (uint16_t)(p[0] | p[1] << 8); }
INLINE uint32_t u32_at(const uint8_t* p) { return u16_at(p) | (uint32_t)u16_at(p + 2) << 16; }
INLINE void fifth_bits(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 4; i++) {  // a byte for each bit
        uint64_t bits = from[i] * 0x0101010101010101u & 0x8040201008040201u, eight;
        bits = (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
        memcpy(&eight, codes + 8 * i, 8);
        eight |= bits << 4;
        memcpy(codes + 8 * i, &eight, 8);
    }
}
INLINE void two_bits(const uint8_t* from, uint8_t* codes) {
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) codes[32 * j + i] = from[j / 4 * 32 + i] >> (2 * (j % 4)) & 3;
}
INLINE void six_bits(const uint8_t* from, Split& to) {
    for (int j = 0; j < 4; j++) {
        to.scales[j] = from[j] & 63;
        to.lows[j] = from[4 + j] & 63;
        to.scales[4 + j] = (from[8 + j] & 15) | (from[j] >> 6) << 4;
        to.lows[4 + j] = from[8 + j] >> 4 | (from[4 + j] >> 6) << 4;
    }
}
void Q4_0::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b);
    put_nibbles(b + 2, 16, to.codes);
}
void Q4_1::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b), to.m = u16_at(b + 2);
    put_nibbles(b + 4, 16, to.codes);
}
void Q5_0::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b);
    put_nibbles(b + 6, 16, to.codes);
    fifth_bits(b + 2, to.codes);
}
void Q5_1::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b), to.m = u16_at(b + 2);
    put_nibbles(b + 8, 16, to.codes);
    fifth_bits(b + 4, to.codes);
}
void Q8_0::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b);
    memcpy(to.codes, b + 2, 32);
}
void Q2_K::split(const uint8_t* b, Split& to) {
    memcpy(to.scales, b, 16);
    two_bits(b + 16, to.codes);
    to.d = u16_at(b + 80), to.m = u16_at(b + 82);
}
void Q3_K::split(const uint8_t* b, Split& to) {
    two_bits(b + 32, to.codes);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) to.codes[32 * j + i] |= (b[i] >> j & 1) << 2;
    for (int k = 0; k < 16; k++) {
        const int low = k < 8 ? b[96 + k] & 15 : b[96 + k - 8] >> 4;
        to.scales[k] = (uint8_t)((low | (b[104 + k % 4] >> (2 * (k / 4)) & 3) << 4) - 32);
    }
    to.d = u16_at(b + 108);
}
void Q4_K::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b), to.m = u16_at(b + 2);
    six_bits(b + 4, to);
    for (int i = 0; i < 4; i++) put_nibbles(b + 16 + 32 * i, 32, to.codes + 64 * i);
}
void Q5_K::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b), to.m = u16_at(b + 2);
    six_bits(b + 4, to);
    for (int i = 0; i < 4; i++) put_nibbles(b + 48 + 32 * i, 32, to.codes + 64 * i);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) to.codes[32 * j + i] |= (b[16 + i] >> j & 1) << 4;
}
void Q6_K::split(const uint8_t* b, Split& to) {
    for (int i = 0; i < 2; i++) put_nibbles(b + 64 * i, 64, to.codes + 128 * i);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) to.codes[32 * j + i] |= (b[128 + j / 4 * 32 + i] >> (2 * (j % 4)) & 3) << 4;
    memcpy(to.scales, b + 192, 16);
    to.d = u16_at(b + 208);
}
void IQ4_NL::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b);
    put_nibbles(b + 2, 16, to.codes);
}
void IQ4_XS::split(const uint8_t* b, Split& to) {
    to.d = u16_at(b);
    const int high = u16_at(b + 2);
    for (int k = 0; k < 8; k++) {
        to.scales[k] = (uint8_t)(((b[4 + k / 2] >> (4 * (k % 2)) & 15) | (high >> (2 * k) & 3) << 4) - 32);
        put_nibbles(b + 8 + 16 * k, 16, to.codes + 32 * k);
    }
}
void TQ2_0::split(const uint8_t* b, Split& to) {
    two_bits(b, to.codes);
    to.d = u16_at(b + 64);
}
void MXFP4::split(const uint8_t* b, Split& to) {
    to.d = b[0];
    put_nibbles(b + 1, 16, to.codes);
}
void INT4::split(const uint8_t* b, Split& to) {
    to.d = u32_at(b);
    put_nibbles(b + 4, 16, to.codes);
}
void INT4_LOW::split(const uint8_t* b, Split& to) {
    to.d = u32_at(b), to.m = u32_at(b + 4);
    put_nibbles(b + 8, 16, to.codes);
}
void INT8::split(const uint8_t* b, Split& to) {
    to.d = u32_at(b);
    memcpy(to.codes, b + 4, 32);
}
void INT8_LOW::split(const uint8_t* b, Split& to) {
    to.d = u32_at(b), to.m = u32_at(b + 4);
    memcpy(to.codes, b + 8, 32);
}
void FLOAT4::split(const uint8_t* b, Split& to) {
    to.d = 0;
    for (int i = 0; i < 2; i++) to.wide[i] = u32_at(b + 4 * i);
    put_nibbles(b + 8, 16, to.codes);
}

// ---- panels of NR columns: for each `super` weights along K the d of all columns, their m, the bytes of the spans, and for
// each 32 weights words of codes. A 16-bit half of a word holds weights of one parity: pair i is weights 2i and 2i + 1.

typedef int16_t vs __attribute__((vector_size(VL * 4)));
typedef uint16_t vw __attribute__((vector_size(VL * 4)));
typedef uint8_t vc __attribute__((vector_size(VL)));
typedef int8_t vsc __attribute__((vector_size(VL)));
typedef uint8_t vc_any __attribute__((vector_size(VL), aligned(1), may_alias));

constexpr int PACK = 32;        // weights that a row's block of 16-bit inputs is for
constexpr int PAIRS = PACK / 2;

template <class F>
struct Layout {
    static constexpr int blocks = F::super / PACK, spans = F::super / F::span, words = F::base + F::high;
    static constexpr size_t d_size = F::unit == HALF ? 2 : F::unit == POWER ? 1 : F::unit == SINGLE ? 4 : 0, m_size = F::unit == SINGLE ? 4 : 2;
    static constexpr size_t d_bytes = d_size * NR, m_bytes = F::low ? m_size * NR : 0;
    static constexpr size_t span_bytes = F::sub == 4 ? 4 * NR : F::sub ? (F::low && F::sub != 3 ? 2 : 1) * NR : 0;
    static constexpr size_t head = d_bytes + m_bytes + spans * span_bytes, block_bytes = (size_t)words * 4 * NR;
    static constexpr size_t bytes = head + blocks * block_bytes;
};

// Finite float16; exact also where it is below the normal numbers.
INLINE vf from_half(const uint8_t* p) {
#if defined(__F16C__) && VL == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX512F__) && VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    const vu h = __builtin_convertvector((vh) * (const vh_any*)p, vu);
    return (vf)((vu)((vf)((h & 0x7fff) << 13) * 5.192296858534828e33f) | (h & 0x8000) << 16);  // 2^112
#endif
}
template <bool Signed>
INLINE vi widened(vc b) {
#if defined(__AVX2__) && VL == 8  // written out: GCC 12 takes short vectors of bytes apart
    const __m128i x = _mm_cvtsi64_si128((long long)b);
    return (vi)(Signed ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#elif defined(__AVX512F__) && VL == 16
    return (vi)(Signed ? _mm512_cvtepi8_epi32((__m128i)b) : _mm512_cvtepu8_epi32((__m128i)b));
#else
    return Signed ? __builtin_convertvector((vsc)b, vi) : __builtin_convertvector(b, vi);
#endif
}
INLINE vf from_power(const uint8_t* p) {  // half of 2^(e - 127)
    const vu e = (vu)widened<false>(*(const vc_any*)p);
    return (vf)(e > 1 ? (e - 1) << 23 : 0x00200000u << (e & 1));
}

// d and m of half a panel, then scale and low of a span; the same operations wherever they are needed.
template <class F>
INLINE vf scale_of(const uint8_t* at, int h) {
    if (F::unit == SINGLE) return load((const float*)at + h * VL);
    return F::unit == POWER ? from_power(at + h * VL) : F::unit == HALF ? from_half(at + h * VL * 2) : vf{};
}
template <class F>
INLINE vf low_of(const uint8_t* at, int h) {
    if (F::low && F::unit == SINGLE) return load((const float*)(at + Layout<F>::d_bytes) + h * VL);
    return F::low ? from_half(at + Layout<F>::d_bytes + h * VL * 2) : vf{};
}
template <class F>
INLINE vc span_byte(const uint8_t* at, int span, int h) {
    return *(const vc_any*)(at + Layout<F>::d_bytes + Layout<F>::m_bytes + span * Layout<F>::span_bytes + h * VL);
}
template <class F>
INLINE vf span_scale(vf d, const uint8_t* at, int span, int h) {
    if (!F::sub) return d;
    if (F::sub == 4) return load((const float*)(at + span * Layout<F>::span_bytes) + h * VL);
    const vi b = widened<F::sub == 2>(span_byte<F>(at, span, h));
    return d * __builtin_convertvector(F::sub == 3 ? b & 15 : b, vf);
}
template <class F>
INLINE vf span_low(vf m, const uint8_t* at, int span, int h) {
    if (F::low != MINUS) return m;
    const vi b = widened<false>(span_byte<F>(F::sub == 3 ? at : at + NR, span, h));
    return -(m * __builtin_convertvector(F::sub == 3 ? b >> 4 : b, vf));
}

alignas(64) const int8_t TABLES[3][16] = {
    {},
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
};
INLINE vu looked_up(vu index, const int8_t* table) {  // of bytes below 16
#if defined(__AVX2__) && VL == 8
    return (vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), (__m256i)index);
#elif defined(__AVX512BW__) && VL == 16
    return (vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)index);
#elif defined(__aarch64__) && VL == 4
    return (vu)vqtbl1q_u8(vld1q_u8((const uint8_t*)table), (uint8x16_t)index);
#else
    uint8_t bytes[4 * VL];
    memcpy(bytes, &index, sizeof bytes);
    for (int i = 0; i < 4 * VL; i++) bytes[i] = (uint8_t)table[bytes[i]];
    memcpy(&index, bytes, sizeof bytes);
    return index;
#endif
}
// sum + the products of pairs of 16-bit numbers, of which no two are -2^15.
INLINE vi add_products(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__) && VL == 16
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && VL == 16
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && VL == 8
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && VL == 8
    sum += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm volatile("" : "+x"(sum));  // here and now: GCC puts additions off, and keeps all products on the stack meanwhile
    return sum;
#elif defined(__aarch64__) && VL == 4
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return sum + (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#elif defined(__SSE2__) && VL == 4
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

// The same for both halves of a panel and one word of the input. On AVX2 written out: two numbers in between are all that is
// left beside twelve sums and two halves of codes. GCC by itself keeps sums on the stack, for two thirds of the speed.
INLINE void add_word(vi* sum, vs a, vs b, const uint32_t* in) {
#if defined(__AVX2__) && VL == 8 && !defined(__AVXVNNI__)
    vi t, u;
    asm volatile(
        "vpbroadcastd %6, %2\n\tvpmaddwd %2, %4, %3\n\tvpmaddwd %2, %5, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
        : "+x"(sum[0]), "+x"(sum[1]), "=&x"(t), "=&x"(u)
        : "x"(a), "x"(b), "m"(*in));
#else
    const vs x = (vs)(vi)(*in - (vu){});
    sum[0] = add_products(sum[0], a, x);
    sum[1] = add_products(sum[1], b, x);
#endif
}

// Pair i of the block of 32 at `at`, for the columns of half h.
template <class F>
INLINE vs pair_of(const uint8_t* at, int i, int h) {
    auto word = [&](int w) { return *(const vu_any*)(at + (size_t)(w * NR + h * VL) * 4); };
    if (F::table || F::base == 8) {
        vw w;
        if (F::table) w = (vw)looked_up((word(i / 4) >> (i % 4 / 2 * 4)) & 0x0f0f0f0fu, TABLES[F::table]);
        else w = (vw)word(i / 2);
        return i % 2 ? (vs)w >> 8 : (vs)(w << 8) >> 8;
    }
    constexpr int each = 16 / F::base;  // pairs of a word
    const vw w = (vw)word(i / each);
    const int s = i % each;
    vw v = s == each - 1 ? w >> (F::base * s) : (w >> (F::base * s)) & (uint16_t)((1 << F::base) - 1);
    if (F::high) {
        constexpr int of = 16 / (F::high ? F::high : 1), mask = ((1 << F::high) - 1) << F::base;
        const vw more = (vw)word(F::base + i / of);
        const int from = i % of * F::high;
        v |= (from < F::base ? more << (F::base > from ? F::base - from : 0) : more >> (from > F::base ? from - F::base : 0)) & (uint16_t)mask;
    }
    return (vs)v;
}

// ---- packing

// rows[n]: the blocks of row n. False where a scale is no finite number: of row `bad`.
template <class F>
void pack_blocks(const uint8_t* const* rows, i64 N, i64 K, uint8_t* out, i64* bad, int threads) {
    typedef Layout<F> L;
    const i64 supers = K / F::super;
    std::atomic<i64> wrong{-1};
    parallel((N + NR - 1) / NR, threads, [&](i64 p) {
        uint8_t* to = out + (size_t)p * supers * L::bytes;
        memset(to, 0, supers * L::bytes);
        for (int j = 0; j < NR && p * NR + j < N; j++) {
            const uint8_t* row = rows[p * NR + j];
            for (i64 s = 0; s < supers; s++) {
                Split split;
                F::split(row + s * F::size, split);
                const uint32_t endless = F::unit == POWER ? 255 : F::unit == HALF ? 0x7c00 : 0x7f800000;
                if ((split.d & endless) == endless || (F::low && (split.m & endless) == endless)) wrong = p * NR + j;
                uint8_t* at = to + s * L::bytes;
                memcpy(at + L::d_size * j, &split.d, L::d_size);
                if (F::low) memcpy(at + L::d_bytes + L::m_size * j, &split.m, L::m_size);
                if (F::sub == 4)
                    for (int i = 0; i < L::spans; i++) {
                        if ((split.wide[i] & endless) == endless) wrong = p * NR + j;
                        memcpy(at + i * L::span_bytes + 4 * j, split.wide + i, 4);
                    }
                else if (F::sub)
                    for (int i = 0; i < L::spans; i++) {
                        uint8_t* bytes = at + L::d_bytes + L::m_bytes + i * L::span_bytes + j;
                        *bytes = split.scales[i];
                        if (F::low && F::sub != 3) bytes[NR] = split.lows[i];
                    }
                for (int b = 0; b < L::blocks; b++) {
                    const uint8_t* codes = split.codes + b * PACK;
                    uint32_t words[L::words] = {};
#pragma GCC unroll 32
                    for (int k = 0; k < PACK; k++) {  // unrolled, places in words are constants
                        const int i = k / 2, half = k % 2 * 16;
                        const uint32_t q = codes[k];
                        if (F::base == 8) words[i / 2] |= q << (half + i % 2 * 8);
                        else if (F::table) words[i / 4] |= q << (half + i % 2 * 8 + i % 4 / 2 * 4);
                        else words[i * F::base / 16] |= (q & ((1u << F::base) - 1)) << (half + i * F::base % 16);
                        if (F::high) words[F::base + i * F::high / 16] |= (q >> F::base) << (half + i * F::high % 16);
                    }
                    for (int w = 0; w < L::words; w++) memcpy(at + L::head + b * L::block_bytes + (size_t)(w * NR + j) * 4, words + w, 4);
                }
            }
        }
    });
    *bad = wrong;
}

// ---- the input, of which `rows` of m are there: pairs [K / 2][m] of 16 bits, scales [K / 32][m], and for each span what the offset or the low makes of its sum

struct Inputs {
    uint32_t* pairs;  // or, of eight bits, quads [K / 4][m]
    float* scales;
    uint32_t* sums;  // -offset * sum as an integer, or scale * sum as a float
};

INLINE vi splat_i(uint32_t x) { return (vi)(x - (vu){}); }
INLINE float as_float(uint32_t x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}

// ---- products

// Panels lie behind one another, so what comes AHEAD bytes later is the same stream: the hardware alone follows it to the end
// of a page and starts anew. Measured on a Zen 3, one row: from 60-70% of the read bandwidth to 80-90%.
constexpr int AHEAD_PACKED = 4096;
template <class F>
INLINE void fetch_block(const uint8_t* super, int b, size_t ahead) {  // the share of block b in so many bytes later
    constexpr size_t share = Layout<F>::bytes / Layout<F>::blocks;
    const char* from = (const char*)super + ahead + b * share;
    for (size_t i = 0; i < share; i += 64) __builtin_prefetch(from + i, 0, 3);
}

// One row with a panel: codes go from memory to registers and no further.
template <class F>
__attribute__((noinline)) void packed_row(const Inputs& x, i64 supers, const uint8_t* at, float* c) {
    typedef Layout<F> L;
    constexpr int each = F::span / 2;  // pairs of a span
    vf total[2] = {};
    const uint32_t *pairs = x.pairs, *sums = x.sums;
    const float* scales = x.scales;
    for (i64 s = 0; s < supers; s++, at += L::bytes) {
        vf d[2], m[2];
        for (int h = 0; h < 2; h++) d[h] = scale_of<F>(at, h), m[h] = low_of<F>(at, h);
        const uint8_t* codes = at + L::head;
#pragma GCC unroll 1
        for (int b = 0; b < L::blocks; b++, codes += L::block_bytes, pairs += PAIRS, sums += PACK / F::span, scales++) {
            const vf scale = splat(*scales);
            fetch_block<F>(at, b, AHEAD_PACKED);
#pragma GCC unroll 2
            for (int part = 0; part < PACK / F::span; part++) {
                vi sum[2];
                for (int h = 0; h < 2; h++) sum[h] = F::offset ? splat_i(sums[part]) : vi{};
#pragma GCC unroll 16
                for (int i = part * each; i < (part + 1) * each; i++) {
                    const vs a = (vs)splat_i(pairs[i]);
                    for (int h = 0; h < 2; h++) sum[h] = add_products(sum[h], pair_of<F>(codes, i, h), a);
                }
                const int span = b * (PACK / F::span) + part;
                for (int h = 0; h < 2; h++) {
                    total[h] = fma(__builtin_convertvector(sum[h], vf) * scale, span_scale<F>(d[h], at, span, h), total[h]);
                    if (F::low) total[h] = fma(splat(as_float(sums[part])), span_low<F>(m[h], at, span, h), total[h]);
                }
            }
        }
    }
    for (int h = 0; h < 2; h++) store(c + h * VL, total[h]);
}

// The same for M rows, each by the operations that packed_row has; c [M][ldc].
template <class F, int M>
__attribute__((noinline)) void packed_few(const Inputs& x, i64 supers, const uint8_t* at, float* c, int ldc) {
    typedef Layout<F> L;
    constexpr int each = F::span / 2;
    const uint32_t *pairs = x.pairs, *sums = x.sums;
    const float* scales = x.scales;
    for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) store(c + (size_t)m * ldc + h * VL, vf{});
    for (i64 s = 0; s < supers; s++, at += L::bytes) {
        const uint8_t* codes = at + L::head;
#pragma GCC unroll 1
        for (int b = 0; b < L::blocks; b++, codes += L::block_bytes, pairs += PAIRS * M, sums += PACK / F::span * M, scales += M) {
            fetch_block<F>(at, b, AHEAD_PACKED);
#pragma GCC unroll 2
            for (int part = 0; part < PACK / F::span; part++) {
                vi sum[M][2];
                for (int m = 0; m < M; m++)
                    for (int h = 0; h < 2; h++) sum[m][h] = F::offset ? splat_i(sums[part * M + m]) : vi{};
#pragma GCC unroll 16
                for (int i = part * each; i < (part + 1) * each; i++) {
                    const vs low = pair_of<F>(codes, i, 0), high = pair_of<F>(codes, i, 1);
                    for (int m = 0; m < M; m++) add_word(sum[m], low, high, pairs + i * M + m);
                }
                const int span = b * (PACK / F::span) + part;
                for (int h = 0; h < 2; h++) {
                    const vf scale = span_scale<F>(scale_of<F>(at, h), at, span, h), low = span_low<F>(low_of<F>(at, h), at, span, h);
                    for (int m = 0; m < M; m++) {
                        float* to = c + (size_t)m * ldc + h * VL;
                        vf total = fma(__builtin_convertvector(sum[m][h], vf) * splat(scales[m]), scale, load(to));
                        if (F::low) total = fma(splat(as_float(sums[part * M + m])), low, total);
                        store(to, total);
                    }
                }
            }
        }
    }
}
constexpr int FEW[2] = {4, 6};  // its M; other numbers of rows are filled up with rows of zeros, which cost less than more code
// Up to how many rows such tiles alone make the product. With eight lanes they are quicker than tiles of unpacked codes: 62
// against 50 products a ns, measured on a Zen 3, and 46 against 40 where each tile of sixteen weights has a scale.
constexpr int FEW_ROWS = VL == 8 ? MB : FEW[1];

constexpr int CHUNK = 256;  // weights along K that are unpacked at once, for all rows
struct Unpacked {
    alignas(64) uint32_t pairs[CHUNK / 2 * NR];
    alignas(64) float scales[CHUNK / 16 * NR], lows[CHUNK / 16 * NR];
};

// Scales and lows of the super weights at `at`, which come `done` behind the first.
template <class F>
INLINE void unpack_scales(const uint8_t* at, int done, Unpacked& to) {
    typedef Layout<F> L;
    for (int h = 0; h < 2; h++) {
        const vf d = scale_of<F>(at, h), m = low_of<F>(at, h);
        for (int span = 0; span < L::spans; span++) {
            const int place = (done / F::span + span) * NR + h * VL;
            store(to.scales + place, span_scale<F>(d, at, span, h));
            if (F::low) store(to.lows + place, span_low<F>(m, at, span, h));
        }
    }
}

// Weights [k, k + count) of a panel; k is a multiple of CHUNK. ahead: how many bytes later those are that come next.
template <class F>
void unpack(const uint8_t* panel, i64 k, int count, size_t ahead, Unpacked& to) {
    typedef Layout<F> L;
    for (int done = 0; done < count; done += F::super) {
        const uint8_t* at = panel + (k + done) / F::super * L::bytes;
        unpack_scales<F>(at, done, to);
        for (int b = 0; b < L::blocks; b++) {
            fetch_block<F>(at, b, ahead);
#pragma GCC unroll 16
            for (int i = 0; i < PAIRS; i++)
                for (int h = 0; h < 2; h++)
                    *(vu_any*)(to.pairs + ((done + b * PACK) / 2 + i) * NR + h * VL) = (vu)pair_of<F>(at + L::head + b * L::block_bytes, i, h);
        }
    }
}

// M rows by the unpacked part of a panel: c [M][ldc] gets as packed_row would.
template <int M, bool Add>
__attribute__((noinline)) void packed_tile(const Inputs& x, const Unpacked& w, int span, int count, float* c, int ldc) {
    const uint32_t *pairs = x.pairs, *codes = w.pairs, *sums = x.sums;
    const float *scale = w.scales, *low = w.lows;
    for (int k = 0; k < count; k += span, sums += M, scale += NR, low += NR) {
        const float* scales = x.scales + k / PACK * M;
        vi sum[M][2];
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) sum[m][h] = Add ? vi{} : splat_i(sums[m]);
#pragma GCC unroll 2
        for (int i = 0; i < span / 2; i++, pairs += M, codes += NR) {
            const vs a = (vs) * (const vu_any*)codes, b = (vs) * (const vu_any*)(codes + VL);
            for (int m = 0; m < M; m++) add_word(sum[m], a, b, pairs + m);
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) {
                float* to = c + (size_t)m * ldc + h * VL;
                vf total = fma(__builtin_convertvector(sum[m][h], vf) * splat(scales[m]), load(scale + h * VL), load(to));
                if (Add) total = fma(splat(as_float(sums[m])), load(low + h * VL), total);
                store(to, total);
            }
    }
}

template <bool Add>
void packed_tiles(int m, const Inputs& x, const Unpacked& w, int span, int count, float* c, int ldc) {
    switch (m) {
#define CASE(n) \
    case n: return packed_tile<n, Add>(x, w, span, count, c, ldc);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

#include "kernels_packed8.h"

// A type as the loops around it see it, so that they are compiled once.
struct Format {
    int span, super, offset;
    bool low;
    int bits, base, run;  // of the inputs; see Eight
    size_t bytes;         // of a panel's super weights
    void (*row)(const Inputs&, i64 supers, const uint8_t* panel, float* c);
    void (*few[2])(const Inputs&, i64 supers, const uint8_t* panel, float* c, int ldc);
    void (*unpack)(const uint8_t* panel, i64 k, int count, size_t ahead, Unpacked& to);

    MEMBER void tiles(int m, const Inputs& x, const Unpacked& w, int count, float* c, int ldc) const {
        if (bits == 8) packed_tiles8(m, low, run, x, w, span, count, c, ldc);
        else if (low) packed_tiles<true>(m, x, w, span, count, c, ldc);
        else packed_tiles<false>(m, x, w, span, count, c, ldc);
    }
};
// eight: inputs of eight bits, of a type for which there are products of bytes.
template <class F>
Format format_of(bool eight) {
    if constexpr (Eight<F>::can)
        if (eight)
            return {F::span, F::super, F::offset, F::low != NO_LOW, 8, F::base, Eight<F>::run, Layout<F>::bytes, packed_row8<F>,
                    {packed_few8<F, FEW[0]>, packed_few8<F, FEW[1]>}, unpack8<F>};
    return {F::span, F::super, F::offset, F::low != NO_LOW, 16, F::base, 0, Layout<F>::bytes, packed_row<F>,
            {packed_few<F, FEW[0]>, packed_few<F, FEW[1]>}, unpack<F>};
}

// Rows of a tile in blocks of PACK: the nearest of -127 .. 127 or of 16 bits of a block's largest.
template <bool Eight, class X>
void quantise_rows(const X* x, i64 ldx, int rows, int m, i64 K, const Format& f, const Inputs& to) {
    constexpr float top = Eight ? 127.0f : 32767.0f;
    constexpr int words = Eight ? PACK / 4 : PAIRS;
    const int each = PACK / f.span;
    const vf magic = splat(12582912.0f);
    uint8_t order[16];  // of the bytes: what of 16 neighbours comes where
    for (int i = 0; i < 16; i++) {
        const int per = 32 / f.base, quad = i / 4 % (per / 4), byte = i % 4;
        order[i] = (uint8_t)(i / per * per + 2 * quad + byte % 2 * (per / 2) + byte / 2);
    }
    for (int r = 0; r < rows; r++)
        for (i64 b = 0; b < K / PACK; b++) {
            const X* from = x + r * ldx + b * PACK;
            vf v[PACK / VL], most = {}, wrong = {};
            for (int i = 0; i < PACK / VL; i++) {
                v[i] = load(from + i * VL);
                most = vmax(v[i], vmax(-v[i], most));
                wrong += v[i] - v[i];  // 0, or NaN of what is no finite number
            }
            const float largest = max_lanes(most), scale = largest > 1e-30f ? largest / top : 0.0f;
            const vf inverse = splat(largest > 1e-30f ? top / largest : 0.0f);
            alignas(64) int32_t codes[PACK];
            for (int i = 0; i < PACK / VL; i++)
                *(vi*)(codes + i * VL) = __builtin_convertvector(fma(v[i], inverse, magic) - magic, vi);
            const float s = scale + sum_lanes(wrong);
            to.scales[b * m + r] = s;
            uint32_t packed[words];
            if (Eight) {
                uint8_t bytes[PACK];
                for (int i = 0; i < PACK; i++) bytes[i] = (uint8_t)codes[i];
                put_in_order(bytes, order, (uint8_t*)packed);
            } else {
                uint16_t halves[PACK];
                for (int i = 0; i < PACK; i++) halves[i] = (uint16_t)codes[i];
                memcpy(packed, halves, sizeof packed);
            }
            for (int i = 0; i < words; i++) to.pairs[(b * words + i) * m + r] = packed[i];
            for (int i = 0; i < each; i++) {
                int32_t sum = 0;
                if (each == 1) for (int k = 0; k < PACK; k++) sum += codes[k];
                else for (int k = 0; k < PACK / 2; k++) sum += codes[i * (PACK / 2) + k];
                const float product = s * (float)sum;
                const int32_t start = -f.offset * sum;
                memcpy(to.sums + (b * each + i) * m + r, f.low ? (const void*)&product : (const void*)&start, 4);
            }
        }
}

template <class X>
void packed_linear(const Format& f, const X* x, i64 ldx, i64 M, i64 K, const uint8_t* w, i64 N, const float* bias, X* out, i64 ldo,
                   int threads) {
    const i64 panels = (N + NR - 1) / NR, supers = K / f.super;
    const size_t panel = (size_t)supers * f.bytes;
    threads = limit_threads(threads, (double)M * N * K, 262144);
    int group = GROUP;
    while (group > 1 && panels < (i64)group * threads * 4) group /= 2;
    const i64 blocks = K / PACK, sums = K / f.span;
    for (i64 m0 = 0; m0 < M; m0 += MB) {
        const int rows = (int)std::min<i64>(MB, M - m0);
        // Few rows: tiles of FEW, sixes before fours, the last filled up. More: tiles of nearly equal height.
        const bool few = rows > 1 && rows <= FEW_ROWS;
        const int all = !few ? rows : rows <= FEW[0] ? FEW[0] : (rows + 1) / 2 * 2, fours = few ? (FEW[1] - all % FEW[1]) % FEW[1] / 2 : 0;
        const int tiles = few ? (all + 2 * fours) / FEW[1] : (rows + MR - 1) / MR, low = all / tiles, extra = all % tiles;
        auto start = [&](int t) {
            return few ? t * FEW[1] - std::max(0, t - (tiles - fours)) * (FEW[1] - FEW[0]) : t * low + std::min(t, extra);
        };
        const i64 words = K * f.bits / 32;  // of a row's numbers
        uint32_t* room = (uint32_t*)scratch<0>((size_t)all * (words + blocks + sums) * 4);
        if (all > rows) memset(room, 0, (size_t)all * (words + blocks + sums) * 4);
        auto inputs = [&](int t, i64 k) {  // of a tile, from k on
            const i64 a = start(t), m = start(t + 1) - a;
            return Inputs{room + a * words + k * f.bits / 32 * m, (float*)room + all * words + a * blocks + k / PACK * m,
                          room + all * (words + blocks) + a * sums + k / f.span * m};
        };
        parallel(tiles, limit_threads(threads, (double)rows * K, 65536), [&](i64 t) {
            const int height = start(t + 1) - start(t);
            const X* from = x + (m0 + start(t)) * ldx;
            const int there = std::min(height, rows - start(t));
            if (f.bits == 8) quantise_rows<true>(from, ldx, there, height, K, f, inputs(t, 0));
            else quantise_rows<false>(from, ldx, there, height, K, f, inputs(t, 0));
        });
        const i64 stretch = std::max<i64>(CHUNK, INPUT_BYTES / (rows * 2) / CHUNK * CHUNK);  // see `linear`
        parallel((panels + group - 1) / group, threads, [&](i64 g) {
            const i64 p0 = g * group;
            const int count = (int)std::min<i64>(group, panels - p0), ldc = count * NR;
            float* c = (float*)scratch<1>((size_t)MB * GROUP * NR * 4);
            if (rows == 1) {
                for (int p = 0; p < count; p++) f.row(inputs(0, 0), supers, w + (p0 + p) * panel, c + p * NR);
            } else if (few) {
                for (int p = 0; p < count; p++)
                    for (int t = 0; t < tiles; t++) {
                        const auto product = f.few[start(t + 1) - start(t) == FEW[1]];
                        product(inputs(t, 0), supers, w + (p0 + p) * panel, c + (size_t)start(t) * ldc + p * NR, ldc);
                    }
            } else {
                Unpacked& part = *(Unpacked*)scratch<3>(sizeof(Unpacked));
                memset(c, 0, (size_t)rows * ldc * 4);
                for (i64 first = 0; first < K; first += stretch)
                    for (int p = 0; p < count; p++)
                        for (i64 k = first; k < std::min(K, first + stretch); k += CHUNK) {
                            const int now = (int)std::min<i64>(CHUNK, K - k);
                            f.unpack(w + (p0 + p) * panel, k, now, CHUNK / f.super * f.bytes, part);
                            for (int t = 0; t < tiles; t++) {
                                float* to = c + (size_t)start(t) * ldc + p * NR;
                                f.tiles(start(t + 1) - start(t), inputs(t, k), part, now, to, ldc);
                            }
                        }
            }
            write_rows(c, ldc, rows, std::min<i64>(ldc, N - p0 * NR), bias ? bias + p0 * NR : nullptr, out + m0 * ldo + p0 * NR, ldo);
        });
    }
}

// Rows `ids`, each number as the file's own arithmetic makes it.
template <class F, class O>
void packed_rows(const uint8_t* w, i64 K, const void* ids, bool wide, i64 count, O* out, int threads) {
    typedef Layout<F> L;
    const i64 supers = K / F::super;
    parallel(count, limit_threads(threads, (double)count * K, 65536), [&](i64 r) {
        const i64 n = wide ? ((const i64*)ids)[r] : ((const int32_t*)ids)[r];
        const int j = (int)(n % NR), h = j / VL, lane = j % VL;
        for (i64 s = 0; s < supers; s++) {
            const uint8_t* at = w + (n / NR * supers + s) * L::bytes;
            const vf d = scale_of<F>(at, h), m = low_of<F>(at, h);
            for (int span = 0; span < L::spans; span++) {
                const float scale = span_scale<F>(d, at, span, h)[lane], low = span_low<F>(m, at, span, h)[lane];
                const uint8_t* codes = at + L::head + span * F::span / PACK * L::block_bytes;
                for (int k = 0; k < F::span; k += 2) {
                    const vs pair = pair_of<F>(codes, (span * F::span % PACK + k) / 2, h);
                    for (int i = 0; i < 2; i++) {
                        const float product = (float)(pair[2 * lane + i] - F::offset) * scale;
                        store1(out + r * K + s * F::super + span * F::span + k + i, F::low ? product + low : product);
                    }
                }
            }
        }
    });
}
