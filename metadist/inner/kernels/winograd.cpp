// 3x3 convolutions with stride 1 by Winograd's minimal filtering F(4x4, 3x3), for groups with weights of their own.
#include <type_traits>

#include "lanes.h"

using lanes::buffer;
using lanes::Lanes;

namespace {

// Registers of outputs that are summed at a time: 6 rows of as many columns.
constexpr int kColumns = lanes::kBytes == 64 ? 4 : 2;
constexpr int kRows = 6, kBlock = 48, kPoints = 36;

struct Shape {
  int64_t groups, weight_groups, batch, height, width, inputs, outputs, pad_h, pad_w, out_h, out_w;
};

// One dimension of the transforms: of inputs (6 to 6), of outputs (6 to 4), its transpose (4 to 6), of weights (3 to 6)
// and its transpose (6 to 3); from d, every s-th, to o, every t-th.
template <typename V> inline void input6(const V* d, int s, V* o, int t) {
  V d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
  V a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
  o[0] = 4 * d0 - 5 * d2 + d4; o[t] = a + b; o[2 * t] = a - b; o[3 * t] = c + e; o[4 * t] = c - e; o[5 * t] = 4 * d1 - 5 * d3 + d5;
}
template <typename V> inline void output6(const V* m, int s, V* o, int t) {
  V a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], d = m[3 * s] - m[4 * s];
  o[0] = m[0] + a + c; o[t] = b + 2 * d; o[2 * t] = a + 4 * c; o[3 * t] = b + 8 * d + m[5 * s];
}
template <typename V> inline void spread4(const V* y, int s, V* o, int t) {
  V y0 = y[0], y1 = y[s], y2 = y[2 * s], y3 = y[3 * s];
  V a = y0 + y2, b = y1 + y3, c = y0 + 4 * y2, d = 2 * y1 + 8 * y3;
  o[0] = y0; o[t] = a + b; o[2 * t] = a - b; o[3 * t] = c + d; o[4 * t] = c - d; o[5 * t] = y3;
}
template <typename V, typename T> inline void weight3(const V* g, int s, V* o, int t) {
  const T q = T(1) / 4, x = T(1) / 6, z = T(1) / 24;
  V g0 = g[0], g1 = g[s], g2 = g[2 * s];
  V a = -x * (g0 + g2), b = x * g1, c = z * g0 + x * g2, d = (T(1) / 12) * g1;
  o[0] = q * g0; o[t] = a - b; o[2 * t] = a + b; o[3 * t] = c + d; o[4 * t] = c - d; o[5 * t] = g2;
}
template <typename V, typename T> inline void gather6(const V* u, int s, V* o, int t) {
  const T q = T(1) / 4, x = T(1) / 6, z = T(1) / 24;
  V u1 = u[s], u2 = u[2 * s], u3 = u[3 * s], u4 = u[4 * s];
  o[0] = q * u[0] - x * (u1 + u2) + z * (u3 + u4);
  o[t] = x * (u2 - u1) + (T(1) / 12) * (u3 - u4);
  o[2 * t] = x * (u3 + u4) - x * (u1 + u2) + u[5 * s];
}

// c[rows, N columns] (+)= sum over depth of a[r * row + d * step] b[d, columns].
template <typename T, int R, int NV, bool Add>
inline void micro(const T* a, int64_t row, int64_t step, const T* b, int64_t ldb, int64_t depth, T* c, int64_t ldc) {
  typedef typename Lanes<T>::V V;
  constexpr int N = Lanes<T>::N;
  V acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) acc[r][n] = V{};
  for (int64_t d = 0; d < depth; d++) {
    V w[NV];
    for (int n = 0; n < NV; n++) w[n] = Lanes<T>::load(b + d * ldb + n * N);
    for (int r = 0; r < R; r++) {
      const T x = a[r * row + d * step];
      for (int n = 0; n < NV; n++) acc[r][n] += x * w[n];
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) {
      T* to = c + r * ldc + n * N;
      Lanes<T>::store(to, Add ? Lanes<T>::load(to) + acc[r][n] : acc[r][n]);
    }
}

template <typename T, int NV, bool Add>
void strip(const T* a, int64_t row, int64_t step, const T* b, int64_t ldb, int64_t rows, int64_t depth, T* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) micro<T, kRows, NV, Add>(a + r * row, row, step, b, ldb, depth, c + r * ldc, ldc);
  for (; r + 2 <= rows; r += 2) micro<T, 2, NV, Add>(a + r * row, row, step, b, ldb, depth, c + r * ldc, ldc);
  for (; r < rows; r++) micro<T, 1, NV, Add>(a + r * row, row, step, b, ldb, depth, c + r * ldc, ldc);
}

