// Passes over long vectors, each of which reads what it needs once.
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// A square is rounded before it is added, as it is without a compiler.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int64_t BLOCK = 32768, LANES = 16, MOST = 6;
constexpr int64_t PAGE = 4096, AHEAD = 4;  // bytes, lines
constexpr int64_t BEYOND_CACHE = 1 << 22;  // numbers that push each other out of it

// sum = lefts[N-2] + (... + (lefts[0] + (a + b))), the parentheses of a tree whose right edge ends in N additions.
template <int N, class T>
void add(const T *a, const T *b, const T *const *lefts, T *sum, int64_t size) {
    for (int64_t page = 0; page < size; page += PAGE / sizeof(T)) {
        const int64_t next = page + PAGE / sizeof(T), end = next < size ? next : size;
        // Processors look ahead within a page of memory, and begin anew with each.
        for (int64_t line = 0; line < AHEAD; ++line) {
            __builtin_prefetch(reinterpret_cast<const char *>(a + next) + 64 * line);
            __builtin_prefetch(reinterpret_cast<const char *>(b + next) + 64 * line);
        }
        for (int64_t j = page; j < end; ++j) {
            T s = a[j] + b[j];
            for (int k = 0; k < N - 1; ++k) s = lefts[k][j] + s;
            sum[j] = s;
        }
    }
}

template <class T>
void add_all(int64_t additions, const T *a, const T *b, const T *const *lefts, T *sum, int64_t size) {
    switch (additions) {
        case 1: return add<1>(a, b, lefts, sum, size);
        case 2: return add<2>(a, b, lefts, sum, size);
        case 3: return add<3>(a, b, lefts, sum, size);
        case 4: return add<4>(a, b, lefts, sum, size);
        case 5: return add<5>(a, b, lefts, sum, size);
        default: return add<MOST>(a, b, lefts, sum, size);
    }
}

// Copies past the cache, which spares the memory from being read where it is to be written. `to` begins a line of it.
void copy_past_cache(const void *from, void *to, int64_t bytes) {
    const char *in = static_cast<const char *>(from);
    char *out = static_cast<char *>(to);
    int64_t done = 0;
#if defined(__AVX512F__)
    for (; done + 64 <= bytes; done += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(out + done), _mm512_loadu_si512(in + done));
    _mm_sfence();
#elif defined(__AVX__)
    for (; done + 32 <= bytes; done += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i *>(out + done),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(in + done)));
    _mm_sfence();
#elif defined(__SSE2__)
    for (; done + 16 <= bytes; done += 16)
        _mm_stream_si128(reinterpret_cast<__m128i *>(out + done),
                         _mm_loadu_si128(reinterpret_cast<const __m128i *>(in + done)));
    _mm_sfence();
#endif
    std::memcpy(out + done, in + done, bytes - done);
}

// The sum of vectors by a tree, made block by block: every vector is read once.
// `program` is the tree in postfix: k >= 0 puts vector k on the stack, -1 replaces the two on top by their sum.
template <class T>
class Tree {
   public:
    Tree(const T *const *in, const int32_t *program, int64_t length) : in_(in), program_(program), length_(length) {
        int64_t depth = 0, waiting = 0;
        for (int64_t i = 0; i < length; ++i) {
            waiting += program[i] >= 0 ? 1 : -1;
            if (waiting > depth) depth = waiting;
        }
        scratch_.resize(depth * BLOCK);
        stack_.resize(depth);
    }

    // The sum of up to BLOCK numbers from `at`: in `out`, or where it lies if nothing is to be added.
    const T *sum(int64_t at, int64_t size, T *out) {
        int64_t top = 0;
        for (int64_t i = 0; i < length_;) {
            if (program_[i] >= 0) {
                stack_[top++] = in_[program_[i++]] + at;
                continue;
            }
            // Additions that follow one another are made without their sums being written in between.
            int64_t additions = 0;
            const T *lefts[MOST];
            while (i < length_ && program_[i] < 0 && additions < MOST) {
                if (additions) lefts[additions - 1] = stack_[top - 2 - additions];
                ++additions, ++i;
            }
            // The last sum goes where it belongs; the others to the place of the leftmost one.
            const int64_t place = top - 1 - additions;
            T *sum = i == length_ ? out : &scratch_[place * BLOCK];
            add_all(additions, stack_[top - 2], stack_[top - 1], lefts, sum, size);
            stack_[place] = sum;
            top = place + 1;
        }
        return stack_[0];
    }

