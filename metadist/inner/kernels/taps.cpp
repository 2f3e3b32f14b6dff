// Convolutions of any kernel, stride and padding, for groups with weights of their own: sums of products held in
// registers, read from the pictures themselves, so that no matrix of windows is ever written.
#include <type_traits>

#include "lanes.h"

using lanes::buffer;
using lanes::Lanes;

namespace {

struct Shape {
  int64_t groups, weight_groups, batch, height, width, inputs, outputs, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
      out_h, out_w;
  int64_t padded_h() const { return std::max(height + 2 * pad_h, (out_h - 1) * stride_h + kernel_h); }
  int64_t padded_w() const { return std::max(width + 2 * pad_w, (out_w - 1) * stride_w + kernel_w); }
  int64_t picture() const { return height * width * inputs; }
  int64_t padded_picture() const { return padded_h() * padded_w() * inputs; }
  int64_t made() const { return out_h * out_w * outputs; }
  int64_t weight() const { return kernel_h * kernel_w * inputs * outputs; }
  int64_t tap(int64_t u, int64_t v) const { return (u * padded_w() + v) * inputs; }
};

// Registers of columns that are summed at a time: 6 rows of as many.
constexpr int kColumns = lanes::kBytes == 64 ? 4 : 2;
constexpr int kRows = 6;
constexpr int64_t kCache = 1 << 19;  // bytes of pictures that are worked through together

// Pictures of one group with their borders, as many as the cache holds, and where the window of each output begins.
template <typename T>
class Padded {
 public:
  explicit Padded(const Shape& s)
      : s_(s), most_(std::max<int64_t>(1, std::min<int64_t>(s.batch, kCache / (sizeof(T) * s.padded_picture())))),
        numbers_(buffer<T>(0, most_ * s.padded_picture() + Lanes<T>::N)) {
    for (int64_t b = 0; b < most_; b++)
      for (int64_t i = 0; i < s.out_h; i++)
        for (int64_t j = 0; j < s.out_w; j++)
          at_.push_back(b * s.padded_picture() + (i * s.stride_h * s.padded_w() + j * s.stride_w) * s.inputs);
    clear();
  }
  int64_t most() const { return most_; }
  T* window(int64_t n) const { return numbers_ + at_[n]; }
  int64_t at(int64_t n) const { return at_[n]; }
  T* numbers() const { return numbers_; }
  void clear() { std::memset(numbers_, 0, sizeof(T) * (most_ * s_.padded_picture() + Lanes<T>::N)); }
  // The border stays zero, so that it is cleared once.
  void take(const T* x, int64_t pictures) { each_row(pictures, [&](T* inside, int64_t n, int64_t size) { std::memcpy(inside, x + n, size); }); }
  void give(T* x, int64_t pictures) const { each_row(pictures, [&](const T* inside, int64_t n, int64_t size) { std::memcpy(x + n, inside, size); }); }

 private:
  template <typename Do>
  void each_row(int64_t pictures, Do act) const {
    const int64_t row = s_.width * s_.inputs;
    for (int64_t b = 0; b < pictures; b++)
      for (int64_t i = 0; i < s_.height; i++)
        act(numbers_ + b * s_.padded_picture() + s_.tap(i + s_.pad_h, s_.pad_w), (b * s_.height + i) * row, int64_t(sizeof(T)) * row);
  }

  const Shape& s_;
  int64_t most_;
  T* numbers_;
  std::vector<int64_t> at_;
};

template <int N>
using Count = std::integral_constant<int, N>;

// Calls with 6, 2 or 1 rows at a time until all are done.
template <typename Do>
void blocks_of_rows(int64_t rows, Do act) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) act(Count<kRows>(), r);
  for (; r + 2 <= rows; r += 2) act(Count<2>(), r);
  for (; r < rows; r++) act(Count<1>(), r);
}

// Calls with blocks of rows and of as many registers of columns as fit: how many of both, and the first row and column.
template <typename T, typename Do>
void blocks(int64_t rows, int64_t columns, Do act) {
  constexpr int64_t N = Lanes<T>::N;
  int64_t c = 0;
  auto strip = [&](auto registers) {
    blocks_of_rows(rows, [&](auto count, int64_t r) { act(count, registers, r, c); });
    c += registers * N;
  };
  while (c + kColumns * N <= columns) strip(Count<kColumns>());
  if (kColumns > 2 && c + 2 * N <= columns) strip(Count<2>());
  while (c < columns) strip(Count<1>());
}

// The registers of R rows, added up.
template <typename T, int R, int NV>
struct Sums {
  typedef typename Lanes<T>::V V;
  V sum[R][NV];
  Sums() {
    for (int r = 0; r < R; r++)
      for (int n = 0; n < NV; n++) sum[r][n] = V{};
  }
  // factor(r) times the row `b`.
  template <typename Factor>
  inline void add(const T* b, Factor factor) {
    V w[NV];
    for (int n = 0; n < NV; n++) w[n] = Lanes<T>::load(b + n * Lanes<T>::N);
    for (int r = 0; r < R; r++) {
      const T x = factor(r);
      for (int n = 0; n < NV; n++) sum[r][n] += x * w[n];
    }
  }
};

