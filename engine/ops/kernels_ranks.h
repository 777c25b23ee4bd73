// What the ranks of a tensor parallel group say to each other, included by kernels.cpp: words in shared memory that one
// process counts up and others wait for (they spin, then yield, then sleep on a futex), and a sum of what all have.
// Sums are taken element by element in the order of the ranks: neither the number of rows nor their cutting into pieces
// changes a bit, which a ring of neighbours would from three ranks on.

#if defined(__linux__)
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace {

// A cache line of its own. sleepers: who must be woken.
struct Word {
    std::atomic<uint32_t> value, sleepers;
    char rest[56];
};
static_assert(sizeof(Word) == 64, "a word is a cache line");

// engine/ops/ranks.py builds one for a process. words: `ended` first, then one for each rank. slots: [2][size] of slot_bytes.
struct RankGroup {
    Word* words;
    char* slots;
    int64_t rank, size, slot_bytes;
    int64_t done;           // rows of a sum that are through, while one is going on
    uint32_t count, given;  // collectives begun; whether this rank's part of the current piece lies there
};

// A cache line behind all words, one for each rank: nanoseconds in collectives so far, until others had arrived, and to copy
// and to add.
struct Spent {
    int64_t waited, added, rest[6];
};
INLINE Spent& spent_of(const RankGroup& g) { return *(Spent*)(g.words + 2 + g.size + g.rank); }

enum { REACHED = 0, NOT_YET = 1, ENDED = 2 };

// Nanoseconds that a wait spins before it offers its core to others, and before it sleeps: waking a sleeper takes its waker
// tens of microseconds, and the sums of a step follow one another more closely than that pays.
constexpr i64 SPIN_NS = 60000, YIELD_NS = 2000000;

INLINE i64 nanoseconds() {
#if defined(__linux__)
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (i64)now.tv_sec * 1000000000 + now.tv_nsec;
#else
    return 0;
#endif
}
INLINE void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}
INLINE bool reached(const Word& word, uint32_t target) {
    return (int32_t)(word.value.load(std::memory_order_acquire) - target) >= 0;
}

inline void wake(Word& word) {
#if defined(__linux__)
    syscall(SYS_futex, (uint32_t*)&word.value, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
}
inline void post(Word& word, uint32_t value) {
    word.value.store(value, std::memory_order_seq_cst);
    if (word.sleepers.load(std::memory_order_seq_cst)) wake(word);
}

// Until the word is at `target` or beyond. brief: nanoseconds to spin, then NOT_YET; 0: as long as it takes.
inline int wait_for(Word& word, uint32_t target, const Word& ended, i64 brief = 0) {
    if (reached(word, target)) return REACHED;
    const i64 begin = nanoseconds(), most = brief ? brief : YIELD_NS;
    for (i64 passed = 0; passed < most; passed = nanoseconds() - begin) {
#if defined(__linux__)
        if (!brief && passed > SPIN_NS) sched_yield();
#endif
        for (int i = 0; i < 64; i++) {
            if (reached(word, target)) return REACHED;
            breathe();
        }
        if (ended.value.load(std::memory_order_acquire)) return ENDED;
    }
    if (brief) return NOT_YET;
#if defined(__linux__)
    word.sleepers.fetch_add(1, std::memory_order_seq_cst);
    int result = REACHED;
    for (;;) {
        uint32_t seen = word.value.load(std::memory_order_seq_cst);
        if ((int32_t)(seen - target) >= 0) break;
        if (ended.value.load(std::memory_order_seq_cst)) {
            result = ENDED;
            break;
        }
        // Not for ever: who ends the group may have looked for sleepers a moment before.
        const timespec some = {0, 100000000};
        syscall(SYS_futex, (uint32_t*)&word.value, FUTEX_WAIT, seen, &some, nullptr, 0);
    }
    word.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    return result;
#else
    return ENDED;
#endif
}

template <class T>
void sum_rows(const char* first, i64 slot_bytes, i64 ranks, i64 rows, i64 columns, const float* bias, T* out) {
    for (i64 row = 0; row < rows; row++) {
        const T* part = (const T*)first + row * columns;
        T* to = out + row * columns;
        const i64 stride = slot_bytes / (i64)sizeof(T);
        i64 i = 0;
        for (; i + VL <= columns; i += VL) {
            vf sum = load(part + i);
            for (i64 rank = 1; rank < ranks; rank++) sum += load(part + rank * stride + i);
            if (bias) sum += load(bias + i);
            store(to + i, sum);
        }
        for (; i < columns; i++) {
            float sum = load1(part + i);
            for (i64 rank = 1; rank < ranks; rank++) sum += load1(part + rank * stride + i);
            store1(to + i, bias ? sum + bias[i] : sum);
        }
    }
}

}  // namespace