   private:
    const T *const *in_;
    const int32_t *program_;
    int64_t length_;
    std::vector<T> scratch_;
    std::vector<const T *> stack_;
};

template <class T>
void tree_sum(const T *const *in, const int32_t *program, int64_t length, T *out, int64_t n) {
    Tree<T> tree(in, program, length);
    for (int64_t at = 0; at < n; at += BLOCK) tree.sum(at, n - at < BLOCK ? n - at : BLOCK, out + at);
}

// Numbers to where they belong, past the cache but for the first, that begin no line of it.
template <class T>
void put(const T *from, T *to, int64_t size) {
    int64_t first = 0;
    while (first < size && reinterpret_cast<uintptr_t>(to + first) % 64) {
        to[first] = from[first];
        ++first;
    }
    copy_past_cache(from + first, to + first, (size - first) * sizeof(T));
}

// The sum divided by `tasks`, and the sum of squares of each chunk of it, while it is in the cache. The bounds of the
// chunks are one more than they. Squares are added in as many lanes as are added in their order at the end.
template <class T>
void tree_mean(const T *const *in, const int32_t *program, int64_t length, const int64_t *bounds, int64_t chunks,
               T tasks, T *out, double *squares) {
    static_assert(BLOCK % LANES == 0, "a block begins with the first lane");
    Tree<T> tree(in, program, length);
    const bool past_cache = bounds[chunks] - bounds[0] >= BEYOND_CACHE;
    std::vector<T> block(past_cache ? BLOCK : 0);
    for (int64_t i = 0; i < chunks; ++i) {
        double lanes[LANES] = {};
        for (int64_t at = bounds[i]; at < bounds[i + 1]; at += BLOCK) {
            const int64_t size = bounds[i + 1] - at < BLOCK ? bounds[i + 1] - at : BLOCK;
            T *mean = past_cache ? block.data() : out + at;
            const T *sum = tree.sum(at, size, mean);
            int64_t j = 0;
            for (; j + LANES <= size; j += LANES) {
                T x[LANES];  // in registers: the mean may lie where the sum does
                for (int64_t k = 0; k < LANES; ++k) x[k] = sum[j + k] / tasks;
                for (int64_t k = 0; k < LANES; ++k) mean[j + k] = x[k];
                for (int64_t k = 0; k < LANES; ++k) lanes[k] += static_cast<double>(x[k]) * static_cast<double>(x[k]);
            }
            for (int64_t k = 0; j < size; ++j, ++k) {
                mean[j] = sum[j] / tasks;
                lanes[k] += static_cast<double>(mean[j]) * static_cast<double>(mean[j]);
            }
            if (past_cache) put(mean, out + at, size);
        }
        squares[i] = 0;
        for (double lane : lanes) squares[i] += lane;
    }
}

}  // namespace

extern "C" {
void tree_sum_f32(const float *const *in, const int32_t *program, int64_t length, float *out, int64_t n) {
    tree_sum(in, program, length, out, n);
}
void tree_sum_f64(const double *const *in, const int32_t *program, int64_t length, double *out, int64_t n) {
    tree_sum(in, program, length, out, n);
}
void copy(const void *from, void *to, int64_t bytes) {
    put(static_cast<const char *>(from), static_cast<char *>(to), bytes);
}
void tree_mean_f32(const float *const *in, const int32_t *program, int64_t length, const int64_t *bounds,
                   int64_t chunks, double tasks, float *out, double *squares) {
    tree_mean(in, program, length, bounds, chunks, static_cast<float>(tasks), out, squares);
}
void tree_mean_f64(const double *const *in, const int32_t *program, int64_t length, const int64_t *bounds,
                   int64_t chunks, double tasks, double *out, double *squares) {
    tree_mean(in, program, length, bounds, chunks, tasks, out, squares);
}
}
