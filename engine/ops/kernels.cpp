// CPU kernels of the engine behind a plain C ABI, compiled at first use by native.py and called through ctypes.
//
// Storage is float32 or bfloat16 (as uint16), of keys and values float16 as well, arithmetic is float32; AVX512-BF16, where it is, multiplies weights without
// widening them. One vector width VL is chosen at compile time (16 lanes with AVX512, 8 with AVX, else 4); GCC's vector
// extensions lower it to whatever the machine has.
// Every result of a row is a fixed sequence of operations that does not depend on the number of rows, their order,
// the tiles or the threads: a row alone and a row in a batch are equal bit for bit (tests/ops prove it).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef VL
#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t bf16;
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum { F32 = 0, BF16 = 1 };
enum Pools { POOLS_BF16 = 1, POOLS_F16 = 2, POOLS_CODES = 3 };  // what keys and values are kept in, where it is not the model's type

// ---------------------------------------------------------------- storage

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf load(const float* p) { return *(const vf_any*)p; }
// Written out: GCC 12 widens short vectors in halves.
INLINE vf load(const bf16* p) {
#if defined(__AVX512F__) && VL == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && VL == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    return (vf)(__builtin_convertvector((vh) * (const vh_any*)p, vu) << 16);
#endif
}
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
INLINE void store(bf16* p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    vu result = x == x ? rounded : ((bits >> 16) | 0x40);     // NaN stays NaN
    *(vh_any*)p = __builtin_convertvector(result, vh);
}
INLINE float load1(const float* p) { return *p; }
INLINE float load1(const bf16* p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(bf16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : ((bits >> 16) | 0x40);
}
// IEEE half precision, which keys and values alone may be kept in.
struct f16 {
    uint16_t bits;
};
INLINE vf load(const f16* p) {
#if defined(__F16C__) && VL == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX512F__) && VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    const vu h = __builtin_convertvector((vh) * (const vh_any*)p, vu), most = h & 0x7fff;
    const vu x = (vu)((vf)(most << 13) * 5.192296858534828e33f);  // 2^112: exact, below the normal numbers, too
    return (vf)((most >= 0x7c00 ? (most << 13) | 0x7f800000u : x) | (h & 0x8000) << 16);
#endif
}
INLINE float load1(const f16* p) {
    const uint32_t most = p->bits & 0x7fff, sign = (uint32_t)(p->bits & 0x8000) << 16;
    uint32_t bits = most << 13;
    float x;
    memcpy(&x, &bits, 4);
    x *= 5.192296858534828e33f;
    memcpy(&bits, &x, 4);
    bits = (most >= 0x7c00 ? most << 13 | 0x7f800000u : bits) | sign;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE void store1(f16* p, float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, most = bits & 0x7fffffff;
    if (most < 0x38800000) {  // steps of 2^-24, as those of floats from a half on are
        float shifted;
        memcpy(&shifted, &most, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        p->bits = (uint16_t)(sign | (bits - 0x3f000000));
    } else {
        const uint32_t rounded = (most - 0x38000000 + 0xfff + (most >> 13 & 1)) >> 13;
        p->bits = (uint16_t)(sign | (most > 0x7f800000 ? 0x7e00 : most >= 0x477ff000 ? 0x7c00 : rounded));
    }
}
INLINE void store(f16* p, vf x) {
#if defined(__F16C__) && VL == 8
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX512F__) && VL == 16
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < VL; i++) store1(p + i, x[i]);
#endif
}
template <class T>
INLINE vf load_part(const T* p, i64 n) {
    vf x = {};
    for (i64 i = 0; i < n; i++) x[i] = load1(p + i);
    return x;
}
template <class T>
INLINE void store_part(T* p, vf x, i64 n) {
    for (i64 i = 0; i < n; i++) store1(p + i, x[i]);
}
// a * b + c in one rounding where the machine has it. Written out and compiled with -ffp-contract=off: left to itself, GCC fuses
// one product here and another there (on Zen it leaves chains of one accumulator unfused), and equal sums would differ.
#if defined(__AVX512F__) && VL == 16
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__) && VL == 8
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__) && VL == 4
INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// A fixed tree, the same wherever a vector is folded.
INLINE float sum_lanes(vf x) {
    float s[VL];
    memcpy(s, &x, sizeof s);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}
INLINE float max_lanes(vf x) {
    float m = x[0];
    for (int i = 1; i < VL; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// exp by 2^n * p(r), |r| <= ln2 / 2; relative error 2e-7, exact at 0, NaN stays NaN; below -87.3 it stays at 1e-38.
INLINE vf vexp(vf x) {
    x = splat(-87.3f) > x ? splat(-87.3f) : x;
    x = splat(88.0f) < x ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = fma(x, splat(1.44269504f), magic) - magic;
    vf r = fma(n, splat(-0.693145751953125f), x);
    r = fma(n, splat(-1.42860677e-6f), r);
    vf p = splat(1.3981999507e-3f);
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r * r, r) + 1.0f;
    vi e = __builtin_convertvector(n, vi);
    return p * (vf)((e + 127) << 23);
}

// ---------------------------------------------------------------- threads

// Grow-only scratch of the calling thread, 64-byte aligned.
template <int Tag>
void* scratch(size_t bytes) {
    struct Buffer {
        void* p = nullptr;
        size_t size = 0;
        ~Buffer() { free(p); }
    };
    static thread_local Buffer b;
    if (bytes > b.size) {
        free(b.p);
        b.size = 0;
        size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        b.p = aligned_alloc(64, size);
        if (!b.p) throw std::bad_alloc();
        b.size = size;
    }
    return b.p;
}

// Asks for pages of 2 MiB, where memory is not yet written: prefetches then find them in the TLB (16 rows in float32: 69% of the limit,
// then 77%). Where the system gives none nothing changes.
INLINE void prefer_large_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t large = 1 << 21, from = ((uintptr_t)p + large - 1) / large * large, to = ((uintptr_t)p + bytes) / large * large;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

// body(index) for index in 0..count, handed out one by one: a thread that lost its core takes fewer.
template <class Body>
INLINE void parallel(i64 count, int threads, Body body) {
#ifdef _OPENMP
    if (threads > count) threads = (int)count;
    if (threads > 1) {
        std::atomic<i64> next{0};
#pragma omp parallel num_threads(threads)
        for (i64 i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
        return;
    }
#endif
    for (i64 i = 0; i < count; i++) body(i);
}

// One thread per `grain` units of work: a fork and a join cost a few microseconds.
INLINE int limit_threads(int threads, double work, double grain) {
    double most = work / grain;
    return most < 1 ? 1 : most < threads ? (int)most : threads;
}

// ---------------------------------------------------------------- linear

// Weights [N, K] are packed into panels of NR = 2 VL output columns: [ceil(N / NR)][K][NR], zero padded. In bf16, lane j of
// the 32-bit word holds columns j (low half) and VL + j (high half), so that one load, one shift and one mask
// give two float vectors. With AVX512-BF16 it holds two neighbours along K of column j instead: one instruction multiplies
// and adds both. Sums run over K in blocks of KC, each from zero, then added in order.
constexpr int NR = 2 * VL;
#if defined(__AVX512BF16__) && VL == 16
#define BF16_PAIRS 1
#else
#define BF16_PAIRS 0
#endif
// What one step along K takes of an input row, and how far it goes.
template <class W>
struct Inner {
    typedef float In;
    static constexpr int depth = 1;
};
#if BF16_PAIRS
template <>
struct Inner<bf16> {
    typedef uint32_t In;
    static constexpr int depth = 2;
};
#endif
template <class W>
INLINE i64 steps_of(i64 K) { return (K + Inner<W>::depth - 1) / Inner<W>::depth; }
// Where a panel holds column j at k.
template <class W>
INLINE size_t place(i64 k, int j) {
    if (sizeof(W) == 4) return (size_t)k * NR + j;
    if (Inner<W>::depth == 2) return (size_t)(k / 2) * 2 * NR + 2 * j + k % 2;
    return (size_t)k * NR + (j < VL ? 2 * j : 2 * (j - VL) + 1);
}
constexpr int KC = 256;
#if defined(__AVX512F__)
constexpr int MR = 12, ACCUMULATORS = 24;
#else
constexpr int MR = 6, ACCUMULATORS = 12;
#endif
// Bytes that one tile fetches its weights ahead into L2. Measured on a Zen 4: M = 6 goes from 45-65% of the limit to 85-93% (1 KB
// ahead and less brings nothing); one row alone reads four long streams, which the hardware follows better by itself.
constexpr int AHEAD = 8192;
constexpr int INPUT_BYTES = 196608;  // of the input that a core keeps in L2 beside the weights that pass through
constexpr int GROUP = 8;          // panels that share one visit of the input block
constexpr int MB = MR * (192 / MR);  // rows per visit of the weights: MB * KC floats stay in L2

INLINE void load_pair(const float* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + VL);
}
#if BF16_PAIRS
INLINE void load_pair(const bf16* p, vf& a, vf& b) { load_pair((const float*)p, a, b); }  // the bits of pairs
INLINE vf multiply_add(uint32_t x, vf w, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)w);
}
#else
INLINE void load_pair(const bf16* p, vf& a, vf& b) {
    vu w = *(const vu_any*)p;
    a = (vf)(w << 16);
    b = (vf)(w & 0xffff0000u);
}
#endif
INLINE vf multiply_add(float x, vf w, vf c) { return fma(splat(x), w, c); }

// Lines of each panel that a micro-kernel brings into L2 in a round of steps, from `ahead` bytes behind its weights on.
struct Fetch {
    size_t ahead;
    int lines;
};
// Steps along K in such a round: with two in float32 or four in bf16 a Zen 3 is a tenth slower.
template <class W>
constexpr int ROUND = sizeof(W) == 4 ? 4 : 2;
template <class W>
constexpr size_t STEP_BYTES = NR * Inner<W>::depth * sizeof(W);

// M rows by P panels: c[m][p * NR + j] (+)= sum_k x[k][m] * w[p][k][j]; k counts steps.
template <int M, int P, class W>
__attribute__((noinline)) void micro_kernel(const typename Inner<W>::In* x, const W* w, size_t panel, int steps, float* c, int ldc,
                                            bool first, Fetch fetch) {
    vf acc[M][2 * P] = {};
    constexpr int size = NR * Inner<W>::depth;
    auto step = [&](int k) {
        const W* at = w + (size_t)k * size;
        if (M < 2 * P) {  // the rows stay in registers and the weights pass: 12 sums, 4 weights and a row are one too many
            for (int p = 0; p < P; p++) {
                vf b[2];
                load_pair(at + p * panel, b[0], b[1]);
                for (int i = 0; i < 2; i++)
                    for (int m = 0; m < M; m++) acc[m][2 * p + i] = multiply_add(x[k * M + m], b[i], acc[m][2 * p + i]);
            }
        } else {
            vf b[2 * P];
            for (int p = 0; p < P; p++) load_pair(at + p * panel, b[2 * p], b[2 * p + 1]);
            for (int m = 0; m < M; m++)
                for (int p = 0; p < 2 * P; p++) acc[m][p] = multiply_add(x[k * M + m], b[p], acc[m][p]);
        }
    };
    const char* line = (const char*)w + fetch.ahead;
    int k = 0;
    for (; k + ROUND<W> <= steps; k += ROUND<W>) {
        for (int i = 0; i < fetch.lines; i++, line += 64)
            for (int p = 0; p < P; p++) __builtin_prefetch(line + p * panel * sizeof(W), 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < ROUND<W>; i++) step(k + i);
    }
    for (; k < steps; k++) step(k);
    for (int m = 0; m < M; m++)
        for (int p = 0; p < 2 * P; p++) {
            float* at = c + (size_t)m * ldc + p * VL;
            store(at, first ? acc[m][p] : load(at) + acc[m][p]);
        }
}

