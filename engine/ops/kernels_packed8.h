// Products of packed weights with inputs of eight bits: part of kernels_packed.h, for types whose codes are bytes without a sign.
//
// A block of 32 inputs has one scale and integers of -127 .. 127, as llama.cpp has them; their products with four codes each are
// summed exactly, two in 16 bits on AVX2: 8 multiplications and 8 additions for 256 products, where inputs of 16 bits take twice
// as many. Rows have the same bits in any batch here, too, and on any machine whose float operations are the same.

constexpr int64_t EIGHT_BITS = 256;  // beside a type's number

template <class F>
struct Eight {
    static constexpr bool can = F::table == PLAIN && F::base < 8;
    static constexpr int top = (1 << (F::base + F::high)) - 1, fit = 32767 / (2 * 127 * top);
    static constexpr int run = fit >= F::span / 4 ? F::span / 4 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;  // quads whose sums fit in 16 bits
};

// Sums of a run: in 16 bits, or where the machine has them, at once in 32.
#if defined(__AVX512VNNI__) && VL == 16
typedef vi Part;
INLINE Part add_quad(Part part, vu codes, vu in) { return (vi)_mm512_dpbusd_epi32((__m512i)part, (__m512i)codes, (__m512i)in); }
INLINE vi whole(vi sum, Part part) { return sum + part; }
#elif defined(__AVX512BW__) && VL == 16
typedef vs Part;
INLINE Part add_quad(Part part, vu codes, vu in) { return part + (vs)_mm512_maddubs_epi16((__m512i)codes, (__m512i)in); }
INLINE vi whole(vi sum, Part part) { return sum + (vi)_mm512_madd_epi16((__m512i)part, _mm512_set1_epi16(1)); }
#elif defined(__AVXVNNI__) && VL == 8
typedef vi Part;
INLINE Part add_quad(Part part, vu codes, vu in) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)part, (__m256i)codes, (__m256i)in); }
INLINE vi whole(vi sum, Part part) { return sum + part; }
#elif defined(__AVX2__) && VL == 8
typedef vs Part;
INLINE Part add_quad(Part part, vu codes, vu in) {
    part += (vs)_mm256_maddubs_epi16((__m256i)codes, (__m256i)in);
    asm volatile("" : "+x"(part));  // see add_products
    return part;
}
INLINE vi whole(vi sum, Part part) { return sum + (vi)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1)); }
#elif defined(__ARM_FEATURE_DOTPROD) && VL == 4
typedef vi Part;
INLINE Part add_quad(Part part, vu codes, vu in) { return (vi)vdotq_s32((int32x4_t)part, (int8x16_t)codes, (int8x16_t)in); }
INLINE vi whole(vi sum, Part part) { return sum + part; }
#else
typedef vi Part;
INLINE Part add_quad(Part part, vu codes, vu in) {
    for (int shift = 0; shift < 32; shift += 8) part += ((vi)(codes << shift) >> 24) * ((vi)(in << shift) >> 24);
    return part;
}
INLINE vi whole(vi sum, Part part) { return sum + part; }
#endif

// See add_word.
INLINE void add_word8(Part* part, vu a, vu b, const uint32_t* in) {
#if defined(__AVX2__) && VL == 8 && !defined(__AVXVNNI__)
    Part t, u;
    asm volatile(
        "vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpmaddubsw %2, %5, %2\n\tvpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
        : "+x"(part[0]), "+x"(part[1]), "=&x"(t), "=&x"(u)
        : "x"(a), "x"(b), "m"(*in));
#else
    const vu x = *in - (vu){};
    part[0] = add_quad(part[0], a, x);
    part[1] = add_quad(part[1], b, x);
#endif
}

// Quad q of the block of 32 at `at`, for the columns of half h: four codes of each column, in the order that put_in_order gives inputs.
template <class F>
INLINE vu quad_of(const uint8_t* at, int q, int h) {
    auto word = [&](int w) { return *(const vu_any*)(at + (size_t)(w * NR + h * VL) * 4); };
    constexpr int each = 8 / F::base, mask = (1 << F::base) - 1;
    const int s = q % each * F::base;
    vu v = word(q / each);
    v = (s ? v >> s : v) & (0x01010101u * (uint32_t)mask);
    if constexpr (F::high != 0) {
        constexpr int of = 16 / F::high;
        constexpr uint32_t bits = ((1u << F::high) - 1) << F::base;
        auto moved = [](vu w, int from, int to) { return from < to ? w << (to - from) : w >> (from - to); };
        const int low = q / each * 2 * each + q % each, high = low + each;  // the pairs that the bytes are of
        v |= moved(word(F::base + low / of), low % of * F::high, F::base) & (bits * 0x00010001u);
        v |= moved(word(F::base + high / of), high % of * F::high, F::base + 8) & (bits * 0x01000100u);
    }
    return v;
}
INLINE void put_in_order(const uint8_t* bytes, const uint8_t* order, uint8_t* to) {
#if defined(__SSSE3__) || defined(__AVX__)
    const __m128i o = _mm_loadu_si128((const __m128i*)order);
    for (int i = 0; i < PACK; i += 16)
        _mm_storeu_si128((__m128i*)(to + i), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(bytes + i)), o));
#else
    for (int i = 0; i < PACK; i++) to[i] = bytes[i / 16 * 16 + order[i % 16]];
#endif
}

