// BatchNorm by each group's own statistics, ReLU and 2x2 max pooling (or none) in one: value, derivative and second
// derivative. Channels are the last dimension. What a maximum came from is found again rather than stored.
#include <cmath>

#include "cells.h"

using lanes::buffer;
using lanes::Choice;
using lanes::Lanes;
using lanes::Sums;

namespace {

struct Shape {
  int64_t groups, weight_groups, batch, height, width, channels;
  double eps;
};

// Per channel of one group, each `padded` long.
template <typename T>
struct Constants {
  const T *scale, *offset, *rstd, *centre;  // u = scale x + offset; xhat = rstd x + centre
};

template <typename T, int P>
struct Cell : Choice<T, P * P> {
  typedef typename Lanes<T>::V V;
  static constexpr int Q = P * P;
  V x[Q];
  int64_t place[Q];     // of each candidate in x, or -1 beyond the picture's edge
  int64_t output;       // place in y, or -1 where the cell is not whole
  int64_t c, channels;  // the first channel, and how many there are from it on

  // The cell (i, j) of the b-th picture, channels from `first` on.
  void read(const T* from, const Shape& s, const Constants<T>& k, int64_t b, int64_t i, int64_t j, int64_t first) {
    c = first, channels = s.channels - first;
    const V scale = Lanes<T>::load(k.scale + c), offset = Lanes<T>::load(k.offset + c);
    const int64_t corner = ((b * s.height + i * P) * s.width + j * P) * s.channels + c;
    bool whole = true;
    for (int q = 0; q < Q; q++) {
      const int64_t y = i * P + q / P, z = j * P + q % P;
      const bool inside = y < s.height && z < s.width;
      place[q] = inside ? corner + (q / P * s.width + q % P) * s.channels : -1;
      whole = whole && inside;
      x[q] = inside ? Lanes<T>::load(from + place[q], channels) : V{};
      this->u[q] = scale * x[q] + offset;
    }
    output = whole ? ((b * (s.height / P) + i) * (s.width / P) + j) * s.channels + c : -1;
  }
  // What the output's slope is at each candidate.
  void slopes(const T* slope, V* to) const {
    if (output >= 0)
      this->put_back(Lanes<T>::load(slope + output, channels), to);
    else
      for (int q = 0; q < Q; q++) to[q] = V{};
  }
  // The q-th candidate, normalised.
  V normalised(int q, const Constants<T>& k) const { return Lanes<T>::load(k.rstd + c) * x[q] + Lanes<T>::load(k.centre + c); }
};

// Means and inverse standard deviations of one group's pictures.
template <typename T>
void statistics(const T* x, T* mean, T* rstd, const Shape& s) {
  typedef typename Lanes<T>::V V;
  constexpr int N = Lanes<T>::N;
  const int64_t each = s.height * s.width * s.channels, positions = s.height * s.width;
  std::vector<T> shift(Lanes<T>::padded(s.channels));
  Sums<T> sums(2, s.channels);
  // First the mean of the first picture, then moments about it, which are small enough not to cancel.
  for (int pass = 0; pass < 2; pass++) {
    const int64_t pictures = pass ? s.batch : 1;
    for (int64_t b = 0; b < pictures; b++) {
      for (int64_t i = 0; i < s.height; i++)
        for (int64_t c = 0; c < s.channels; c += N) {
          const V about = Lanes<T>::load(shift.data() + c);
          V one{}, two{};
          for (int64_t j = 0; j < s.width; j++) {
            const V d = Lanes<T>::load(x + b * each + (i * s.width + j) * s.channels + c, s.channels - c) - about;
            one += d;
            two += d * d;
          }
          sums.add(0, c, one);
          sums.add(1, c, two);
        }
      sums.end_picture();
    }
    const double count = double(pictures) * positions;
    for (int64_t c = 0; c < s.channels; c++) {
      const double one = sums.of(0, c) / count, two = sums.of(1, c) / count;
      if (pass == 0) {
        shift[c] = T(one);
      } else {
        const double variance = two - one * one;
        mean[c] = T(shift[c] + one);
        rstd[c] = T(1 / std::sqrt((variance < 0 ? 0 : variance) + s.eps));
      }
    }
    sums.clear();
  }
}

template <typename T>
Constants<T> constants(const T* mean, const T* rstd, const T* weight, const T* bias, const Shape& s) {
  const int64_t padded = Lanes<T>::padded(s.channels);
  T* k = buffer<T>(3, 4 * padded);
  for (int64_t c = 0; c < s.channels; c++) {
    k[c] = weight[c] * rstd[c];
    k[padded + c] = bias[c] - mean[c] * k[c];
    k[2 * padded + c] = rstd[c];
    k[3 * padded + c] = -mean[c] * rstd[c];
  }
  return {k, k + padded, k + 2 * padded, k + 3 * padded};
}

// Calls visit(cell) for every cell of one group, row by row of cells and in it block by block of channels; before and
// after a row's block begin() and end(c), after a picture end_picture().
template <typename T, int P, typename Begin, typename Visit, typename End, typename EndPicture>
void each_cell(const T* x, const Shape& s, const Constants<T>& k, Begin begin, Visit visit, End end, EndPicture end_picture) {
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t i = 0; i < (s.height + P - 1) / P; i++)
      for (int64_t c = 0; c < s.channels; c += Lanes<T>::N) {
        begin();
        for (int64_t j = 0; j < (s.width + P - 1) / P; j++) {
          Cell<T, P> cell;
          cell.read(x, s, k, b, i, j, c);
          visit(cell);
        }
        end(c);
      }
    end_picture();
  }
}