template <int M, class W>
INLINE void tile(const typename Inner<W>::In* x, const W* w, size_t panel, int steps, float* c, int ldc, bool first, int panels,
                 Fetch fetch) {
    constexpr int P = M * 8 <= ACCUMULATORS ? 4 : M * 4 <= ACCUMULATORS ? 2 : 1;
    int p = 0;
    for (; p + P <= panels; p += P) micro_kernel<M, P, W>(x, w + p * panel, panel, steps, c + p * NR, ldc, first, fetch);
    for (; p < panels; p++) micro_kernel<M, 1, W>(x, w + p * panel, panel, steps, c + p * NR, ldc, first, fetch);
}

template <class W>
void any_tile(int m, const typename Inner<W>::In* x, const W* w, size_t panel, int steps, float* c, int ldc, bool first, int panels,
              Fetch fetch) {
    switch (m) {
#define CASE(n) \
    case n: return tile<n, W>(x, w, panel, steps, c, ldc, first, panels, fetch);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

// Rows [row, row + m) of the input as [K][m] floats.
template <class X>
void pack_rows(const X* x, i64 ldx, int m, i64 K, float* out) {
    if (m == 1) {
        i64 k = 0;
        for (; k + VL <= K; k += VL) store(out + k, load(x + k));
        for (; k < K; k++) out[k] = load1(x + k);
        return;
    }
    for (i64 k0 = 0; k0 < K; k0 += 64) {
        i64 k1 = std::min(K, k0 + 64);
        for (int r = 0; r < m; r++)
            for (i64 k = k0; k < k1; k++) out[k * m + r] = load1(x + r * ldx + k);
    }
}

// The same as [ceil(K / 2)][m] pairs.
void pack_rows(const bf16* x, i64 ldx, int m, i64 K, uint32_t* out) {
    const i64 whole = K / 2;
    for (i64 k0 = 0; k0 < whole; k0 += 64) {
        i64 k1 = std::min(whole, k0 + 64);
        for (int r = 0; r < m; r++)
            for (i64 k = k0; k < k1; k++) memcpy(out + k * m + r, x + r * ldx + 2 * k, 4);
    }
    for (int r = 0; r < m && K % 2; r++) out[whole * m + r] = x[r * ldx + K - 1];
}

// Weights as they are: `steps` of them from step k on, of panels from p on, `stride` apart.
template <class W>
struct Plain {
    typedef W Weight;
    static constexpr bool streams = true;  // the weights lie in memory as they are multiplied
    const W* w;
    i64 steps;
    MEMBER const W* at(i64 p, i64 k, int, int, size_t& stride) const {
        stride = (size_t)steps * NR * Inner<W>::depth;
        return w + p * stride + (size_t)k * NR * Inner<W>::depth;
    }
    template <class C>
    MEMBER bool one_row(const float*, i64, int, C*, int) const { return false; }
};

// Weights as codes that integers do not stand for (those are in kernels_packed.h). Every `span` of them along K has a scale. A panel
// holds for each block the scales of its columns, and words: lane j of one holds 32 / Bits codes of column j. A weight is the e4m3
// float of 8 bits, or table[q] (4 bits; the table stands before the first panel), times the scale, rounded, so that sums have the
// same bits as with such weights in float32.
enum Meaning { FLOATS, PLACES };
template <Meaning What>
struct Codes {
    typedef float Weight;
    static constexpr bool streams = false;
    static constexpr int Bits = What == FLOATS ? 8 : 4, span = 32;
    static constexpr Meaning what = What;
    static constexpr int per = 32 / Bits, words = span / per;
    static constexpr size_t block = (size_t)NR * (1 + words);  // in words of 32 bits
    const uint32_t* w;
    i64 blocks;  // along K

    // Number J of a word, whose place in the table is taken without the bits above.
    template <int J>
    static MEMBER vf looked_up(const float* table, vu word) {
        const vu place = word >> (4 * J);
#if defined(__AVX512F__) && VL == 16
        return (vf)_mm512_permutexvar_ps((__m512i)place, _mm512_loadu_ps(table));
#elif defined(__AVX2__) && VL == 8
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)place);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)place);
        return (vf)_mm256_blendv_ps(low, high, (__m256)(word << (28 - 4 * J)));
#else
        vf x;
        for (int i = 0; i < VL; i++) x[i] = table[place[i] & 15];
        return x;
#endif
    }
    template <int J>
    MEMBER vf number(vu word) const {
        if constexpr (What == PLACES) return looked_up<J>((const float*)w - 16, word);
        // The bits of 2^-120 times the number: the scale makes up for that.
        const vu top = J == 3 ? word : word << (24 - 8 * (J & 3));
        return (vf)((vu)((vi)top >> 4) & 0x87f00000u);
    }

    // One block of a panel as [span][NR] floats.
    MEMBER void widen(const uint32_t* at, float* out) const {
        for (int h = 0; h < NR; h += VL) {
            const vf scale = load((const float*)at + h);
            const uint32_t* codes = at + NR + h;
            float* to = out + h;
            for (int r = 0; r < words; r++, to += per * NR) {
                const vu word = *(const vu_any*)(codes + r * NR);
                store(to, number<0>(word) * scale);
                store(to + NR, number<1>(word) * scale);
                store(to + 2 * NR, number<2>(word) * scale);
                store(to + 3 * NR, number<3>(word) * scale);
                if (Bits == 4) {
                    store(to + 4 * NR, number<4 % per>(word) * scale);
                    store(to + 5 * NR, number<5 % per>(word) * scale);
                    store(to + 6 * NR, number<6 % per>(word) * scale);
                    store(to + 7 * NR, number<7 % per>(word) * scale);
                }
            }
        }
    }
    const float* at(i64 p, i64 k, int count, int steps, size_t& stride) const {
        stride = (size_t)KC * NR;
        float* out = (float*)scratch<3>(4 * stride * sizeof(float));
        for (int i = 0; i < count; i++) {
            const uint32_t* from = w + ((p + i) * blocks + k / span) * block;
            for (int b = 0; b < steps; b += span, from += block) widen(from, out + i * stride + (size_t)b * NR);
        }
        return out;
    }

    // The products of one row x with P panels from p on, by the same operations as the general way has.
    template <int P, int J>
    MEMBER void step(const float* x, const vu* word, const vf* scale, vf* acc) const {
        const vf a = splat(x[J]);
        for (int i = 0; i < 2 * P; i++) acc[i] = fma(a, number<J>(word[i]) * scale[i], acc[i]);
    }
    template <int P>
    void row(const float* x, const uint32_t* const from, float* c) const {
        for (i64 k = 0; k < blocks; k += KC / span) {
            vf acc[2 * P] = {};
            for (i64 b = k; b < std::min(blocks, k + KC / span); b++) {
                const uint32_t* at[P];
                vf scale[2 * P];
                for (int i = 0; i < 2 * P; i++) {
                    at[i / 2] = from + (i / 2) * blocks * block + b * block;
                    scale[i] = load((const float*)at[i / 2] + i % 2 * VL);
                }
                const float* xb = x + b * span;
                for (int r = 0; r < words; r++, xb += per) {
                    vu word[2 * P];
                    for (int i = 0; i < 2 * P; i++)
                        word[i] = *(const vu_any*)(at[i / 2] + NR * (1 + r) + i % 2 * VL);
                    step<P, 0>(xb, word, scale, acc);
                    step<P, 1>(xb, word, scale, acc);
                    step<P, 2>(xb, word, scale, acc);
                    step<P, 3>(xb, word, scale, acc);
                    if (Bits == 4) {
                        step<P, 4 % per>(xb + 4 - 4 % per, word, scale, acc);
                        step<P, 5 % per>(xb + 5 - 5 % per, word, scale, acc);
                        step<P, 6 % per>(xb + 6 - 6 % per, word, scale, acc);
                        step<P, 7 % per>(xb + 7 - 7 % per, word, scale, acc);
                    }
                }
            }
            for (int i = 0; i < 2 * P; i++) {
                float* to = c + i * VL;
                store(to, k == 0 ? acc[i] : load(to) + acc[i]);
            }
        }
    }
    bool one_row(const float* x, i64 p, int count, float* c, int) const {
        int i = 0;
        for (; i + 2 <= count; i += 2) row<2>(x, w + (p + i) * blocks * block, c + i * NR);
        if (i < count) row<1>(x, w + (p + i) * blocks * block, c + i * NR);
        return true;
    }
};

// Sums [rows][ldc], with the bias, to their place.
template <class O>
INLINE void write_rows(const float* c, int ldc, int rows, i64 width, const float* bias, O* out, i64 ldo) {
    for (int r = 0; r < rows; r++) {
        O* to = out + r * ldo;
        const float* from = c + (size_t)r * ldc;
        i64 n = 0;
        for (; n + VL <= width; n += VL) store(to + n, bias ? load(from + n) + load(bias + n) : load(from + n));
        for (; n < width; n++) store1(to + n, bias ? from[n] + bias[n] : from[n]);
    }
}

template <class X, class S, class O>
void linear(const X* x, i64 ldx, i64 M, i64 K, const S& source, i64 N, const float* bias, O* out, i64 ldo, int threads) {
    const i64 panels = (N + NR - 1) / NR;
    typedef typename S::Weight W;
    typedef typename Inner<W>::In In;
    constexpr int block = KC / Inner<W>::depth;
    const i64 steps = steps_of<W>(K);
    constexpr int lines = (int)((ROUND<W> * STEP_BYTES<W> + 63) / 64);  // of a panel, in a round of steps
    // Below a quarter of a million multiplications (about 10 us) the fork costs more than it brings.
    threads = limit_threads(threads, (double)M * N * K, 131072);
    // Panels that one task takes: fewer where there would not be enough tasks. No result depends on it.
    int group = GROUP;
    while (group > 1 && panels < (i64)group * threads * 4) group /= 2;
    for (i64 m0 = 0; m0 < M; m0 += MB) {
        const int rows = (int)std::min<i64>(MB, M - m0);
        const int tiles = (rows + MR - 1) / MR;
        // Tiles of nearly equal height: 16 rows are 6 + 5 + 5.
        const int low = rows / tiles, extra = rows % tiles;
        auto start = [&](int t) { return t * low + std::min(t, extra); };
        // In float32 the tiles share the next block's lines, so that the memory is busy for as long as this block is multiplied: 16 rows
        // go from 66-70% to 77-83% of a Zen 3's limit. In bf16 there are half as many, and asking once for each loses some: 87%, not 77.
        Fetch fetches[4] = {};
        for (int t = 0, left = lines, few = std::min(tiles, 4); t < few && S::streams; t++) {
            fetches[t].ahead = block * STEP_BYTES<W> + (size_t)(lines - left) * (block / ROUND<W>) * 64;
            fetches[t].lines = sizeof(W) == 2 ? lines : (left + few - t - 1) / (few - t);
            left -= sizeof(W) == 2 ? 0 : fetches[t].lines;
        }
        In* packed = (In*)scratch<0>((size_t)rows * steps * sizeof(In));
        parallel(tiles, limit_threads(threads, (double)rows * K, 65536), [&](i64 t) {
            int a = start(t), b = start(t + 1);
            pack_rows(x + (m0 + a) * ldx, ldx, b - a, K, packed + (size_t)a * steps);
        });
        parallel((panels + group - 1) / group, threads, [&](i64 g) {
            const i64 p0 = g * group;
            const int count = (int)std::min<i64>(group, panels - p0), ldc = count * NR;
            float* c = (float*)scratch<1>((size_t)MB * GROUP * NR * 4);
            size_t panel;
            const bool done = rows == 1 && source.one_row((const float*)packed, p0, count, c, ldc);
            if (tiles == 1 && !done)  // the weights as few long streams
                for (int p = 0; p < count; p += 4)
                    for (i64 k = 0; k < steps; k += block) {
                        const int now = (int)std::min<i64>(block, steps - k), few = std::min(4, count - p);
                        const W* wk = source.at(p0 + p, k, few, now, panel);
                        const Fetch fetch{AHEAD, S::streams && rows > 1 ? lines : 0};
                        any_tile(rows, packed + k * rows, wk, panel, now, c + p * NR, ldc, k == 0, few, fetch);
                    }
            // A stretch of the input that stays in L2, and as much of every panel: a panel is one stream for as long as that lasts.
            const i64 stretch = std::max<i64>(block, (i64)INPUT_BYTES / (rows * (i64)sizeof(In)) / block * block);
            for (i64 from = 0; from < steps && tiles > 1; from += stretch)
                for (int p = 0; p < count; p++)
                    for (i64 k = from; k < std::min(steps, from + stretch); k += block) {
                        const int now = (int)std::min<i64>(block, steps - k);
                        const W* wk = source.at(p0 + p, k, 1, now, panel);
                        for (int t = 0; t < tiles; t++) {
                            int a = start(t), m = start(t + 1) - a;
                            any_tile(m, packed + (size_t)a * steps + k * m, wk, panel, now, c + (size_t)a * ldc + p * NR, ldc, k == 0, 1,
                                     t < 4 ? fetches[t] : Fetch{});
                        }
                    }
            write_rows(c, ldc, rows, std::min<i64>(ldc, N - p0 * NR), bias ? bias + p0 * NR : nullptr, out + m0 * ldo + p0 * NR, ldo);
        });
    }
}

