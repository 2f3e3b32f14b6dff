// Sums of many long vectors by a tree, block by block: every vector is read once, and the sum written once.
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 32768;

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
        for (int64_t i = 0; i < length; ++i) {
            if (program[i] >= 0) {
                stack[top++] = in[program[i]] + at;
                continue;
            }
            const T *a = stack[top - 2], *b = stack[top - 1];
            // The last sum goes where it belongs; the others to the place of the left one.
            T *sum = i + 1 == length ? out + at : &scratch[(top - 2) * BLOCK];
            for (int64_t j = 0; j < size; ++j) sum[j] = a[j] + b[j];
            stack[top - 2] = sum;
            --top;
        }
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
}