template <typename T, int P, typename Visit>
void each_cell(const T* x, const Shape& s, const Constants<T>& k, Visit visit) {
  each_cell<T, P>(x, s, k, [] {}, visit, [](int64_t) {}, [] {});
}

// The sums over all cells of one group of the K numbers a channel that add(cell, sums) adds to.
template <typename T, int P, int K, typename Add>
Sums<T> sums_of_cells(const T* x, const Shape& s, const Constants<T>& k, Add add) {
  typedef typename Lanes<T>::V V;
  Sums<T> sums(K, s.channels);
  V row[K];
  const auto begin = [&] { std::fill(row, row + K, V{}); };
  const auto end = [&](int64_t c) {
    for (int n = 0; n < K; n++) sums.add(n, c, row[n]);
  };
  each_cell<T, P>(x, s, k, begin, [&](const Cell<T, P>& cell) { add(cell, row); }, end, [&] { sums.end_picture(); });
  return sums;
}

// Numbers of one group before and after pooling.
template <int P>
struct Sizes {
  int64_t in, out;
  explicit Sizes(const Shape& s)
      : in(s.batch * s.height * s.width * s.channels), out(s.batch * (s.height / P) * (s.width / P) * s.channels) {}
};

// Where the g-th group's weights begin.
int64_t weights_of(int64_t g, const Shape& s) { return s.weight_groups > 1 ? g * s.channels : 0; }

template <typename T, int P>
void forward(const T* x, const T* weight, const T* bias, T* y, T* mean, T* rstd, const Shape& s) {
  const Sizes<P> sizes(s);
  for (int64_t g = 0; g < s.groups; g++, x += sizes.in, y += sizes.out, mean += s.channels, rstd += s.channels) {
    const int64_t w = weights_of(g, s);
    statistics(x, mean, rstd, s);
    const auto k = constants(mean, rstd, weight + w, bias + w, s);
    each_cell<T, P>(x, s, k, [&](const Cell<T, P>& cell) {
      if (cell.output >= 0) Lanes<T>::store(y + cell.output, cell.value(), cell.channels);
    });
  }
}

template <typename T, int P>
void backward(const T* slope, const T* x, const T* mean, const T* rstd, const T* weight, const T* bias, T* g_x, T* g_weight,
              T* g_bias, const Shape& s) {
  typedef typename Lanes<T>::V V;
  constexpr int Q = P * P;
  const Sizes<P> sizes(s);
  const int64_t padded = Lanes<T>::padded(s.channels);
  const double count = double(s.batch) * s.height * s.width;
  std::vector<T> means(2 * padded);
  for (int64_t g = 0; g < s.groups; g++, x += sizes.in, g_x += sizes.in, slope += sizes.out, mean += s.channels,
               rstd += s.channels, g_weight += s.channels, g_bias += s.channels) {
    const int64_t w = weights_of(g, s);
    const auto k = constants(mean, rstd, weight + w, bias + w, s);
    const auto sums = sums_of_cells<T, P, 2>(x, s, k, [&](const Cell<T, P>& cell, V* sum) {
      if (cell.output < 0) return;
      V to[Q];
      cell.slopes(slope, to);
      for (int q = 0; q < Q; q++) sum[0] += to[q], sum[1] += to[q] * cell.normalised(q, k);
    });
    for (int64_t c = 0; c < s.channels; c++) {
      g_bias[c] = T(sums.of(0, c)), g_weight[c] = T(sums.of(1, c));
      means[c] = T(sums.of(0, c) / count), means[padded + c] = T(sums.of(1, c) / count);
    }
    each_cell<T, P>(x, s, k, [&](const Cell<T, P>& cell) {
      V to[Q];
      cell.slopes(slope, to);
      const V a = Lanes<T>::load(k.scale + cell.c);
      const V m_g = Lanes<T>::load(means.data() + cell.c), m_gx = Lanes<T>::load(means.data() + padded + cell.c);
      for (int q = 0; q < Q; q++)
        if (cell.place[q] >= 0)
          Lanes<T>::store(g_x + cell.place[q], a * (to[q] - m_g - cell.normalised(q, k) * m_gx), cell.channels);
    });
  }
}