template <class W>
void pack_weight(const W* w, i64 N, i64 K, W* out, int threads) {
    prefer_large_pages(out, (size_t)((N + NR - 1) / NR) * NR * steps_of<W>(K) * Inner<W>::depth * sizeof(W));
    parallel((N + NR - 1) / NR, threads, [&](i64 p) {
        const i64 padded = steps_of<W>(K) * Inner<W>::depth;
        W* to = out + (size_t)p * padded * NR;
        for (i64 k0 = 0; k0 < padded; k0 += 64)
            for (int j = 0; j < NR; j++) {
                i64 n = p * NR + j, k1 = std::min(padded, k0 + 64);
                for (i64 k = k0; k < k1; k++) to[place<W>(k, j)] = n < N && k < K ? w[n * K + k] : W(0);
            }
    });
}

// Rows `ids` of the original weight, out of the packed one: a tied embedding needs no second copy.
template <class W>
void unpack_rows(const W* packed, i64 K, const void* ids, bool wide, i64 count, W* out, int threads) {
    parallel(count, limit_threads(threads, (double)count * K, 65536), [&](i64 i) {
        const i64 n = wide ? ((const i64*)ids)[i] : ((const int32_t*)ids)[i];
        const W* from = packed + n / NR * steps_of<W>(K) * Inner<W>::depth * NR;
        W* to = out + i * K;
        for (i64 k = 0; k < K; k++) to[k] = from[place<W>(k, (int)(n % NR))];
    });
}

// codes [N, K]: one in a byte. scale: [N, K / C::span].
template <class C>
void pack_codes(const uint8_t* codes, const float* scale, i64 N, i64 K, uint32_t* out, int threads) {
    const i64 blocks = K / C::span;
    parallel((N + NR - 1) / NR, threads, [&](i64 p) {
        uint32_t* to = out + p * blocks * C::block;
        memset(to, 0, blocks * C::block * 4);
        for (int j = 0; j < NR && p * NR + j < N; j++) {
            const i64 n = p * NR + j;
            for (i64 b = 0; b < blocks; b++) {
                uint32_t* at = to + b * C::block + j;
                const float own = scale[n * blocks + b] * (C::what == FLOATS ? 0x1p120f : 1.0f);
                memcpy(at, &own, 4);
                const uint8_t* from = codes + n * K + b * C::span;
                for (int r = 0; r < C::words; r++, from += C::per) {
                    uint32_t word = 0;
                    for (int i = 0; i < C::per; i++) word |= (uint32_t)from[i] << (C::Bits * i);
                    at[NR * (1 + r)] = word;
                }
            }
        }
    });
}

template <class C, class O>
void code_rows(const uint32_t* w, i64 K, const void* ids, bool wide, i64 count, O* out, int threads) {
    const i64 blocks = K / C::span;
    const C source{w, blocks};
    parallel(count, limit_threads(threads, (double)count * K, 65536), [&](i64 i) {
        const i64 n = wide ? ((const i64*)ids)[i] : ((const int32_t*)ids)[i];
        for (i64 b = 0; b < blocks; b++) {
            const uint32_t* at = w + (n / NR * blocks + b) * C::block + n % NR;
            float scale;
            memcpy(&scale, at, 4);
            for (int k = 0; k < C::span; k++) {
                // The code that is to be first in its word, by what widens a whole panel.
                const uint32_t word = at[NR * (1 + k / C::per)] >> (C::Bits * (k % C::per));
                store1(out + i * K + b * C::span + k, source.template number<0>(vu{} + word)[0] * scale);
            }
        }
    });
}

#include "kernels_packed.h"

// ---------------------------------------------------------------- norm, activation

template <class T, class W, bool Add>
void rms_norm(const T* x, i64 ldx, T* residual, i64 ldr, const W* weight, T* out, i64 ldo, i64 rows, i64 H, float eps,
              int threads) {
    threads = limit_threads(threads, (double)rows * H, 65536);
    const i64 chunk = std::max<i64>(1, 16384 / std::max<i64>(H, 1));
    parallel((rows + chunk - 1) / chunk, threads, [&](i64 c) {
        for (i64 r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) {
            const T* in = x + r * ldx;
            vf s[4] = {};
            i64 h = 0;
            if (Add) {
                T* res = residual + r * ldr;
                for (; h + VL <= H; h += VL) store(res + h, load(in + h) + load(res + h));
                for (; h < H; h++) store1(res + h, load1(in + h) + load1(res + h));
                in = res;
            }
            for (h = 0; h + 4 * VL <= H; h += 4 * VL)
                for (int i = 0; i < 4; i++) {
                    vf v = load(in + h + i * VL);
                    s[i] = fma(v, v, s[i]);
                }
            for (; h < H; h += VL) {
                vf v = h + VL <= H ? load(in + h) : load_part(in + h, H - h);
                s[0] = fma(v, v, s[0]);
            }
            float scale = 1.0f / std::sqrt(sum_lanes((s[0] + s[1]) + (s[2] + s[3])) / (float)H + eps);
            T* to = out + r * ldo;
            for (h = 0; h + VL <= H; h += VL) store(to + h, load(in + h) * scale * load(weight + h));
            for (; h < H; h++) store1(to + h, load1(in + h) * scale * load1(weight + h));
        }
    });
}

// gate / (1 + exp(-gate)) * up; gelu_tanh(g) = g * sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3).
template <bool Gelu>
INLINE vf gated(vf g, vf up) {
    vf u = Gelu ? g * 1.5957691216f * (g * g * 0.044715f + 1.0f) : g;
    return g / (vexp(-u) + 1.0f) * up;
}

template <class T, bool Gelu>
void gate_and_mul(const T* x, i64 ldx, T* out, i64 rows, i64 I, int threads) {
    threads = limit_threads(threads, (double)rows * I, 32768);
    const i64 block = 2048, blocks = (I + block - 1) / block;
    parallel(rows * blocks, threads, [&](i64 task) {
        const i64 r = task / blocks, i0 = task % blocks * block, i1 = std::min(I, i0 + block);
        const T *gate = x + r * ldx, *up = gate + I;
        T* to = out + r * I;
        i64 i = i0;
        for (; i + VL <= i1; i += VL) store(to + i, gated<Gelu>(load(gate + i), load(up + i)));
        if (i < i1) store_part(to + i, gated<Gelu>(load_part(gate + i, i1 - i), load_part(up + i, i1 - i)), i1 - i);
    });
}

// ---------------------------------------------------------------- rope

// Neox halves of one head; cos_sin holds rot / 2 cosines, then rot / 2 sines. Elements past rot are copied.
template <class T>
INLINE void rope_head(const T* x, T* out, const float* cos_sin, i64 rot, i64 D) {
    const i64 half = rot / 2;
    i64 i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos_sin + i), s = load(cos_sin + half + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = load1(x + i), b = load1(x + half + i), c = cos_sin[i], s = cos_sin[half + i];
        store1(out + i, a * c - b * s);
        store1(out + half + i, b * c + a * s);
    }
    if (out != x && rot < D) memcpy(out + rot, x + rot, (D - rot) * sizeof(T));
}

template <class T>
void rope(T* x, i64 ldx, i64 tokens, i64 heads, i64 D, const float* cos_sin, i64 rot, const void* positions, bool wide, int threads) {
    threads = limit_threads(threads, (double)tokens * heads * D, 65536);
    const i64 chunk = 16;
    parallel((tokens + chunk - 1) / chunk, threads, [&](i64 c) {
        for (i64 t = c * chunk; t < std::min(tokens, (c + 1) * chunk); t++) {
            i64 position = wide ? ((const i64*)positions)[t] : ((const int32_t*)positions)[t];
            for (i64 h = 0; h < heads; h++) {
                T* at = x + t * ldx + h * D;
                rope_head(at, at, cos_sin + position * rot, rot, D);
            }
        }
    });
}

// ---------------------------------------------------------------- paged attention

// A query's keys are visited in blocks of BLOCK positions and merged in splits of SPLIT positions, both counted from
// the start of its sequence: the order of its sums depends on its position alone, not on pages, tiles or threads.
constexpr int BLOCK = 64;
constexpr int SPLIT = 512;
constexpr int TILE_ROWS = 128;  // queries of one task, times the heads of their group: each tile copies the keys and values that it sees
constexpr int IN_PLACE = 4;    // rows of a head up to which 16-bit keys and values are widened as they are read
constexpr bool WIDE = VL == 16;  // 32 registers: 16 sums at a time

struct Step {
    const int32_t *qo_indptr, *kv_indptr, *kv_indices, *last_page_len;
    // D of q and k, V of values and results; strides between tokens of the pools.
    i64 rows, heads, kv_heads, D, V, k_stride, v_stride, page_size, window, both;
    float scale, softcap;
    const float* sinks;  // one more logit of each head, or null
    bool chunks;         // a query sees its own block of `window` positions
    i64 split;           // of a key in codes: from here on its numbers have the second scale of their head

    // The keys [start, last) that the query at `position` of kv_len tokens sees; `both`: later ones, too.
    int last(int position, int kv_len) const {
        if (!both) return position + 1;
        return window > 0 ? (int)std::min<i64>(kv_len, position + window) : kv_len;
    }
    int start(int position) const {
        if (window <= 0) return 0;
        return chunks ? position - position % (int)window : std::max<int>(0, position + 1 - (int)window);
    }
};
struct Task {
    int row, head0, head1, q0, q1, split0, split1;  // kv heads [head0, head1) of queries [q0, q1)
    i64 partial;  // first partial row, -1 where the task writes the output itself
};

