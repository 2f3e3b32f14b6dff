// Passes over long vectors, each of which reads what it needs once.
#include <cstdint>
#include <vector>

// A square is rounded before it is added, as it is without a compiler.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int64_t BLOCK = 32768, LANES = 16, MOST = 6;

// sum = lefts[N-2] + (... + (lefts[0] + (a + b))), the parentheses of a tree whose right edge ends in N additions.
template <int N, class T>
void add(const T *a, const T *b, const T *const *lefts, T *sum, int64_t size) {
    for (int64_t j = 0; j < size; ++j) {
        T s = a[j] + b[j];
        for (int k = 0; k < N - 1; ++k) s = lefts[k][j] + s;
        sum[j] = s;
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

// Sums of vectors by a tree, block by block: every vector is read once, and the sum written once.
// `program` is the tree in postfix: k >= 0 puts vector k on the stack, -1 replaces the two on top by their sum.
template <class T>
void tree_sum(const T *const *in, const int32_t *program, int64_t length, T *out, int64_t n) {
    int64_t depth = 0, waiting = 0;
    for (int64_t i = 0; i < length; ++i) {
        waiting += program[i] >= 0 ? 1 : -1;
        if (waiting > depth) depth = waiting;
    }
    std::vector<T> scratch(depth * BLOCK);
    std::vector<const T *> stack(depth);
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int64_t size = n - at < BLOCK ? n - at : BLOCK;
        int64_t top = 0;
        for (int64_t i = 0; i < length;) {
            if (program[i] >= 0) {
                stack[top++] = in[program[i++]] + at;
                continue;
            }
            // Additions that follow one another are made without their sums being written in between.
            int64_t additions = 0;
            const T *lefts[MOST];
            while (i < length && program[i] < 0 && additions < MOST) {
                if (additions) lefts[additions - 1] = stack[top - 2 - additions];
                ++additions, ++i;
            }
            // The last sum goes where it belongs; the others to the place of the leftmost one.
            const int64_t place = top - 1 - additions;
            T *sum = i == length ? out + at : &scratch[place * BLOCK];
            add_all(additions, stack[top - 2], stack[top - 1], lefts, sum, size);
            stack[place] = sum;
            top = place + 1;
        }
    }
}

// Divides a chunk, in place; its sum of squares, in as many lanes as are added in their order at the end.
template <class T>
double mean_and_square(T *x, int64_t n, T tasks) {
    double lanes[LANES] = {};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int64_t k = 0; k < LANES; ++k) {
            const T mean = x[j + k] / tasks;
            x[j + k] = mean;
            lanes[k] += static_cast<double>(mean) * static_cast<double>(mean);
        }
    for (int64_t k = 0; j < n; ++j, ++k) {
        x[j] /= tasks;
        lanes[k] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    }
    double square = 0;
    for (double lane : lanes) square += lane;
    return square;
}

// The same of chunks, whose bounds are one more than they.
template <class T>
void mean_and_squares(T *x, const int64_t *bounds, int64_t chunks, T tasks, double *squares) {
    for (int64_t i = 0; i < chunks; ++i)
        squares[i] = mean_and_square(x + bounds[i], bounds[i + 1] - bounds[i], tasks);
}

}  // namespace

extern "C" {
void tree_sum_f32(const float *const *in, const int32_t *program, int64_t length, float *out, int64_t n) {
    tree_sum(in, program, length, out, n);
}
void tree_sum_f64(const double *const *in, const int32_t *program, int64_t length, double *out, int64_t n) {
    tree_sum(in, program, length, out, n);
}
void mean_and_squares_f32(float *x, const int64_t *bounds, int64_t chunks, double tasks, double *squares) {
    mean_and_squares(x, bounds, chunks, static_cast<float>(tasks), squares);
}
void mean_and_squares_f64(double *x, const int64_t *bounds, int64_t chunks, double tasks, double *squares) {
    mean_and_squares(x, bounds, chunks, tasks, squares);
}
}