// The slopes of <p, g_x> + <q, g_weight> + <t, g_bias> of backward() in its slope, x and weight.
template <typename T, int P>
void second(const T* p, const T* q_w, const T* q_b, const T* slope, const T* x, const T* mean, const T* rstd,
            const T* weight, const T* bias, T* d_slope, T* d_x, T* d_weight, const Shape& s) {
  typedef typename Lanes<T>::V V;
  constexpr int Q = P * P;
  const Sizes<P> sizes(s);
  const int64_t padded = Lanes<T>::padded(s.channels);
  const double count = double(s.batch) * s.height * s.width;
  // Rows: mean of p, of p xhat, q, t; then the coefficients of p, g, 1 and xhat in d_x.
  std::vector<T> kept(8 * padded);
  T* n = kept.data();
  for (int64_t g = 0; g < s.groups; g++, p += sizes.in, x += sizes.in, d_x += sizes.in, slope += sizes.out,
               d_slope += sizes.out, mean += s.channels, rstd += s.channels, q_w += s.channels, q_b += s.channels,
               d_weight += s.channels) {
    const int64_t w = weights_of(g, s);
    const auto k = constants(mean, rstd, weight + w, bias + w, s);
    const auto sums = sums_of_cells<T, P, 5>(x, s, k, [&](const Cell<T, P>& cell, V* sum) {
      V to[Q];
      cell.slopes(slope, to);
      for (int q = 0; q < Q; q++) {
        if (cell.place[q] < 0) continue;
        const V v = Lanes<T>::load(p + cell.place[q], cell.channels), xhat = cell.normalised(q, k);
        sum[0] += v, sum[1] += v * xhat, sum[2] += to[q], sum[3] += to[q] * xhat, sum[4] += v * to[q];
      }
    });
    for (int64_t c = 0; c < s.channels; c++) {
      const double m_p = sums.of(0, c) / count, m_px = sums.of(1, c) / count, m_g = sums.of(2, c) / count,
                   m_gx = sums.of(3, c) / count, m_pg = sums.of(4, c) / count;
      const double r = rstd[c], wr = double(weight[w + c]) * r, curve = m_pg - m_p * m_g - m_px * m_gx, q = q_w[c];
      d_weight[c] = T(r * count * curve);
      n[c] = T(m_p), n[padded + c] = T(m_px), n[2 * padded + c] = q_w[c], n[3 * padded + c] = q_b[c];
      // h = -w r (m_gx p + m_px g) + q g is the slope in xhat; d_x = r (h - mean h - xhat mean(h xhat)) - w r^2 curve xhat.
      const double h_mean = -wr * (m_gx * m_p + m_px * m_g) + q * m_g, h_x = -2 * wr * m_gx * m_px + q * m_gx;
      n[4 * padded + c] = T(-r * wr * m_gx), n[5 * padded + c] = T(r * (q - wr * m_px));
      n[6 * padded + c] = T(-r * h_mean), n[7 * padded + c] = T(-r * h_x - wr * r * curve);
    }
    each_cell<T, P>(x, s, k, [&](const Cell<T, P>& cell) {
      V to[Q], values[Q]{};
      cell.slopes(slope, to);
      const auto of = [&](int row) { return Lanes<T>::load(n + row * padded + cell.c); };
      const V a = Lanes<T>::load(k.scale + cell.c);
      for (int q = 0; q < Q; q++) {
        if (cell.place[q] < 0) continue;
        const V v = Lanes<T>::load(p + cell.place[q], cell.channels), xhat = cell.normalised(q, k);
        values[q] = a * (v - of(0) - xhat * of(1)) + of(2) * xhat + of(3);
        Lanes<T>::store(d_x + cell.place[q], of(4) * v + of(5) * to[q] + of(6) + of(7) * xhat, cell.channels);
      }
      if (cell.output >= 0) Lanes<T>::store(d_slope + cell.output, cell.picked(values), cell.channels);
    });
  }
}

}  // namespace

#define METADIST_NORM(T, NAME)                                                                                           \
  void norm_##NAME(const T* x, const T* w, const T* b, T* y, T* mean, T* rstd, const Shape* s, int64_t pool) {           \
    pool == 2 ? forward<T, 2>(x, w, b, y, mean, rstd, *s) : forward<T, 1>(x, w, b, y, mean, rstd, *s);                   \
  }                                                                                                                      \
  void norm_backward_##NAME(const T* slope, const T* x, const T* mean, const T* rstd, const T* w, const T* b, T* g_x,    \
                            T* g_w, T* g_b, const Shape* s, int64_t pool) {                                              \
    pool == 2 ? backward<T, 2>(slope, x, mean, rstd, w, b, g_x, g_w, g_b, *s)                                            \
              : backward<T, 1>(slope, x, mean, rstd, w, b, g_x, g_w, g_b, *s);                                           \
  }                                                                                                                      \
  void norm_second_##NAME(const T* p, const T* q, const T* t, const T* slope, const T* x, const T* mean, const T* rstd,  \
                          const T* w, const T* b, T* d_slope, T* d_x, T* d_w, const Shape* s, int64_t pool) {            \
    pool == 2 ? second<T, 2>(p, q, t, slope, x, mean, rstd, w, b, d_slope, d_x, d_w, *s)                                 \
              : second<T, 1>(p, q, t, slope, x, mean, rstd, w, b, d_slope, d_x, d_w, *s);                                \
  }

extern "C" {
METADIST_NORM(float, f32)
METADIST_NORM(double, f64)
}