// Eight dot products of depth vectors each: out[i] = sum of lanes of acc[i], by one fixed tree.
INLINE void fold8(const vf* acc, float* out) {
#if defined(__AVX__) && VL >= 8
    __m256 a[8];
    for (int i = 0; i < 8; i++) {
#if VL == 16
        __m256 halves[2];
        memcpy(halves, &acc[i], 64);
        a[i] = _mm256_add_ps(halves[0], halves[1]);
#else
        a[i] = (__m256)acc[i];
#endif
    }
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
#else
    for (int i = 0; i < 8; i++) out[i] = sum_lanes(acc[i]);
#endif
}

// s[r][t] = q[r] . k[t] for R rows and C keys at a time, n keys (a multiple of 8, padded by the caller).
template <int R, int C, class K>
INLINE void scores(const float* q, const K* const* k, int n, int depth, float* s) {
    constexpr int N = R * C, S = N % 8 ? 8 / C : 1;  // sums are folded by eights
    for (int t = 0; t < n; t += S * C) {
        float folded[S * N];
        vf sums[S * N];
        for (int i = 0; i < S; i++) {
            vf acc[N] = {};
            const K* key[C];
            for (int c = 0; c < C; c++) key[c] = k[t + i * C + c];
            for (int d = 0; d < depth; d += VL) {
                if (R < C) {  // the rows stay in registers
                    vf a[R];
                    for (int r = 0; r < R; r++) a[r] = load(q + r * depth + d);
                    for (int c = 0; c < C; c++) {
                        const vf b = load(key[c] + d);
                        for (int r = 0; r < R; r++) acc[r * C + c] = fma(a[r], b, acc[r * C + c]);
                    }
                    continue;
                }
                vf b[C];
                for (int c = 0; c < C; c++) b[c] = load(key[c] + d);
                for (int r = 0; r < R; r++) {
                    vf a = load(q + r * depth + d);
                    for (int c = 0; c < C; c++) acc[r * C + c] = fma(a, b[c], acc[r * C + c]);
                }
            }
            for (int j = 0; j < N; j++) sums[i * N + j] = acc[j];
        }
        for (int i = 0; i < S * N; i += 8) fold8(sums + i, folded + i);
        for (int i = 0; i < S; i++)
            for (int r = 0; r < R; r++) memcpy(s + r * BLOCK + t + i * C, folded + i * N + r * C, C * 4);
    }
}

// The same for all rows.
template <class K>
INLINE void all_scores(const float* q, const K* const* k, int rows, int n, int depth, float* s) {
    int r = 0;
    for (; r + 8 <= rows && WIDE; r += 8) scores<8, 2>(q + r * depth, k, n, depth, s + r * BLOCK);
    for (; r + 4 <= rows && WIDE; r += 4) scores<4, 4>(q + r * depth, k, n, depth, s + r * BLOCK);
    for (; r + 4 <= rows && sizeof(K) == 2; r += 4) scores<4, 2>(q + r * depth, k, n, depth, s + r * BLOCK);  // widened less often
    for (; r + 3 <= rows && sizeof(K) == 4 && !WIDE && rows - r != 4; r += 3) scores<3, 4>(q + r * depth, k, n, depth, s + r * BLOCK);
    for (; r + 2 <= rows; r += 2) scores<2, 4>(q + r * depth, k, n, depth, s + r * BLOCK);
    if (r < rows) scores<1, 8>(q + r * depth, k, n, depth, s + r * BLOCK);
}