// A [rows, columns] matrix whose rows fill registers; itself if they do.
template <typename T>
const T* filled(int which, const T* m, int64_t rows, int64_t columns) {
  const int64_t padded = Lanes<T>::padded(columns);
  if (padded == columns) return m;
  T* to = buffer<T>(which, rows * padded);
  for (int64_t r = 0; r < rows; r++) {
    std::memcpy(to + r * padded, m + r * columns, sizeof(T) * columns);
    std::memset(to + r * padded + columns, 0, sizeof(T) * (padded - columns));
  }
  return to;
}

// An N by N tile of a matrix with rows of `from` numbers, transposed into one with rows of `to`.
template <typename T>
inline void transpose_tile(const T* m, int64_t from, T* t, int64_t to) {
  constexpr int N = Lanes<T>::N;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename Lanes<T>::V V;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
  typedef I Places __attribute__((vector_size(lanes::kBytes)));
  Places low, high;
  for (int n = 0; n < N; n++) low[n] = n / 2 + n % 2 * N, high[n] = low[n] + N / 2;
  V a[N], b[N];
  for (int n = 0; n < N; n++) a[n] = Lanes<T>::load(m + n * from);
  // As often as N can be halved, the two halves of the rows are dealt into each other like cards.
  for (int halves = 1; halves < N; halves *= 2) {
    for (int n = 0; n < N / 2; n++) {
      b[2 * n] = __builtin_shuffle(a[n], a[n + N / 2], low);
      b[2 * n + 1] = __builtin_shuffle(a[n], a[n + N / 2], high);
    }
    for (int n = 0; n < N; n++) a[n] = b[n];
  }
  for (int n = 0; n < N; n++) Lanes<T>::store(t + n * to, a[n]);
#else
  for (int n = 0; n < N; n++)
    for (int k = 0; k < N; k++) t[n * to + k] = m[k * from + n];
#endif
}

// Each tap's [inputs, outputs] transposed, [outputs, inputs], in rows that fill registers.
template <typename T>
const T* transposed(int which, const T* w, const Shape& s) {
  constexpr int N = Lanes<T>::N;
  const int64_t padded = Lanes<T>::padded(s.inputs), size = s.outputs * padded, taps = s.kernel_h * s.kernel_w;
  T* to = buffer<T>(which, taps * size);
  if (padded != s.inputs) std::memset(to, 0, sizeof(T) * taps * size);
  for (int64_t t = 0; t < taps; t++, w += s.inputs * s.outputs, to += size)
    for (int64_t c = 0; c < s.inputs; c += N)
      for (int64_t o = 0; o < s.outputs; o += N) {
        if (c + N <= s.inputs && o + N <= s.outputs) {
          transpose_tile(w + c * s.outputs + o, s.outputs, to + o * padded + c, padded);
          continue;
        }
        for (int64_t d = c; d < std::min(c + N, s.inputs); d++)
          for (int64_t p = o; p < std::min(o + N, s.outputs); p++) to[p * padded + d] = w[d * s.outputs + p];
      }
  return to - taps * size;
}

template <typename T, int R, int NV>
inline void convolve_block(const Padded<T>& x, int64_t first, const T* w, int64_t padded, T* y, int64_t o, const Shape& s) {
  const int64_t run = s.kernel_w * s.inputs, step = s.padded_w() * s.inputs;
  const T* at[R];
  for (int r = 0; r < R; r++) at[r] = x.window(first + r);
  Sums<T, R, NV> sums;
  for (int64_t u = 0; u < s.kernel_h; u++) {
    for (int64_t t = 0; t < run; t++, w += padded) sums.add(w, [&](int r) { return at[r][t]; });
    for (int r = 0; r < R; r++) at[r] += step;
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++)
      if (const int64_t c = o + n * Lanes<T>::N; c < s.outputs) Lanes<T>::store(y + (first + r) * s.outputs + c, sums.sum[r][n], s.outputs - c);
}

// y = x * w.
template <typename T>
void convolve(const T* x, const T* w, T* y, const Shape& s) {
  const int64_t padded = Lanes<T>::padded(s.outputs), each = s.out_h * s.out_w;
  Padded<T> pictures(s);
  const T* weight = nullptr;
  for (int64_t g = 0; g < s.groups; g++) {
    if (g < s.weight_groups) weight = filled(1, w + g * s.weight(), s.weight() / s.outputs, s.outputs);
    for (int64_t b = 0; b < s.batch; b += pictures.most()) {
      const int64_t now = std::min(pictures.most(), s.batch - b);
      pictures.take(x + (g * s.batch + b) * s.picture(), now);
      T* to = y + (g * s.batch + b) * s.made();
      blocks<T>(now * each, padded, [&](auto rows, auto registers, int64_t r, int64_t o) {
        convolve_block<T, rows, registers>(pictures, r, weight + o, padded, to, o, s);
      });
    }
  }
}