// c[rows, columns] (+)= a b; columns are a multiple of the lanes.
template <typename T, bool Add>
void product(const T* a, int64_t row, int64_t step, const T* b, int64_t rows, int64_t columns, int64_t depth, T* c) {
  constexpr int N = Lanes<T>::N;
  int64_t n = 0;
  for (; n + kColumns * N <= columns; n += kColumns * N) strip<T, kColumns, Add>(a, row, step, b + n, columns, rows, depth, c + n, columns);
  if (kColumns > 2 && n + 2 * N <= columns) { strip<T, 2, Add>(a, row, step, b + n, columns, rows, depth, c + n, columns); n += 2 * N; }
  for (; n < columns; n += N) strip<T, 1, Add>(a, row, step, b + n, columns, rows, depth, c + n, columns);
}

// The tiles of 4x4 outputs of one group's pictures.
struct Tiles {
  int64_t across, each, all;
  explicit Tiles(const Shape& s) : across((s.out_w + 3) / 4), each((s.out_h + 3) / 4 * across), all(s.batch * each) {}
  // Picture of the n-th tile, and its first row and column of outputs.
  struct Place {
    int64_t picture, top, left;
  };
  Place place(int64_t n) const { return {n / each, n % each / across * 4, n % each % across * 4}; }
};

// The numbers of one group's pictures, of which a tile may reach beyond the edge.
template <typename T>
struct Pictures {
  T* numbers;
  int64_t height, width, channels;
  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  T* at(int64_t picture, int64_t y, int64_t x, int64_t c) const {
    return numbers + ((picture * height + y) * width + x) * channels + c;
  }
  // N by N positions of a picture from (y, x) on, channels from c on; zeros beyond the edge.
  template <int N, typename V>
  void load(int64_t picture, int64_t y, int64_t x, int64_t c, V* to) const {
    for (int i = 0; i < N; i++)
      for (int j = 0; j < N; j++)
        to[i * N + j] = inside(y + i, x + j) ? Lanes<std::remove_const_t<T>>::load(at(picture, y + i, x + j, c), channels - c) : V{};
  }
};

// Tiles [first, first + count) of x, with what the filters reach around them, to v [36, kBlock, padded channels].
template <typename T>
void take_inputs(Pictures<const T> x, T* v, const Shape& s, const Tiles& tiles, int64_t first, int64_t count) {
  typedef typename Lanes<T>::V V;
  const int64_t padded = Lanes<T>::padded(x.channels);
  for (int64_t p = 0; p < count; p++) {
    const auto [picture, top, left] = tiles.place(first + p);
    for (int64_t c = 0; c < x.channels; c += Lanes<T>::N) {
      V d[36], e[36];
      x.template load<6>(picture, top - s.pad_h, left - s.pad_w, c, d);
      for (int j = 0; j < 6; j++) input6(d + j, 6, e + j, 6);
      for (int i = 0; i < 6; i++) input6(e + i * 6, 1, d + i * 6, 1);
      for (int k = 0; k < kPoints; k++) Lanes<T>::store(v + (k * kBlock + p) * padded + c, d[k]);
    }
  }
}

// m [36, kBlock, padded channels] to tiles of y.
template <typename T>
void put_outputs(const T* m, Pictures<T> y, const Tiles& tiles, int64_t first, int64_t count) {
  typedef typename Lanes<T>::V V;
  const int64_t padded = Lanes<T>::padded(y.channels);
  for (int64_t p = 0; p < count; p++) {
    const auto [picture, top, left] = tiles.place(first + p);
    for (int64_t c = 0; c < y.channels; c += Lanes<T>::N) {
      V d[36], e[24], o[16];
      for (int k = 0; k < kPoints; k++) d[k] = Lanes<T>::load(m + (k * kBlock + p) * padded + c);
      for (int j = 0; j < 6; j++) output6(d + j, 6, e + j, 6);
      for (int i = 0; i < 4; i++) output6(e + i * 6, 1, o + i * 4, 1);
      for (int i = 0; i < 4 && top + i < y.height; i++)
        for (int j = 0; j < 4 && left + j < y.width; j++)
          Lanes<T>::store(y.at(picture, top + i, left + j, c), o[i * 4 + j], y.channels - c);
    }
  }
}

// The transpose of put_outputs().
template <typename T>
void spread_outputs(Pictures<const T> y, T* m, const Tiles& tiles, int64_t first, int64_t count) {
  typedef typename Lanes<T>::V V;
  const int64_t padded = Lanes<T>::padded(y.channels);
  for (int64_t p = 0; p < count; p++) {
    const auto [picture, top, left] = tiles.place(first + p);
    for (int64_t c = 0; c < y.channels; c += Lanes<T>::N) {
      V d[36], e[24], o[16];
      y.template load<4>(picture, top, left, c, o);
      for (int j = 0; j < 4; j++) spread4(o + j, 4, e + j, 4);
      for (int i = 0; i < 6; i++) spread4(e + i * 4, 1, d + i * 6, 1);
      for (int k = 0; k < kPoints; k++) Lanes<T>::store(m + (k * kBlock + p) * padded + c, d[k]);
    }
  }
}