// o[r] = o[r] * alpha[r] + sum_t p[r][t] * v[t], t in order, for R rows and V vectors of depth from d on.
template <int R, int V, class K>
INLINE void accumulate_part(float* o, const float* alpha, const float* p, const K* const* v, int t0, int t1, int depth, int d) {
    vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) acc[r][i] = load(o + r * depth + d + i * VL) * alpha[r];
    for (int t = t0; t < t1; t++) {
        vf b[V];
        if (R < V) {  // the weights stay in registers: twelve sums leave room for four more
            vf a[R];
            for (int r = 0; r < R; r++) a[r] = splat(p[r * BLOCK + t]);
            for (int i = 0; i < V; i++) {
                const vf x = load(v[t] + d + i * VL);
                for (int r = 0; r < R; r++) acc[r][i] = fma(a[r], x, acc[r][i]);
            }
            continue;
        }
        for (int i = 0; i < V; i++) b[i] = load(v[t] + d + i * VL);
        for (int r = 0; r < R; r++) {
            vf a = splat(p[r * BLOCK + t]);
            for (int i = 0; i < V; i++) acc[r][i] = fma(a, b[i], acc[r][i]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) store(o + r * depth + d + i * VL, acc[r][i]);
}
// The same for all rows; a row's last key is before end(r). The values of one run of vectors stay in L1 meanwhile.
template <int V, class K, class End>
INLINE void accumulate(float* o, const float* alpha, const float* p, const K* const* v, int rows, int t0, End end, int depth, int d) {
    int r = 0;
    for (; r + 4 <= rows && (WIDE || V <= 2); r += 4)
        accumulate_part<4, V>(o + r * depth, alpha + r, p + r * BLOCK, v, t0, end(r + 3), depth, d);
    for (; r + 3 <= rows && V <= 4 && rows - r != 4; r += 3)  // four are two pairs
        accumulate_part<3, V>(o + r * depth, alpha + r, p + r * BLOCK, v, t0, end(r + 2), depth, d);
    for (; r + 2 <= rows; r += 2) accumulate_part<2, V>(o + r * depth, alpha + r, p + r * BLOCK, v, t0, end(r + 1), depth, d);
    if (r < rows) accumulate_part<1, V>(o + r * depth, alpha + r, p + r * BLOCK, v, t0, end(r), depth, d);
}
template <class K, class End>
INLINE void accumulate_all(float* o, const float* alpha, const float* p, const K* const* v, int rows, int t0, End end, int depth) {
    int d = 0;
    for (; rows >= 4 && sizeof(K) == 2 && !WIDE && d + 2 * VL <= depth; d += 2 * VL) accumulate<2>(o, alpha, p, v, rows, t0, end, depth, d);
    for (; rows == 1 && d + 8 * VL <= depth; d += 8 * VL) accumulate<8>(o, alpha, p, v, 1, t0, end, depth, d);
    for (; d + 4 * VL <= depth; d += 4 * VL) accumulate<4>(o, alpha, p, v, rows, t0, end, depth, d);
    for (; d < depth; d += VL) accumulate<1>(o, alpha, p, v, rows, t0, end, depth, d);
}

// Merge the state (m, l, o) of a later split into (M, L, O); an untouched side has m = -inf.
INLINE void merge(float& M, float& L, float* O, float m, float l, const float* o, int depth) {
    if (m == -INFINITY) return;
    if (M == -INFINITY) {
        M = m;
        L = l;
        memcpy(O, o, depth * 4);
        return;
    }
    float top = M > m ? M : m;
    vf a = vexp(splat(M - top)), b = vexp(splat(m - top));
    M = top;
    L = L * a[0] + l * b[0];
    for (int d = 0; d < depth; d += VL) store(O + d, fma(load(O + d), a, load(o + d) * b));
}

// Keys or values, D numbers each, of positions [p0, p1) of a row as pointers to `depth` numbers each: where they are, or, for
// `copy`, to floats in the buffer.
template <class T, class O>
INLINE void gather(const T* pool, const Step& s, i64 D, i64 stride, const int32_t* pages, int kv_head, int p0, int p1, int depth, bool copy,
                   float* buffer, const O** out) {
    i64 page = p0 / s.page_size, offset = p0 % s.page_size;
    const T* at = nullptr;
    for (int i = 0; i < p1 - p0; i++) {
        if (!at) at = pool + ((i64)pages[page] * s.page_size + offset) * stride + kv_head * D;
        if constexpr (std::is_same<T, O>::value) out[i] = at;
        if constexpr (std::is_same<float, O>::value) {
            if (copy) {
                float* to = buffer + i * depth;
                int d = 0;
                for (; d + VL <= D; d += VL) store(to + d, load(at + d));
                if (d < D) store(to + d, load_part(at + d, D - d));
                out[i] = to;
            }
        }
        at += stride;
        if (++offset == s.page_size) {
            offset = 0;
            page++;
            at = nullptr;
        }
    }
}

// Fetch positions [p0, p1) of the task's heads into L2. Without it a decode step waits for each line: 16 rows of 512
// tokens took 2.2 times what they take in cache.
template <class P>
INLINE void fetch(const P* k_pool, const P* v_pool, const Step& s, const int32_t* pages, const Task& task, int p0, int p1) {
    const i64 heads = task.head1 - task.head0, k_bytes = heads * s.D * sizeof(P);
    const i64 v_bytes = v_pool == k_pool ? 0 : heads * s.V * sizeof(P);
    for (int p = p0; p < p1; p++) {
        const i64 slot = (i64)pages[p / s.page_size] * s.page_size + p % s.page_size;
        const char* k = (const char*)(k_pool + slot * s.k_stride + task.head0 * s.D);
        const char* v = (const char*)(v_pool + slot * s.v_stride + task.head0 * s.V);
        for (i64 b = 0; b < k_bytes; b += 64) __builtin_prefetch(k + b, 0, 2);
        for (i64 b = 0; b < v_bytes; b += 64) __builtin_prefetch(v + b, 0, 2);
        if (sizeof(P) == 1) {
            __builtin_prefetch(k_pool + slot * s.k_stride + s.kv_heads * s.D, 0, 2);
            __builtin_prefetch(v_pool + slot * s.v_stride + s.kv_heads * s.V, 0, 2);
        }
    }
}

// Rows of a task: head after head, of each head query after query, of each query the G heads that share keys.
template <class T>
void finish_row(const Task& task, const Step& s, int r, float M, float L, const float* O, T* out) {
    const int G = (int)(s.heads / s.kv_heads), per_head = (task.q1 - task.q0) * G, V = (int)s.V;
    const i64 token = s.qo_indptr[task.row] + task.q0 + r % per_head / G, head = (task.head0 + r / per_head) * G + r % G;
    T* to = out + (token * s.heads + head) * V;
    float share = 1.0f / L;
    if (s.sinks) {
        const float sink = s.sinks[head], top = std::max(M, sink);
        const float kept = vexp(splat(M - top))[0];
        share = kept / (L * kept + vexp(splat(sink - top))[0]);
    }
    for (int d = 0; d < V; d += VL) {
        vf x = load(O + d) * share;
        if (d + VL <= V) store(to + d, x);
        else store_part(to + d, x, V - d);
    }
}

#include "kernels_kv.h"

template <class T, class P>
void run_task(const Task& task, const Step& s, const T* q, i64 ldq, T* out, const P* k_pool, const P* v_pool, float* partial) {
    const int D = (int)s.D, depth = (D + VL - 1) / VL * VL, G = (int)(s.heads / s.kv_heads);
    const int V = (int)s.V, vdepth = (V + VL - 1) / VL * VL;  // of values
    const int rows = (task.q1 - task.q0) * G, heads = task.head1 - task.head0, all = rows * heads;
    const i64 num_pages = s.kv_indptr[task.row + 1] - s.kv_indptr[task.row];
    const int kv_len = (int)((num_pages - 1) * s.page_size + s.last_page_len[task.row]);
    const i64 token0 = s.qo_indptr[task.row];
    const int position0 = kv_len - (int)(s.qo_indptr[task.row + 1] - token0);
    const int32_t* pages = s.kv_indices + s.kv_indptr[task.row];

    float* memory = (float*)scratch<2>(
        ((size_t)(all + BLOCK) * depth + (size_t)(2 * all + BLOCK) * vdepth + (size_t)rows * (BLOCK + 1) + 4 * all + VL) * 4);
    float *qf = memory, *o = qf + (size_t)all * depth, *O = o + (size_t)all * vdepth;
    float *kbuf = O + (size_t)all * vdepth, *vbuf = kbuf + BLOCK * depth, *p = vbuf + BLOCK * vdepth;
    float *alpha = p + rows * BLOCK, *m = alpha + rows, *l = m + all, *M = l + all, *L = M + all;
    const float *keys[BLOCK], *values[BLOCK];
    const P *narrow_keys[BLOCK], *narrow_values[BLOCK];  // where they are widened as they are read

    Coded<P> coded(s, task, pages, all);
    for (int r = 0; r < all; r++) {
        const T* from = q + (token0 + task.q0 + r % rows / G) * ldq + ((task.head0 + r / rows) * G + r % G) * s.D;
        for (int d = 0; d < depth; d += VL)
            store(qf + r * depth + d, (d + VL <= D ? load(from + d) : load_part(from + d, D - d)) * s.scale);
        coded.query(r, qf + r * depth);
        M[r] = -INFINITY;
        L[r] = 0;
    }
    auto last = [&](int r) { return s.last(position0 + task.q0 + r / G, kv_len); };
    auto start = [&](int r) { return s.start(position0 + task.q0 + r / G); };
    const int from = start(0), to = last(rows - 1);
    const bool few = rows <= 16;  // more rows use a block often enough to hide its latency
    // Keys and values are read in place where few rows use them: narrow ones would be widened for each of their tiles.
    const bool narrow = sizeof(P) == 2 && rows <= IN_PLACE && D == depth && V == vdepth;
    const bool copy_k = sizeof(P) == 2 || rows > 8 || D != depth, copy_v = sizeof(P) == 2 || rows > 8 || V != vdepth;

    for (int split = task.split0; split < task.split1; split++) {
        const int s0 = std::max(split * SPLIT, from / BLOCK * BLOCK), s1 = std::min((split + 1) * SPLIT, to);
        for (int r = 0; r < all; r++) {
            m[r] = -INFINITY;
            l[r] = 0;
        }
        memset(o, 0, (size_t)all * vdepth * 4);
        for (int b0 = s0; b0 < s1; b0 += BLOCK) {
            const int b1 = std::min(b0 + BLOCK, s1);
            const int first = std::max(b0, from), n = b1 - b0, padded = (n + 7) / 8 * 8, next = std::min(BLOCK, to - b1);
            for (int h = 0; h < heads; h++) {
                // A share of the next block with each head, so that fetching and computing overlap.
                if (few) fetch(k_pool, v_pool, s, pages, task, b1 + next * h / heads, b1 + next * (h + 1) / heads);
                const float* qh = qf + (size_t)h * rows * depth;
                float *oh = o + (size_t)h * rows * vdepth, *mh = m + h * rows, *lh = l + h * rows;
                [[maybe_unused]] auto found = [&](auto** k, auto** v) {
                    const int front = first - b0;
                    gather(k_pool, s, D, s.k_stride, pages, task.head0 + h, first, b1, depth, copy_k, kbuf, k + front);
                    if (v_pool == k_pool) std::copy(k + front, k + n, v + front);  // V is the front of K
                    else gather(v_pool, s, V, s.v_stride, pages, task.head0 + h, first, b1, vdepth, copy_v, vbuf, v + front);
                    for (int t = 0; t < front; t++) k[t] = k[front], v[t] = v[front];
                    for (int t = n; t < padded; t++) k[t] = k[n - 1];
                    all_scores(qh, k, rows, padded, depth, p);
                };
                if constexpr (Coded<P>::is) {
                    if (h == 0) coded.find(k_pool, v_pool, first, b0, b1, padded);
                    coded.scores(h, rows, padded, p);
                } else if constexpr (sizeof(P) == 2) {
                    if (narrow) found(narrow_keys, narrow_values);
                    else found(keys, values);
                } else {
                    found(keys, values);
                }

                for (int r = 0; r < rows; r++) {
                    float* row = p + r * BLOCK;
                    const int t0 = std::max(start(r) - b0, 0), t1 = std::min(last(r) - b0, n);
                    alpha[r] = 1;
                    if (t0 >= t1) {
                        memset(row, 0, BLOCK * 4);
                        continue;
                    }
                    if (s.softcap > 0)
                        for (int t = 0; t < padded; t += VL) {
                            vf y = load(row + t) * (2 / s.softcap);
                            store(row + t, s.softcap * (1.0f - 2.0f / (vexp(y) + 1.0f)));
                        }
                    for (int t = 0; t < t0; t++) row[t] = -INFINITY;
                    for (int t = t1; t < BLOCK; t++) row[t] = -INFINITY;
                    vf top = load(row);
                    for (int t = VL; t < BLOCK; t += VL) top = vmax(load(row + t), top);
                    const float old = mh[r], now = std::max(old, max_lanes(top));
                    vf sum = {};
                    for (int t = 0; t < BLOCK; t += VL) {
                        vf x = load(row + t), e = vexp(x - now);
                        e = x == -INFINITY ? splat(0) : e;
                        store(row + t, e);
                        sum += e;
                    }
                    if (old != -INFINITY) alpha[r] = vexp(splat(old - now))[0];
                    mh[r] = now;
                    lh[r] = lh[r] * alpha[r] + sum_lanes(sum);
                }
                // Weights outside a row's own range are zero, so neighbours may run over the union of their ranges.
                auto end = [&](int r) { return std::min(last(r) - b0, n); };
                if constexpr (Coded<P>::is) {
                    coded.weigh(h, rows, p);
                    if (!coded.widened(h, rows, first - b0, n, vdepth, vbuf, values)) {
                        coded.accumulate(h, oh, alpha, p, rows, first - b0, end, vdepth);
                        continue;
                    }
                }
                if constexpr (sizeof(P) == 2)
                    if (narrow) {
                        accumulate_all(oh, alpha, p, narrow_values, rows, first - b0, end, vdepth);
                        continue;
                    }
                accumulate_all(oh, alpha, p, values, rows, first - b0, end, vdepth);
            }
        }
        if (task.partial >= 0) {  // one split: its state goes to memory and is merged later in the same way
            for (int r = 0; r < all; r++) {
                float* to_row = partial + (task.partial + r) * (vdepth + 2);
                to_row[0] = m[r];
                to_row[1] = l[r];
                memcpy(to_row + 2, o + r * vdepth, vdepth * 4);
            }
            return;
        }
        for (int r = 0; r < all; r++) merge(M[r], L[r], O + r * vdepth, m[r], l[r], o + r * vdepth, vdepth);
    }
    for (int r = 0; r < all; r++) finish_row(task, s, r, M[r], L[r], O + r * vdepth, out);
}

template <class T, class P>
void attend(const Step& s, const T* q, i64 ldq, T* out, const P* k_pool, const P* v_pool, int threads) {
    const int G = (int)(s.heads / s.kv_heads), D = (int)s.D, depth = ((int)s.V + VL - 1) / VL * VL;
    const int span = std::max(1, TILE_ROWS / G);
    double work = 0;
    i64 tiles = 0;
    auto each_tile = [&](auto body) {
        for (i64 r = s.rows - 1; r >= 0; r--) {  // prefill chunks stand last and take longest: they come first
            const int n = s.qo_indptr[r + 1] - s.qo_indptr[r];
            if (n <= 0) continue;
            const int kv_len = (int)((s.kv_indptr[r + 1] - s.kv_indptr[r] - 1) * s.page_size + s.last_page_len[r]);
            for (int q0 = (n - 1) / span * span; q0 >= 0; q0 -= span) {
                const int q1 = std::min(n, q0 + span), before = kv_len - n;
                body((int)r, q0, q1, s.start(before + q0), s.last(before + q1 - 1, kv_len));
            }
        }
    };
    each_tile([&](int, int q0, int q1, int from, int last) {
        work += (double)(q1 - q0) * (last - from) * s.heads * D;
        tiles++;
    });
    threads = limit_threads(threads, work, 65536);
    // A decode task takes several heads, up to 2 KB of a token, so that it reads memory in longer runs; fewer where there
    // would be too few tasks for the threads.
    int group = (int)std::clamp<i64>(2048 / (D * (i64)sizeof(P)), 1, s.kv_heads);
    while (group > 1 && threads > 1 && tiles * ((s.kv_heads + group - 1) / group) < 4 * threads) group = (group + 1) / 2;
    static thread_local std::vector<Task> tasks, parts;
    tasks.clear();
    each_tile([&](int r, int q0, int q1, int from, int last) {
        const int step = (q1 - q0) * G <= 16 ? group : 1;
        for (int h = 0; h < s.kv_heads; h += step)
            tasks.push_back({r, h, std::min<int>(h + step, (int)s.kv_heads), q0, q1, from / SPLIT, (last + SPLIT - 1) / SPLIT, -1});
    });
    const i64 whole = (i64)tasks.size();
    if (threads == 1 || whole >= 4 * threads) {
        parallel(whole, threads, [&, list = tasks.data()](i64 i) { run_task(list[i], s, q, ldq, out, k_pool, v_pool, nullptr); });
        return;
    }
    // Too few tasks for the threads: one task per split, then the same merges in the same order.
    parts.clear();
    i64 rows = 0;
    for (Task& t : tasks) {
        t.partial = rows;
        const int count = (t.q1 - t.q0) * G * (t.head1 - t.head0);
        for (int split = t.split0; split < t.split1; split++, rows += count) {
            parts.push_back(t);
            parts.back().split0 = split;
            parts.back().split1 = split + 1;
            parts.back().partial = rows;
        }
    }
    float* partial = (float*)scratch<3>((size_t)rows * (depth + 2) * 4);
    parallel((i64)parts.size(), threads,
             [&, list = parts.data()](i64 i) { run_task(list[i], s, q, ldq, out, k_pool, v_pool, partial); });
    float* O = (float*)scratch<4>((size_t)depth * 4);
    for (const Task& t : tasks) {
        const int count = (t.q1 - t.q0) * G * (t.head1 - t.head0);
        for (int r = 0; r < count; r++) {
            float M = -INFINITY, L = 0;
            for (int split = t.split0; split < t.split1; split++) {
                const float* from = partial + (t.partial + (i64)(split - t.split0) * count + r) * (depth + 2);
                merge(M, L, O, from[0], from[1], from + 2, depth);
            }
            finish_row(t, s, r, M, L, O, out);
        }
    }
}

// n numbers as the pools have them.
template <class T, class P>
INLINE void convert(const T* x, P* to, i64 n) {
    if constexpr (std::is_same<T, P>::value) {
        memcpy(to, x, n * sizeof(T));
    } else {
        i64 i = 0;
        for (; i + VL <= n; i += VL) store(to + i, load(x + i));
        if (i < n) store_part(to + i, load_part(x + i, n - i), n - i);
    }
}

// New keys and values, where there are any, go to their slots (keys rotated where cos_sin is given), and the queries are
// rotated in place. P: what the pools hold, T, 16 bits or codes.
template <class T, class P>
void write_kv(const Step& s, T* q, i64 ldq, const T* k, i64 ldk, const T* v, i64 ldv, i64 tokens, const i64* slots, P* k_pool, P* v_pool,
              const float* cos_sin, i64 rot, const int32_t* positions, int threads) {
    const i64 D = s.D, chunk = 16, k_size = s.kv_heads * D, v_size = s.kv_heads * s.V;
    const i64 parts = s.split < D ? 2 : 1;
    threads = limit_threads(threads, (double)tokens * (s.heads + 2 * s.kv_heads) * D, 65536);
    parallel((tokens + chunk - 1) / chunk, threads, [&](i64 c) {
        T* turned = (T*)scratch<9>(D * sizeof(T));
        for (i64 t = c * chunk; t < std::min(tokens, (c + 1) * chunk); t++) {
            P *to = k_pool + slots[t] * s.k_stride, *value = v_pool + slots[t] * s.v_stride;
            if constexpr (!Coded<P>::is) {
                if (v) convert(v + t * ldv, value, v_size);
                if (k && !cos_sin) convert(k + t * ldk, to, k_size);
            } else {
                for (i64 h = 0; v && h < s.kv_heads; h++) write_codes(v + t * ldv + h * s.V, s.V, s.V, value, v_size, h, 1);
            }
            const float* angle = cos_sin ? cos_sin + (i64)positions[t] * rot : nullptr;
            for (i64 h = 0; k && h < s.kv_heads; h++) {
                const T* key = k + t * ldk + h * D;
                if constexpr (std::is_same<T, P>::value) {
                    if (angle) rope_head(key, to + h * D, angle, rot, D);
                } else if constexpr (!Coded<P>::is) {
                    if (angle) {
                        rope_head(key, turned, angle, rot, D);
                        convert(turned, to + h * D, D);
                    }
                } else {
                    if (angle) rope_head(key, turned, angle, rot, D);
                    write_codes(angle ? turned : key, D, s.split, to, k_size, h, parts);
                }
            }
            for (i64 h = 0; angle && h < s.heads; h++) rope_head(q + t * ldq + h * D, q + t * ldq + h * D, angle, rot, D);
        }
    });
}

// ---------------------------------------------------------------- sampling

struct Params {  // forward.SAMPLING_DTYPE
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t seed;
    int32_t min_length, num_stop_ids, stop_ids[16];
};
static_assert(sizeof(Params) == 96, "must be SAMPLING_DTYPE");

uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// In [0, 1), 53 bits, a function of (seed, position) alone.
double uniform(uint64_t seed, uint64_t position) {
    return (double)(mix(mix(seed + 0x9e3779b97f4a7c15ull) + (position + 1) * 0x9e3779b97f4a7c15ull) >> 11) * 0x1p-53;
}

float max_of(const float* x, i64 n) {
    vf a = splat(-INFINITY), b = a;
    i64 i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        a = vmax(load(x + i), a);
        b = vmax(load(x + i + VL), b);
    }
    float m = max_lanes(vmax(a, b));
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

int32_t argmax(const float* x, i64 n) {
    float m = max_of(x, n);
    for (i64 i = 0; i < n; i++)
        if (x[i] == m) return (int32_t)i;
    return 0;  // nothing but NaN
}

struct Weight {  // exp((x - top) / temperature), zero below 2^-125
    float top, inverse;
    inline __attribute__((always_inline)) vf operator()(vf x) const {
        vf y = (x - top) * inverse;
        vf e = vexp(y);
        return y < -87.0f ? splat(0) : e;
    }
};

constexpr i64 SEGMENT = 1024;

float segment_sum(const Weight& weight, const float* x, i64 n) {
    vf s[2] = {};
    i64 i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        s[0] += weight(load(x + i));
        s[1] += weight(load(x + i + VL));
    }
    for (; i < n; i += VL) {
        vf y = splat(-INFINITY);
        for (int j = 0; j < VL && i + j < n; j++) y[j] = x[i + j];
        s[0] += weight(y);
    }
    return sum_lanes(s[0] + s[1]);
}