// What packed_row and packed_few are, by quads. Rows M = 1 and more have the same operations.
template <class F, int M>
__attribute__((noinline)) void packed_few8(const Inputs& x, i64 supers, const uint8_t* at, float* c, int ldc) {
    typedef Layout<F> L;
    constexpr int each = F::span / 4, run = Eight<F>::run;
    const uint32_t *quads = x.pairs, *sums = x.sums;
    const float* scales = x.scales;
    vf only[2] = {};  // the sums of one row
    for (int m = 0; m < M && M > 1; m++)
        for (int h = 0; h < 2; h++) store(c + (size_t)m * ldc + h * VL, vf{});
    for (i64 s = 0; s < supers; s++, at += L::bytes) {
        const uint8_t* codes = at + L::head;
#pragma GCC unroll 1
        for (int b = 0; b < L::blocks; b++, codes += L::block_bytes, quads += PACK / 4 * M, sums += PACK / F::span * M, scales += M) {
            fetch_block<F>(at, b, AHEAD_PACKED);
#pragma GCC unroll 2
            for (int part = 0; part < PACK / F::span; part++) {
                vi sum[M][2];
                for (int m = 0; m < M; m++)
                    for (int h = 0; h < 2; h++) sum[m][h] = F::offset ? splat_i(sums[part * M + m]) : vi{};
#pragma GCC unroll 4
                for (int first = part * each; first < (part + 1) * each; first += run) {
                    Part piece[M][2] = {};
#pragma GCC unroll 8
                    for (int q = first; q < first + run; q++) {
                        const vu low = quad_of<F>(codes, q, 0), high = quad_of<F>(codes, q, 1);
                        for (int m = 0; m < M; m++) add_word8(piece[m], low, high, quads + q * M + m);
                    }
                    for (int m = 0; m < M; m++)
                        for (int h = 0; h < 2; h++) sum[m][h] = whole(sum[m][h], piece[m][h]);
                }
                const int span = b * (PACK / F::span) + part;
                for (int h = 0; h < 2; h++) {
                    const vf scale = span_scale<F>(scale_of<F>(at, h), at, span, h), low = span_low<F>(low_of<F>(at, h), at, span, h);
                    for (int m = 0; m < M; m++) {
                        float* to = c + (size_t)m * ldc + h * VL;
                        vf total = fma(__builtin_convertvector(sum[m][h], vf) * splat(scales[m]), scale, M > 1 ? load(to) : only[h]);
                        if (F::low) total = fma(splat(as_float(sums[part * M + m])), low, total);
                        if (M > 1) store(to, total);
                        else only[h] = total;
                    }
                }
            }
        }
    }
    for (int h = 0; h < 2 && M == 1; h++) store(c + h * VL, only[h]);
}
template <class F>
void packed_row8(const Inputs& x, i64 supers, const uint8_t* at, float* c) { packed_few8<F, 1>(x, supers, at, c, 0); }

// See unpack; the codes as quads.
template <class F>
void unpack8(const uint8_t* panel, i64 k, int count, size_t ahead, Unpacked& to) {
    typedef Layout<F> L;
    for (int done = 0; done < count; done += F::super) {
        const uint8_t* at = panel + (k + done) / F::super * L::bytes;
        unpack_scales<F>(at, done, to);
        for (int b = 0; b < L::blocks; b++) {
            fetch_block<F>(at, b, ahead);
#pragma GCC unroll 8
            for (int q = 0; q < PACK / 4; q++)
                for (int h = 0; h < 2; h++)
                    *(vu_any*)(to.pairs + ((done + b * PACK) / 4 + q) * NR + h * VL) = quad_of<F>(at + L::head + b * L::block_bytes, q, h);
        }
    }
}

// See packed_tile.
template <int M, bool Low, int Run>
__attribute__((noinline)) void packed_tile8(const Inputs& x, const Unpacked& w, int span, int count, float* c, int ldc) {
    const uint32_t *quads = x.pairs, *codes = w.pairs, *sums = x.sums;
    const float *scale = w.scales, *low = w.lows;
    for (int k = 0; k < count; k += span, sums += M, scale += NR, low += NR) {
        const float* scales = x.scales + k / PACK * M;
        vi sum[M][2];
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) sum[m][h] = Low ? vi{} : splat_i(sums[m]);
        for (int run = 0; run < span / 4; run += Run) {
            Part piece[M][2] = {};
#pragma GCC unroll 8
            for (int q = 0; q < Run; q++, quads += M, codes += NR) {
                const vu a = *(const vu_any*)codes, b = *(const vu_any*)(codes + VL);
                for (int m = 0; m < M; m++) add_word8(piece[m], a, b, quads + m);
            }
            for (int m = 0; m < M; m++)
                for (int h = 0; h < 2; h++) sum[m][h] = whole(sum[m][h], piece[m][h]);
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) {
                float* to = c + (size_t)m * ldc + h * VL;
                vf total = fma(__builtin_convertvector(sum[m][h], vf) * splat(scales[m]), load(scale + h * VL), load(to));
                if (Low) total = fma(splat(as_float(sums[m])), load(low + h * VL), total);
                store(to, total);
            }
    }
}
template <int M>
INLINE void packed_tile_of(bool low, int run, const Inputs& x, const Unpacked& w, int span, int count, float* c, int ldc) {
    if (run == 8) low ? packed_tile8<M, true, 8>(x, w, span, count, c, ldc) : packed_tile8<M, false, 8>(x, w, span, count, c, ldc);
    else if (run == 4) low ? packed_tile8<M, true, 4>(x, w, span, count, c, ldc) : packed_tile8<M, false, 4>(x, w, span, count, c, ldc);
    else packed_tile8<M, false, 2>(x, w, span, count, c, ldc);
}
INLINE void packed_tiles8(int m, bool low, int run, const Inputs& x, const Unpacked& w, int span, int count, float* c, int ldc) {
    switch (m) {
#define CASE(n) \
    case n: return packed_tile_of<n>(low, run, x, w, span, count, c, ldc);
        CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}