// w [3, 3, inputs, outputs] to u [36, inputs, padded outputs]
template <typename T>
void take_weights(const T* w, T* u, const Shape& s) {
  typedef typename Lanes<T>::V V;
  constexpr int N = Lanes<T>::N;
  const int64_t padded = Lanes<T>::padded(s.outputs), each = s.inputs * s.outputs;
  for (int64_t c = 0; c < s.inputs; c++)
    for (int64_t o = 0; o < s.outputs; o += N) {
      V g[9], e[18], d[36];
      for (int k = 0; k < 9; k++) g[k] = Lanes<T>::load(w + k * each + c * s.outputs + o, s.outputs - o);
      for (int j = 0; j < 3; j++) weight3<V, T>(g + j, 3, e + j, 3);
      for (int i = 0; i < 6; i++) weight3<V, T>(e + i * 3, 1, d + i * 6, 1);
      for (int k = 0; k < kPoints; k++) Lanes<T>::store(u + (k * s.inputs + c) * padded + o, d[k]);
    }
}

template <typename T>
void put_weights(const T* u, T* w, const Shape& s) {
  typedef typename Lanes<T>::V V;
  constexpr int N = Lanes<T>::N;
  const int64_t padded = Lanes<T>::padded(s.outputs), each = s.inputs * s.outputs;
  for (int64_t c = 0; c < s.inputs; c++)
    for (int64_t o = 0; o < s.outputs; o += N) {
      V g[9], e[18], d[36];
      for (int k = 0; k < kPoints; k++) d[k] = Lanes<T>::load(u + (k * s.inputs + c) * padded + o);
      for (int j = 0; j < 6; j++) gather6<V, T>(d + j, 6, e + j, 6);
      for (int i = 0; i < 3; i++) gather6<V, T>(e + i * 6, 1, g + i * 3, 1);
      for (int k = 0; k < 9; k++) Lanes<T>::store(w + k * each + c * s.outputs + o, g[k], s.outputs - o);
    }
}

// Calls block(inputs, outputs, first, count) for a few tiles at a time of the g-th group.
template <typename T, typename Y, typename Block>
void each_block(const T* x, Y* y, int64_t g, const Shape& s, const Tiles& tiles, Block block) {
  const Pictures<const T> in{x + g * s.batch * s.height * s.width * s.inputs, s.height, s.width, s.inputs};
  const Pictures<Y> out{y + g * s.batch * s.out_h * s.out_w * s.outputs, s.out_h, s.out_w, s.outputs};
  for (int64_t first = 0; first < tiles.all; first += kBlock)
    block(in, out, first, std::min<int64_t>(kBlock, tiles.all - first));
}

// Room for transformed weights, and for a block of transformed inputs and outputs, with the lengths of their parts.
template <typename T>
struct Room {
  int64_t in, out, of_u, of_v, of_m;
  T *u, *v, *m;
  explicit Room(const Shape& s)
      : in(Lanes<T>::padded(s.inputs)), out(Lanes<T>::padded(s.outputs)), of_u(s.inputs * out), of_v(kBlock * in),
        of_m(kBlock * out), u(buffer<T>(0, kPoints * of_u)), v(buffer<T>(1, kPoints * of_v)), m(buffer<T>(2, kPoints * of_m)) {}
};

template <typename T>
void convolve(const T* x, const T* w, T* y, const Shape& s) {
  const Tiles tiles(s);
  const Room<T> r(s);
  for (int64_t g = 0; g < s.groups; g++) {
    if (g < s.weight_groups) take_weights(w + g * 9 * s.inputs * s.outputs, r.u, s);
    each_block(x, y, g, s, tiles, [&](Pictures<const T> in, Pictures<T> out, int64_t first, int64_t count) {
      take_inputs(in, r.v, s, tiles, first, count);
      for (int64_t k = 0; k < kPoints; k++)
        product<T, false>(r.v + k * r.of_v, r.in, 1, r.u + k * r.of_u, count, r.out, s.inputs, r.m + k * r.of_m);
      put_outputs(r.m, out, tiles, first, count);
    });
  }
}

template <typename T>
void correlate(const T* x, const T* y, T* w, const Shape& s) {
  const Tiles tiles(s);
  const Room<T> r(s);
  for (int64_t g = 0; g < s.groups; g++) {
    std::memset(r.u, 0, sizeof(T) * kPoints * r.of_u);
    each_block(x, y, g, s, tiles, [&](Pictures<const T> in, Pictures<const T> out, int64_t first, int64_t count) {
      take_inputs(in, r.v, s, tiles, first, count);
      spread_outputs(out, r.m, tiles, first, count);
      for (int64_t k = 0; k < kPoints; k++)
        product<T, true>(r.v + k * r.of_v, 1, r.in, r.m + k * r.of_m, s.inputs, r.out, count, r.u + k * r.of_u);
    });
    put_weights(r.u, w + g * 9 * s.inputs * s.outputs, s);
  }
}

}  // namespace

extern "C" {
void convolve_f32(const float* x, const float* w, float* y, const Shape* s) { convolve(x, w, y, *s); }
void convolve_f64(const double* x, const double* w, double* y, const Shape* s) { convolve(x, w, y, *s); }
void correlate_f32(const float* x, const float* y, float* w, const Shape* s) { correlate(x, y, w, *s); }
void correlate_f64(const double* x, const double* y, double* w, const Shape* s) { correlate(x, y, w, *s); }
}