INLINE bool any_lane(vi x) {
#if defined(__AVX__) && VL == 8
    return _mm256_movemask_ps((__m256)x);
#else
    uint64_t words[VL / 2], all = 0;
    memcpy(words, &x, sizeof words);
    for (int i = 0; i < VL / 2; i++) all |= words[i];
    return all;
#endif
}

// Ids in rising order, with their logits and weights. Kept by its thread: it is as large as the vocabulary.
struct Candidates {
    std::vector<int32_t> id;
    std::vector<float> logit, weight;
    i64 count = 0;

    // All ids whose logit is at least `floor`.
    void gather(const float* x, i64 n, float floor, const Weight& weigh) {
        if ((i64)id.size() < n) {
            id.resize(n);
            logit.resize(n + VL);
            weight.resize(n + VL);
        }
        count = 0;
        auto add = [&](i64 i) {  // without a branch: in a flat row every other one would be mispredicted
            id[count] = (int32_t)i;
            logit[count] = x[i];
            count += x[i] >= floor;
        };
        i64 i = 0;
        for (; i + 4 * VL <= n; i += 4 * VL) {
            vf m = vmax(vmax(load(x + i), load(x + i + VL)), vmax(load(x + i + 2 * VL), load(x + i + 3 * VL)));
            if (any_lane(m >= floor))
                for (i64 j = i; j < i + 4 * VL; j++) add(j);
        }
        for (; i < n; i++) add(i);
        for (i64 j = 0; j < count; j += VL) store(&weight[j], weigh(load(&logit[j])));
    }
    template <class Keep>
    void filter(Keep keep) {
        i64 n = 0;
        for (i64 i = 0; i < count; i++) {
            id[n] = id[i];
            logit[n] = logit[i];
            weight[n] = weight[i];
            n += keep(i);
        }
        count = n;
    }
    double mass() const {
        double sum = 0;
        for (i64 i = 0; i < count; i++) sum += weight[i];
        return sum;
    }
};

void mask_stops(float* x, i64 V, const Params& p, int32_t position) {
    if (position < p.min_length)
        for (int i = 0; i < p.num_stop_ids; i++)
            if (p.stop_ids[i] >= 0 && p.stop_ids[i] < V) x[p.stop_ids[i]] = -INFINITY;
}

struct Filters {
    bool by_k, by_p, by_min;
    Filters(const Params& p, i64 V) : by_k(p.top_k > 0 && p.top_k < V), by_p(p.top_p < 1.0f), by_min(p.min_p > 0) {}
    bool any() const { return by_k || by_p || by_min; }
};

// The weights of a row by segments, and their sum, which is returned.
double sum_segments(const float* x, i64 V, const Weight& weight, std::vector<float>& sums) {
    const i64 segments = (V + SEGMENT - 1) / SEGMENT;
    double total = 0;
    sums.resize(segments);
    for (i64 g = 0; g < segments; g++) total += sums[g] = segment_sum(weight, x + g * SEGMENT, std::min(SEGMENT, V - g * SEGMENT));
    return total;
}

// What the filters leave of a row, in the order of ids. total: the mass of all, where by_p comes without by_k.
void keep_candidates(const float* x, i64 V, const Params& p, const Filters& by, const Weight& weight, double total, Candidates& kept) {
    static thread_local std::vector<float> values;
    // Candidates down to `depth` nats below the top, deeper until they must hold all that the filters keep.
    for (float depth = 8;; depth *= 2) {
        const bool all = depth > 200;
        kept.gather(x, V, all ? std::numeric_limits<float>::lowest() : weight.top - depth * p.temperature, weight);
        if (all) break;
        if (by.by_k ? kept.count >= p.top_k : by.by_p ? kept.mass() >= p.top_p * total : depth > -std::log(p.min_p)) break;
    }
    if (by.by_k && kept.count > p.top_k) {
        values.assign(kept.logit.begin(), kept.logit.begin() + kept.count);
        std::nth_element(values.begin(), values.begin() + (p.top_k - 1), values.end(), std::greater<float>());
        const float lowest = values[p.top_k - 1];  // equal logits all stay, as HF's comparison keeps them
        kept.filter([&](i64 i) { return kept.logit[i] >= lowest; });
    }
    if (by.by_p && kept.count > 0) {
        if (by.by_k) total = kept.mass();
        const double limit = p.top_p * total;
        // Buckets of equal width over the logits find where the mass is reached; only that bucket is sorted.
        constexpr int BUCKETS = 1024;
        static thread_local double bucket_mass[BUCKETS];
        std::fill(bucket_mass, bucket_mass + BUCKETS, 0.0);
        float bottom = weight.top;
        for (i64 i = 0; i < kept.count; i++) bottom = std::min(bottom, kept.logit[i]);
        const float step = bottom < weight.top ? (BUCKETS - 1) / (weight.top - bottom) : 0;
        auto bucket = [&](float logit) { return std::min(BUCKETS - 1, (int)((weight.top - logit) * step)); };
        for (i64 i = 0; i < kept.count; i++) bucket_mass[bucket(kept.logit[i])] += kept.weight[i];
        double before = 0;  // mass strictly ahead
        int b = 0;
        while (b + 1 < BUCKETS && before + bucket_mass[b] < limit) before += bucket_mass[b++];
        values.clear();
        for (i64 i = 0; i < kept.count; i++)
            if (bucket(kept.logit[i]) == b) values.push_back(kept.logit[i]);
        std::sort(values.begin(), values.end(), std::greater<float>());
        size_t n = 0;
        while (n < values.size() && ((b == 0 && n == 0) || before < limit)) before += weight(splat(values[n++]))[0];
        if (n > 0) {  // else the last bucket is empty and everything stays
            const float lowest = values[n - 1];
            i64 ties = 0;  // of the logits equal to `lowest` so many stay, the lowest ids first
            while (n > 0 && values[n - 1] == lowest) n--, ties++;
            kept.filter([&](i64 i) { return kept.logit[i] > lowest || (kept.logit[i] == lowest && ties-- > 0); });
        }
    }
    if (by.by_min) kept.filter([&](i64 i) { return kept.weight[i] >= p.min_p; });
}

int32_t sample_row(float* x, i64 V, const Params& p, int32_t position) {
    mask_stops(x, V, p, position);
    if (!(p.temperature > 0)) return argmax(x, V);
    const Weight weight{max_of(x, V), std::min(1.0f / p.temperature, 1e30f)};
    if (weight.top == -INFINITY || weight.top == INFINITY) return argmax(x, V);
    auto one = [&](float logit) { return (double)weight(splat(logit))[0]; };
    const double u = uniform(p.seed, (uint64_t)(int64_t)position);
    const Filters by(p, V);

    static thread_local std::vector<float> sums;
    const double total = by.by_k || (by.by_min && !by.by_p) ? 0 : sum_segments(x, V, weight, sums);
    if (!by.any()) {
        // Inverse of the distribution function in id order: first the segment, then the token.
        const i64 segments = (i64)sums.size();
        double left = u * total;
        i64 g = 0;
        while (g + 1 < segments && left >= sums[g]) left -= sums[g++];
        int32_t chosen = -1;
        for (; g < segments && chosen < 0; g++, left = 0)
            for (i64 i = g * SEGMENT; i < std::min(V, (g + 1) * SEGMENT); i++) {
                double e = one(x[i]);
                if (e <= 0) continue;
                chosen = (int32_t)i;
                if ((left -= e) < 0) break;
            }
        return chosen < 0 ? argmax(x, V) : chosen;
    }

    static thread_local Candidates kept;
    keep_candidates(x, V, p, by, weight, total, kept);
    double left = u * kept.mass();
    int32_t chosen = kept.count ? kept.id[0] : argmax(x, V);
    for (i64 i = 0; i < kept.count; i++) {
        if (kept.weight[i] <= 0) continue;
        chosen = kept.id[i];
        if ((left -= kept.weight[i]) < 0) break;
    }
    return chosen;
}

// What sample_row draws from: (logit - best) / temperature where the filters leave a token, -inf elsewhere; without a temperature
// the logits as they are.
void process_row(float* x, i64 V, const Params& p, int32_t position, float* out) {
    mask_stops(x, V, p, position);
    const float top = max_of(x, V);
    if (!(p.temperature > 0) || top == -INFINITY || top == INFINITY) {
        memcpy(out, x, V * sizeof(float));
        return;
    }
    const Weight weight{top, std::min(1.0f / p.temperature, 1e30f)};
    const Filters by(p, V);
    if (!by.any()) {
        for (i64 i = 0; i < V; i++) out[i] = (x[i] - top) * weight.inverse;
        return;
    }
    static thread_local std::vector<float> sums;
    static thread_local Candidates kept;
    keep_candidates(x, V, p, by, weight, by.by_k || !by.by_p ? 0 : sum_segments(x, V, weight, sums), kept);
    std::fill(out, out + V, -INFINITY);
    for (i64 i = 0; i < kept.count; i++) out[kept.id[i]] = (kept.logit[i] - top) * weight.inverse;
}