EXPORT void ol_word_post(void* word, int64_t value) { post(*(Word*)word, (uint32_t)value); }

EXPORT int64_t ol_word_wait(void* word, int64_t target, const void* ended) {
    return wait_for(*(Word*)word, (uint32_t)target, *(const Word*)ended);
}

// Everybody who waits stops waiting, now and from now on.
EXPORT void ol_ranks_end(void* group) {
    RankGroup& g = *(RankGroup*)group;
    g.words[0].value.store(1, std::memory_order_seq_cst);
    for (i64 word = 1; word <= g.size + 1; word++) wake(g.words[word]);
}

// This rank's part of a collective lies where the others look for it.
EXPORT void ol_ranks_arrive(void* group) {
    RankGroup& g = *(RankGroup*)group;
    post(g.words[1 + g.rank], ++g.count);
}

// Until all have arrived at the collective that this rank was the last to arrive at. brief: see wait_for.
EXPORT int64_t ol_ranks_meet(void* group, int64_t brief) {
    RankGroup& g = *(RankGroup*)group;
    const i64 begin = nanoseconds();
    int how = REACHED;
    for (i64 rank = 0; rank < g.size && how == REACHED; rank++)
        if (rank != g.rank) how = wait_for(g.words[1 + rank], g.count, g.words[0], brief);
    spent_of(g).waited += nanoseconds() - begin;
    return how;
}

// out = the sum of all ranks' x, and bias; [rows, columns], out may be x. NOT_YET, where it is to be brief: ol_ranks_go_on with
// the same goes on. A piece uses the slots that the one before did not: nobody writes what another still reads.
EXPORT int64_t ol_ranks_sum(void* group, int64_t type, const void* x, void* out, int64_t rows, int64_t columns, const float* bias,
                            int64_t brief) {
    RankGroup& g = *(RankGroup*)group;
    const i64 item = type == F32 ? 4 : 2, width = columns * item;
    const i64 most = std::max<i64>(1, g.slot_bytes / width);
    while (g.done < rows) {
        const i64 now = std::min(most, rows - g.done);
        i64 begin = nanoseconds();
        if (!g.given) {
            char* own = g.slots + ((i64)((g.count + 1) % 2) * g.size + g.rank) * g.slot_bytes;
            memcpy(own, (const char*)x + g.done * width, (size_t)(now * width));
            g.given = 1;
            spent_of(g).added += nanoseconds() - begin;
            ol_ranks_arrive(group);
        }
        if (int64_t how = ol_ranks_meet(group, brief)) return how;
        begin = nanoseconds();
        const char* first = g.slots + (i64)(g.count % 2) * g.size * g.slot_bytes;
        char* to = (char*)out + g.done * width;
        if (type == F32) sum_rows(first, g.slot_bytes, g.size, now, columns, bias, (float*)to);
        else sum_rows(first, g.slot_bytes, g.size, now, columns, bias, (bf16*)to);
        spent_of(g).added += nanoseconds() - begin;
        g.given = 0;
        g.done += now;
    }
    g.done = 0;
    return REACHED;
}

// The rest of a sum that was to be brief.
EXPORT int64_t ol_ranks_go_on(void* group, int64_t type, const void* x, void* out, int64_t rows, int64_t columns, const float* bias) {
    return ol_ranks_sum(group, type, x, out, rows, columns, bias, 0);
}