template <typename T, int R, int NV>
inline void spread_block(const T* y, int64_t first, const T* w, int64_t padded, const Padded<T>& x, int64_t tap, int64_t c, const Shape& s) {
  const T* at = y + first * s.outputs;
  Sums<T, R, NV> sums;
  for (int64_t o = 0; o < s.outputs; o++) sums.add(w + o * padded, [&](int r) { return at[r * s.outputs + o]; });
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) {
      // Beyond the channels there are zeros to add, to numbers of the next position.
      T* to = x.window(first + r) + tap + c + n * Lanes<T>::N;
      Lanes<T>::store(to, Lanes<T>::load(to) + sums.sum[r][n]);
    }
}

// The transpose of convolve() in x: every output's slope, spread over its window.
template <typename T>
void spread(const T* y, const T* w, T* x, const Shape& s) {
  const int64_t padded = Lanes<T>::padded(s.inputs), each = s.out_h * s.out_w;
  Padded<T> pictures(s);
  const T* weight = nullptr;
  for (int64_t g = 0; g < s.groups; g++) {
    if (g < s.weight_groups) weight = transposed(1, w + g * s.weight(), s);
    for (int64_t b = 0; b < s.batch; b += pictures.most()) {
      const int64_t now = std::min(pictures.most(), s.batch - b);
      const T* from = y + (g * s.batch + b) * s.made();
      pictures.clear();
      for (int64_t u = 0, k = 0; u < s.kernel_h; u++)
        for (int64_t v = 0; v < s.kernel_w; v++, k++) {
          const T* of_tap = weight + k * s.outputs * padded;
          const int64_t tap = s.tap(u, v);
          blocks<T>(now * each, padded, [&](auto rows, auto registers, int64_t r, int64_t c) {
            spread_block<T, rows, registers>(from, r, of_tap + c, padded, pictures, tap, c, s);
          });
        }
      pictures.give(x + (g * s.batch + b) * s.picture(), now);
    }
  }
}

template <typename T, int R, int NV>
inline void correlate_block(const Padded<T>& x, int64_t from, const T* y, int64_t padded, int64_t all, T* w, int64_t o, bool more, const Shape& s) {
  Sums<T, R, NV> sums;
  const T* numbers = x.numbers() + from;
  for (int64_t d = 0; d < all; d++) {
    const T* at = numbers + x.at(d);
    sums.add(y + d * padded, [&](int r) { return at[r]; });
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++)
      if (const int64_t c = o + n * Lanes<T>::N; c < s.outputs) {
        T* to = w + r * s.outputs + c;
        Lanes<T>::store(to, more ? Lanes<T>::load(to, s.outputs - c) + sums.sum[r][n] : sums.sum[r][n], s.outputs - c);
      }
}

// The transpose of convolve() in w.
template <typename T>
void correlate(const T* x, const T* y, T* w, const Shape& s) {
  const int64_t padded = Lanes<T>::padded(s.outputs), each = s.out_h * s.out_w;
  Padded<T> pictures(s);
  for (int64_t g = 0; g < s.groups; g++, w += s.weight())
    for (int64_t b = 0; b < s.batch; b += pictures.most()) {
      const int64_t now = std::min(pictures.most(), s.batch - b);
      pictures.take(x + (g * s.batch + b) * s.picture(), now);
      const T* slope = filled(1, y + (g * s.batch + b) * s.made(), now * each, s.outputs);
      for (int64_t u = 0, k = 0; u < s.kernel_h; u++)
        for (int64_t v = 0; v < s.kernel_w; v++, k++) {
          T* to = w + k * s.inputs * s.outputs;
          const int64_t tap = s.tap(u, v);
          blocks<T>(s.inputs, padded, [&](auto rows, auto registers, int64_t c, int64_t o) {
            correlate_block<T, rows, registers>(pictures, tap + c, slope + o, padded, now * each, to + c * s.outputs, o, b > 0, s);
          });
        }
    }
}

}  // namespace

#define METADIST_TAPS(T, NAME)                                                                          \
  void convolve_##NAME(const T* x, const T* w, T* y, const Shape* s) { convolve(x, w, y, *s); }         \
  void spread_##NAME(const T* y, const T* w, T* x, const Shape* s) { spread(y, w, x, *s); }             \
  void correlate_##NAME(const T* x, const T* y, T* w, const Shape* s) { correlate(x, y, w, *s); }

extern "C" {
METADIST_TAPS(float, f32)
METADIST_TAPS(double, f64)
}