// ---------------------------------------------------------------- log-probabilities

struct Ranked {
    float logit;
    int32_t id;
};

// The k best logits with their ids, best first and of equals the lowest id; log of the sum of exp(logit - best).
void normalise_row(const float* x, i64 V, i64 k, float* log_sum, int32_t* ids, float* best) {
    static thread_local std::vector<Ranked> heap;  // its root is the worst that is kept
    auto better = [](const Ranked& a, const Ranked& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); };
    heap.clear();
    for (i64 i = 0; i < k; i++) heap.push_back({x[i], (int32_t)i});
    std::make_heap(heap.begin(), heap.end(), better);
    float floor = heap[0].logit;
    auto offer = [&](i64 i) {  // ids rise, so of equals the one that is there stays
        if (!(x[i] > floor)) return;
        std::pop_heap(heap.begin(), heap.end(), better);
        heap.back() = {x[i], (int32_t)i};
        std::push_heap(heap.begin(), heap.end(), better);
        floor = heap[0].logit;
    };
    i64 i = k;
    for (; i + 4 * VL <= V; i += 4 * VL) {
        vf m = vmax(vmax(load(x + i), load(x + i + VL)), vmax(load(x + i + 2 * VL), load(x + i + 3 * VL)));
        if (any_lane(m > floor))
            for (i64 j = i; j < i + 4 * VL; j++) offer(j);
    }
    for (; i < V; i++) offer(i);
    std::sort_heap(heap.begin(), heap.end(), better);
    for (i64 j = 0; j < k; j++) {
        ids[j] = heap[j].id;
        best[j] = heap[j].logit;
    }
    const Weight weight{best[0], 1.0f};
    double sum = 0;
    for (i64 g = 0; g < V; g += SEGMENT) sum += segment_sum(weight, x + g, std::min(SEGMENT, V - g));
    *log_sum = (float)std::log(sum);
}

// One more than the logits above `value`.
int32_t rank_row(const float* x, i64 V, float value) {
    vi count = {};
    i64 i = 0;
    for (; i + VL <= V; i += VL) count -= load(x + i) > value;
    int32_t rank = 1;
    for (int lane = 0; lane < VL; lane++) rank += count[lane];
    for (; i < V; i++) rank += x[i] > value;
    return rank;
}

#include "kernels_state.h"
#include "kernels_lora.h"
#include "kernels_encoder.h"

}  // namespace

// ---------------------------------------------------------------- the C ABI

#define COMMA ,
#define BY_TYPE(type, call) \
    if ((type) == F32) {    \
        typedef float T;    \
        call;               \
    } else {                \
        typedef bf16 T;     \
        call;               \
    }

EXPORT int64_t ol_vector_lanes() { return VL; }

EXPORT int64_t ol_threads(int64_t threads) {
    // How many threads a region of that many really gets; 1 where this was compiled without OpenMP.
    int64_t count = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads)
#pragma omp single
    count = omp_get_num_threads();
#endif
    return threads < 1 ? 1 : count;
}

EXPORT int64_t ol_multiplies_bf16() { return BF16_PAIRS; }

EXPORT int64_t ol_packed_size(int64_t type, int64_t N, int64_t K) {
    int64_t columns = (N + NR - 1) / NR * NR;
    BY_TYPE(type, return columns * steps_of<T>(K) * Inner<T>::depth)
}

EXPORT void ol_pack_weight(int64_t type, const void* w, int64_t N, int64_t K, void* out, int64_t threads) {
    BY_TYPE(type, pack_weight((const T*)w, N, K, (T*)out, (int)threads))
}

EXPORT void ol_unpack_rows(int64_t type, const void* packed, int64_t K, const void* ids, int64_t wide, int64_t count, void* out,
                           int64_t threads) {
    BY_TYPE(type, unpack_rows((const T*)packed, K, ids, wide != 0, count, (T*)out, (int)threads))
}

EXPORT void ol_linear(int64_t type, const void* x, int64_t ldx, int64_t M, int64_t K, const void* w, int64_t N, const float* bias,
                      void* out, int64_t out_type, int64_t ldo, int64_t threads) {
    const Plain<float> wide{(const float*)w, steps_of<float>(K)};
    const Plain<bf16> narrow{(const bf16*)w, steps_of<bf16>(K)};
    if (type == F32) linear((const float*)x, ldx, M, K, wide, N, bias, (float*)out, ldo, (int)threads);
    else if (out_type == F32) linear((const bf16*)x, ldx, M, K, narrow, N, bias, (float*)out, ldo, (int)threads);
    else linear((const bf16*)x, ldx, M, K, narrow, N, bias, (bf16*)out, ldo, (int)threads);
}

// By the numbers of ops/coded.py.
#define BY_CODES(form, statement)                           \
    switch (form) {                                         \
        case 0: { typedef Codes<FLOATS> C; statement; }     \
        default: { typedef Codes<PLACES> C; statement; }    \
    }

// In words of 32 bits; without a table.
EXPORT int64_t ol_codes_size(int64_t form, int64_t N, int64_t K) {
    BY_CODES(form, return (N + NR - 1) / NR * (K / C::span) * C::block)
}

EXPORT void ol_pack_codes(int64_t form, const void* codes, const float* scale, int64_t N, int64_t K, void* out, int64_t threads) {
    BY_CODES(form, return pack_codes<C>((const uint8_t*)codes, scale, N, K, (uint32_t*)out, (int)threads))
}

EXPORT void ol_code_rows(int64_t form, int64_t type, const void* w, int64_t K, const void* ids, int64_t wide, int64_t count, void* out,
                         int64_t threads) {
    BY_CODES(form, BY_TYPE(type, return code_rows<C>((const uint32_t*)w, K, ids, wide != 0, count, (T*)out, (int)threads)))
}

// x and out are of one type.
EXPORT void ol_linear_codes(int64_t form, int64_t type, const void* x, int64_t ldx, int64_t M, int64_t K, const void* w, int64_t N,
                            const float* bias, void* out, int64_t ldo, int64_t threads) {
    BY_CODES(form, const C source{(const uint32_t*)w COMMA K / C::span};
             BY_TYPE(type, return linear((const T*)x, ldx, M, K, source, N, bias, (T*)out, ldo, (int)threads)))
}

// The types of GGUF, by their numbers.
#define BY_FORMAT(number)     \
    switch (number) {         \
        EVERY_FORMAT(CASE_OF) \
    }

// In bytes; 0 where a type has no kernels.
EXPORT int64_t ol_packed_blocks(int64_t format, int64_t N, int64_t K) {
#define CASE_OF(F) \
    case F::number: return K % F::super ? 0 : (N + NR - 1) / NR * (K / F::super) * Layout<F>::bytes;
    BY_FORMAT(format)
#undef CASE_OF
    return 0;
}

// rows: addresses of the blocks of each. The row that has a scale that is no finite number, or -1.
EXPORT int64_t ol_pack_blocks(int64_t format, const void* rows, int64_t N, int64_t K, void* out, int64_t threads) {
    i64 bad = -1;
#define CASE_OF(F) \
    case F::number: pack_blocks<F>((const uint8_t* const*)rows, N, K, (uint8_t*)out, &bad, (int)threads); break;
    BY_FORMAT(format)
#undef CASE_OF
    return bad;
}

// Whether a type has products with inputs of eight bits.
EXPORT int64_t ol_takes_eight_bits(int64_t format) {
#define CASE_OF(F) \
    case F::number: return Eight<F>::can;
    BY_FORMAT(format)
#undef CASE_OF
    return 0;
}

EXPORT void ol_block_rows(int64_t format, int64_t type, const void* w, int64_t K, const void* ids, int64_t wide, int64_t count, void* out,
                          int64_t threads) {
#define CASE_OF(F) \
    case F::number: BY_TYPE(type, packed_rows<F>((const uint8_t*)w, K, ids, wide != 0, count, (T*)out, (int)threads)) break;
    BY_FORMAT(format)
#undef CASE_OF
}

// x and out are of one type. format | EIGHT_BITS: inputs of eight bits.
EXPORT void ol_linear_blocks(int64_t format, int64_t type, const void* x, int64_t ldx, int64_t M, int64_t K, const void* w, int64_t N,
                             const float* bias, void* out, int64_t ldo, int64_t threads) {
    Format f{};
    const bool eight = format & EIGHT_BITS;
#define CASE_OF(F) \
    case F::number: f = format_of<F>(eight); break;
    BY_FORMAT(format & ~EIGHT_BITS)
#undef CASE_OF
    if (!f.super) return;
    BY_TYPE(type, packed_linear(f, (const T*)x, ldx, M, K, (const uint8_t*)w, N, bias, (T*)out, ldo, (int)threads))
}

EXPORT void ol_linear_heads(int64_t type, const void* x, int64_t ldx, int64_t stepx, int64_t M, int64_t K, const void* w, int64_t N,
                            int64_t heads, void* out, int64_t ldo, int64_t stepo, int64_t threads) {
    // A product for each head: heads lie stepx and stepo apart within a row, and one after another in w.
    const int64_t panel = ol_packed_size(type, N, K);
    const int outer = limit_threads((int)std::min(threads, heads), (double)M * N * K * heads, 131072);
    const int inner = outer > 1 ? 1 : (int)threads;
    BY_TYPE(type, parallel(heads, outer, [&](i64 h) {
                const Plain<T> source{(const T*)w + h * panel COMMA steps_of<T>(K)};
                linear((const T*)x + h * stepx, ldx, M, K, source, N, (const float*)nullptr, (T*)out + h * stepo, ldo, inner);
            }))
}

// weight_type: float32, or that of x.
EXPORT void ol_rms_norm(int64_t type, const void* x, int64_t ldx, void* residual, int64_t ldr, int64_t weight_type, const void* weight,
                        void* out, int64_t ldo, int64_t rows, int64_t H, float eps, int64_t threads) {
#define WITH_WEIGHT(W)                                                                                                                 \
    if (residual) rms_norm<T COMMA W COMMA true>((const T*)x, ldx, (T*)residual, ldr, (const W*)weight, (T*)out, ldo, rows, H, eps,    \
                                                 (int)threads);                                                                       \
    else rms_norm<T COMMA W COMMA false>((const T*)x, ldx, (T*)nullptr, 0, (const W*)weight, (T*)out, ldo, rows, H, eps, (int)threads);
    BY_TYPE(type, if (weight_type == F32) { WITH_WEIGHT(float) } else { WITH_WEIGHT(T) })
#undef WITH_WEIGHT
}

// out may be x; residual may be null, and is where the sum is left.
EXPORT void ol_layer_norm(int64_t type, const void* x, int64_t ldx, void* residual, int64_t ldr, const float* weight, const float* bias,
                          void* out, int64_t rows, int64_t H, float eps, int64_t threads) {
    BY_TYPE(type, layer_norm((const T*)x, ldx, (T*)residual, ldr, weight, bias, (T*)out, H, rows, H, eps, (int)threads))
}

// kind: of Activation.
EXPORT void ol_activate(int64_t type, const void* x, int64_t ldx, void* out, int64_t rows, int64_t width, int64_t kind, int64_t threads) {
    BY_TYPE(type, activate_by(kind, (const T*)x, ldx, (T*)out, rows, width, (int)threads))
}

