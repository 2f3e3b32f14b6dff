// As many numbers as a register of the processor holds, and the ends of rows that fill none.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lanes {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif

template <typename T>
struct Lanes {
  typedef T V __attribute__((vector_size(kBytes)));
  static constexpr int N = kBytes / sizeof(T);
  static int64_t padded(int64_t n) { return (n + N - 1) / N * N; }
  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  // The first n numbers, zeros after them.
  static V load(const T* p, int64_t n) {
    if (n >= N) return load(p);
    V v{};
    std::memcpy(&v, p, sizeof(T) * n);
    return v;
  }
  static void store(T* p, V v, int64_t n) {
    if (n >= N) return store(p, v);
    std::memcpy(p, &v, sizeof(T) * n);
  }
};

// Memory for `size` numbers, aligned, kept by the thread for the next call; one for each `which`.
template <typename T>
T* buffer(int which, int64_t size) {
  static thread_local std::vector<T> kept[4];
  std::vector<T>& b = kept[which];
  if (int64_t(b.size()) < size + 16) b.resize(size + 16);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(b.data()) + 63) / 64 * 64);
}

}  // namespace lanes