// All texts through a layer; x in place. starts [texts + 1]: the first row of each.
EXPORT void ol_encode(const EncoderLayer* layer, void* x, const int32_t* starts, int64_t texts, int64_t threads) {
    BY_TYPE(layer->type, encode(*layer, (T*)x, starts, texts, (int)threads))
}

// Rows of so many bytes, ldx bytes apart, to one behind the other.
EXPORT void ol_copy_rows(const void* x, int64_t ldx, int64_t rows, int64_t bytes, void* out) {
    for (i64 r = 0; r < rows; r++) memcpy((char*)out + r * bytes, (const char*)x + r * ldx, bytes);
}

EXPORT void ol_gate_and_mul(int64_t type, const void* x, int64_t ldx, void* out, int64_t rows, int64_t I, int64_t gelu, int64_t threads) {
    BY_TYPE(type, if (gelu) gate_and_mul<T COMMA true>((const T*)x, ldx, (T*)out, rows, I, (int)threads);
            else gate_and_mul<T COMMA false>((const T*)x, ldx, (T*)out, rows, I, (int)threads))
}

EXPORT void ol_rope(int64_t type, void* x, int64_t ldx, int64_t tokens, int64_t heads, int64_t D, const float* cos_sin, int64_t rot,
                    const void* positions, int64_t wide, int64_t threads) {
    BY_TYPE(type, rope((T*)x, ldx, tokens, heads, D, cos_sin, rot, positions, wide != 0, (int)threads))
}

struct AttentionStep {  // ops/attention/torch_paged.py builds it once a step
    const int32_t *qo_indptr, *kv_indptr, *kv_indices, *last_page_len, *positions;
    const int64_t* kv_slots;
    int64_t rows, tokens, heads, kv_heads, head_dim, value_dim, k_stride, v_stride, page_size, both, type, threads;
    int64_t pools, split;  // Pools, or 0; of a key in codes, see Step
    float scale, softcap;
};

EXPORT void ol_attention(const AttentionStep* a, void* q, int64_t ldq, const void* k, int64_t ldk, const void* v, int64_t ldv, void* k_pool,
                         void* v_pool, void* out, int64_t window, int64_t chunks, const float* sinks, const float* cos_sin, int64_t rot) {
    Step s{a->qo_indptr, a->kv_indptr, a->kv_indices, a->last_page_len, a->rows,      a->heads, a->kv_heads, a->head_dim,
           a->value_dim, a->k_stride,  a->v_stride,   a->page_size,     window,       a->both,  a->scale,    a->softcap,
           sinks,        chunks != 0,  a->split};
    const int threads = (int)a->threads;
#define WITH_POOLS(P)                                                                                                               \
    write_kv(s, (T*)q, ldq, (const T*)k, ldk, (const T*)v, ldv, a->tokens, a->kv_slots, (P*)k_pool, (P*)v_pool, cos_sin, rot,       \
             a->positions, threads);                                                                                               \
    attend(s, (const T*)q, ldq, (T*)out, (const P*)k_pool, (const P*)v_pool, threads);
    BY_TYPE(a->type, switch (a->pools) {
        case POOLS_CODES: { WITH_POOLS(int8_t) break; }
        case POOLS_F16: { WITH_POOLS(f16) break; }
        case POOLS_BF16: { WITH_POOLS(bf16) break; }
        default: { WITH_POOLS(T) }
    })
#undef WITH_POOLS
}

EXPORT void ol_convolve(const StateRows* rows, int64_t type, const void* x, int64_t ldx, void* out, void* states, int64_t stride,
                        const float* weight, const float* bias, int64_t taps, int64_t C, int64_t silu, int64_t threads) {
    BY_TYPE(type, if (silu) convolve<T COMMA true>((const T*)x, ldx, (T*)out, (T*)states, stride, weight, bias, taps, C, *rows,
                                                   (int)threads);
            else convolve<T COMMA false>((const T*)x, ldx, (T*)out, (T*)states, stride, weight, bias, taps, C, *rows, (int)threads))
}

EXPORT void ol_recur(const StateRows* rows, int64_t type, int64_t delta, const void* q, int64_t ldq, const void* k, int64_t ldk,
                     const void* v, int64_t ldv, const void* step, int64_t ld_step, const void* share, int64_t ld_share,
                     const float* rate, const float* step_bias, const float* skip, float* states, int64_t stride, void* out,
                     int64_t key_heads, int64_t heads, int64_t K, int64_t V, float scale, float least_step, float most_step,
                     int64_t threads) {
    const Recurrence r{*rows, q,       k,       v,        step,   share,     rate,  step_bias, skip, states, out, ldq, ldk,
                       ldv,   ld_step, ld_share, stride, key_heads, heads, K,         V,    scale,  least_step, most_step};
    BY_TYPE(type, if (delta) recur<T COMMA true>(r, (int)threads); else recur<T COMMA false>(r, (int)threads))
}

EXPORT void ol_gate(int64_t type, const void* x, int64_t ldx, const void* gates, int64_t ldg, void* out, int64_t rows, int64_t width,
                    int64_t silu, int64_t threads) {
    BY_TYPE(type, if (silu) gate<T COMMA true>((const T*)x, ldx, (const T*)gates, ldg, (T*)out, rows, width, (int)threads);
            else gate<T COMMA false>((const T*)x, ldx, (const T*)gates, ldg, (T*)out, rows, width, (int)threads))
}

EXPORT void ol_gated_norm(int64_t type, const void* x, int64_t ldx, const void* gates, int64_t ldg, const float* weight, int64_t step,
                          void* out, int64_t rows, int64_t parts, int64_t width, float eps, int64_t gate_first, int64_t threads) {
    BY_TYPE(type, if (gate_first) gated_norm<T COMMA true>((const T*)x, ldx, (const T*)gates, ldg, weight, step, (T*)out, rows, parts, width,
                                                           eps, (int)threads);
            else gated_norm<T COMMA false>((const T*)x, ldx, (const T*)gates, ldg, weight, step, (T*)out, rows, parts, width, eps,
                                           (int)threads))
}

EXPORT void ol_lora(int64_t type, const void* x, int64_t ldx, int64_t K, void* y, int64_t ldy, const int32_t* rows, const void* groups,
                    int64_t num_groups, const void* table, float* h, int64_t ldh, int64_t threads) {
    BY_TYPE(type, lora(LoraCall<T>{(const T*)x COMMA (T*)y COMMA h COMMA ldx COMMA ldy COMMA ldh COMMA K COMMA rows COMMA
                                   (const LoraGroup*)groups COMMA (const LoraBranch* const*)table}, num_groups, (int)threads));
}

EXPORT void ol_sample(float* logits, int64_t rows, int64_t V, const void* params, const int32_t* positions, int32_t* out, int64_t threads) {
    parallel(rows, limit_threads((int)threads, (double)rows * V, 65536),
             [&](i64 r) { out[r] = sample_row(logits + r * V, V, ((const Params*)params)[r], positions[r]); });
}

// rows: those that are wanted; out [count, V].
EXPORT void ol_process(float* logits, int64_t V, const int64_t* rows, int64_t count, const void* params, const int32_t* positions, float* out,
                       int64_t threads) {
    parallel(count, limit_threads((int)threads, (double)count * V, 65536), [&](i64 r) {
        process_row(logits + rows[r] * V, V, ((const Params*)params)[rows[r]], positions[rows[r]], out + r * V);
    });
}

EXPORT void ol_normalise(const float* logits, int64_t V, const int64_t* rows, int64_t count, int64_t k, float* log_sum, int32_t* ids,
                         float* best, int64_t threads) {
    parallel(count, limit_threads((int)threads, (double)count * V, 65536),
             [&](i64 r) { normalise_row(logits + rows[r] * V, V, k, log_sum + r, ids + r * k, best + r * k); });
}

EXPORT void ol_ranks(const float* logits, int64_t V, const int64_t* rows, int64_t count, const float* values, int32_t* out,
                     int64_t threads) {
    parallel(count, limit_threads((int)threads, (double)count * V, 262144),
             [&](i64 r) { out[r] = rank_row(logits + rows[r] * V, V, values[r]); });
}

#include "kernels_ranks.h"

// ---- calls that are made again, for recording.py: an entry takes its arguments from 64-bit words

template <class A>
INLINE A from_word(uint64_t word) {
    A value;
    if constexpr (std::is_floating_point_v<A>) {
        const uint32_t bits = (uint32_t)word;
        memcpy(&value, &bits, 4);
    } else {
        memcpy(&value, &word, 8);
    }
    return value;
}
// Whether the next may be made.
template <class R, class... A, size_t... I>
INLINE bool call_with(R (*function)(A...), const uint64_t* words, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
        function(from_word<A>(words[I])...);
        return true;
    } else {
        return function(from_word<A>(words[I])...) == 0;
    }
}
template <class R, class... A>
constexpr std::index_sequence_for<A...> kinds_of(R (*)(A...)) { return {}; }
template <auto Function>
static bool entry(const uint64_t* words) { return call_with(Function, words, kinds_of(Function)); }

EXPORT const void* ol_entry(const char* name) {
#define ENTRY(function) \
    if (!strcmp(name, #function)) return (const void*)entry<function>;
    ENTRY(ol_linear) ENTRY(ol_linear_codes) ENTRY(ol_linear_blocks) ENTRY(ol_rms_norm) ENTRY(ol_gate_and_mul) ENTRY(ol_attention) ENTRY(ol_copy_rows)
    ENTRY(ol_convolve) ENTRY(ol_recur) ENTRY(ol_gate) ENTRY(ol_gated_norm)
#undef ENTRY
    // However briefly it was tried: made again it waits as long as it takes.
    if (!strcmp(name, "ol_ranks_sum")) return (const void*)entry<ol_ranks_go_on>;
    return nullptr;
}

// calls: for each the entry, the number of its words, and they. 1 where one has failed, which was the last.
EXPORT int64_t ol_replay(const uint64_t* calls, int64_t count) {
    for (i64 i = 0; i < count; i++, calls += 2 + calls[1])
        if (!((bool (*)(const uint64_t*))calls[0])(calls + 2)) return 1;
    return 0;
}

// ---- the machine's limits, for bench/cpu.py

EXPORT double ol_read(const void* data, int64_t bytes, int64_t threads) {
    const int64_t part = 1 << 20;
    std::atomic<uint32_t> total{0};
    parallel(bytes / part, (int)threads, [&](i64 i) {
        const uint32_t* p = (const uint32_t*)((const char*)data + i * part);
        vu s[4] = {};
        for (i64 j = 0; j < part / 4; j += 4 * VL)
            for (int n = 0; n < 4; n++) s[n] += *(const vu_any*)(p + j + n * VL);
        vu t = s[0] + s[1] + s[2] + s[3];
        total += t[0];
    });
    return total.load();
}

EXPORT double ol_fma(int64_t rounds, int64_t threads) {
    // `rounds` times ACCUMULATORS vector multiply-adds on each thread.
    double result = 0;
    parallel(threads, (int)threads, [&](i64) {
        vf a[ACCUMULATORS];
        for (int i = 0; i < ACCUMULATORS; i++) a[i] = splat(i);
        vf x = splat(0.999f), y = splat(0.001f);
        asm volatile("" : "+m"(x), "+m"(y));
        for (i64 k = 0; k < rounds; k++)
            for (int i = 0; i < ACCUMULATORS; i++) a[i] = fma(a[i], x, y);
        for (int i = 0; i < ACCUMULATORS; i++) asm volatile("" : "+m"(a[i]));
    });
    return result + (double)rounds * threads * ACCUMULATORS * VL * 2;
}
