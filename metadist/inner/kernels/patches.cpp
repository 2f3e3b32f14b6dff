// Affine functions of the windows of pictures with few channels, ReLU and 2x2 max pooling (or none) in one, and the
// moments of the windows. Nothing the size of the outputs before pooling is ever written.
#include "cells.h"

using lanes::buffer;
using lanes::Choice;
using lanes::Lanes;
using lanes::Sums;

namespace {

struct Shape {
  int64_t groups, batch, height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_h, out_w, outputs;
  int64_t numbers() const { return kernel_h * kernel_w * channels; }
  int64_t padded_w() const { return width + 2 * pad_w; }
};

// A picture with its border of zeros, and where the numbers of a window lie in it.
template <typename T>
class Picture {
 public:
  explicit Picture(const Shape& s) : s_(s), size_((s.height + 2 * s.pad_h) * s.padded_w() * s.channels), at_(s.numbers()) {
    padded_ = buffer<T>(0, size_);
    std::memset(padded_, 0, sizeof(T) * size_);
    for (int64_t u = 0, k = 0; u < s.kernel_h; u++)
      for (int64_t v = 0; v < s.kernel_w; v++)
        for (int64_t c = 0; c < s.channels; c++) at_[k++] = (u * s.padded_w() + v) * s.channels + c;
  }
  void take(const T* x) {
    const int64_t row = s_.width * s_.channels;
    for (int64_t i = 0; i < s_.height; i++)
      std::memcpy(padded_ + ((i + s_.pad_h) * s_.padded_w() + s_.pad_w) * s_.channels, x + i * row, sizeof(T) * row);
  }
  const T* window(int64_t i, int64_t j) const {
    return padded_ + (i * s_.stride_h * s_.padded_w() + j * s_.stride_w) * s_.channels;
  }
  int64_t at(int64_t k) const { return at_[k]; }

 private:
  const Shape& s_;
  int64_t size_;
  T* padded_;
  std::vector<int64_t> at_;
};

// For Q windows, w[k, outputs] times their numbers plus c: N registers of outputs from o on.
template <typename T, int Q, int N>
inline void affine(const Picture<T>& picture, const T* const* windows, const T* w, const T* c, int64_t padded, int64_t numbers,
                   typename Lanes<T>::V (*to)[Q]) {
  typedef typename Lanes<T>::V V;
  for (int n = 0; n < N; n++)
    for (int q = 0; q < Q; q++) to[n][q] = Lanes<T>::load(c + n * Lanes<T>::N);
  for (int64_t k = 0; k < numbers; k++) {
    V row[N];
    for (int n = 0; n < N; n++) row[n] = Lanes<T>::load(w + k * padded + n * Lanes<T>::N);
    for (int q = 0; q < Q; q++) {
      const T x = windows[q][picture.at(k)];
      for (int n = 0; n < N; n++) to[n][q] += x * row[n];
    }
  }
}

// w [numbers, outputs] and c [outputs] as rows that fill registers.
template <typename T>
T* padded_rows(int which, const T* w, const T* c, const Shape& s) {
  const int64_t padded = Lanes<T>::padded(s.outputs), rows = s.numbers();
  T* to = buffer<T>(which, (rows + 1) * padded);
  std::memset(to, 0, sizeof(T) * (rows + 1) * padded);
  for (int64_t k = 0; k < rows; k++) std::memcpy(to + k * padded, w + k * s.outputs, sizeof(T) * s.outputs);
  std::memcpy(to + rows * padded, c, sizeof(T) * s.outputs);
  return to;
}

template <typename T, int P, typename Visit>
void each_cell(const Picture<T>& picture, const Shape& s, Visit visit) {
  for (int64_t i = 0; i < s.out_h / P; i++)
    for (int64_t j = 0; j < s.out_w / P; j++) {
      const T* windows[P * P];
      for (int q = 0; q < P * P; q++) windows[q] = picture.window(i * P + q / P, j * P + q % P);
      visit(windows, (i * (s.out_w / P) + j) * s.outputs);
    }
}

// Calls with 2 or 1 registers of outputs at a time until all are done.
template <typename T, typename Two, typename One>
void blocks(int64_t padded, Two two, One one) {
  constexpr int64_t N = Lanes<T>::N;
  int64_t o = 0;
  for (; o + 2 * N <= padded; o += 2 * N) two(o);
  if (o < padded) one(o);
}

template <typename T, int P, int N>
void pick_block(const Picture<T>& picture, const T* a, const T* b, T* y, const Shape& s, int64_t o) {
  typedef typename Lanes<T>::V V;
  constexpr int Q = P * P;
  const int64_t padded = Lanes<T>::padded(s.outputs), rows = s.numbers();
  each_cell<T, P>(picture, s, [&](const T* const* windows, int64_t at) {
    V u[N][Q];
    affine<T, Q, N>(picture, windows, a + o, a + rows * padded + o, padded, rows, u);
    V v[N][Q];
    if (b) affine<T, Q, N>(picture, windows, b + o, b + rows * padded + o, padded, rows, v);
    for (int n = 0; n < N; n++) {
      Choice<T, Q> choice;
      for (int q = 0; q < Q; q++) choice.u[q] = u[n][q];
      const int64_t c = o + n * Lanes<T>::N;
      Lanes<T>::store(y + at + c, b ? choice.picked(v[n]) : choice.value(), s.outputs - c);
    }
  });
}

// Where w x + c is largest in its cell and positive: v x + d there, or that itself without v; zero elsewhere.
template <typename T, int P>
void pick(const T* x, const T* w, const T* c, const T* v, const T* d, T* y, const Shape& s) {
  const int64_t in = s.height * s.width * s.channels, out = (s.out_h / P) * (s.out_w / P) * s.outputs;
  Picture<T> picture(s);
  for (int64_t g = 0; g < s.groups; g++) {
    const T* a = padded_rows(1, w + g * s.numbers() * s.outputs, c + g * s.outputs, s);
    const T* b = v ? padded_rows(2, v + g * s.numbers() * s.outputs, d + g * s.outputs, s) : nullptr;
    for (int64_t n = 0; n < s.batch; n++, x += in, y += out) {
      picture.take(x);
      blocks<T>(Lanes<T>::padded(s.outputs), [&](int64_t o) { pick_block<T, P, 2>(picture, a, b, y, s, o); },
                [&](int64_t o) { pick_block<T, P, 1>(picture, a, b, y, s, o); });
    }
  }
}

template <typename T, int P, int N>
void push_block(const Picture<T>& picture, const T* a, const T* slope, Sums<T>& sums, const Shape& s, int64_t o) {
  typedef typename Lanes<T>::V V;
  constexpr int Q = P * P;
  const int64_t padded = Lanes<T>::padded(s.outputs), rows = s.numbers();
  each_cell<T, P>(picture, s, [&](const T* const* windows, int64_t at) {
    V u[N][Q], to[N][Q];
    affine<T, Q, N>(picture, windows, a + o, a + rows * padded + o, padded, rows, u);
    for (int n = 0; n < N; n++) {
      Choice<T, Q> choice;
      for (int q = 0; q < Q; q++) choice.u[q] = u[n][q];
      const int64_t c = o + n * Lanes<T>::N;
      choice.put_back(Lanes<T>::load(slope + at + c, s.outputs - c), to[n]);
      V all = to[n][0];
      for (int q = 1; q < Q; q++) all += to[n][q];
      sums.add(rows, c, all);
    }
    for (int64_t k = 0; k < rows; k++)
      for (int n = 0; n < N; n++) {
        T* place = sums.row(k) + o + n * Lanes<T>::N;
        V sum = Lanes<T>::load(place);
        for (int q = 0; q < Q; q++) sum += windows[q][picture.at(k)] * to[n][q];
        Lanes<T>::store(place, sum);
      }
  });
}

// The transpose of pick() in v and d: what `slope` of y is in them.
template <typename T, int P>
void push(const T* x, const T* w, const T* c, const T* slope, T* g_v, T* g_d, const Shape& s) {
  const int64_t in = s.height * s.width * s.channels, out = (s.out_h / P) * (s.out_w / P) * s.outputs, rows = s.numbers();
  Picture<T> picture(s);
  Sums<T> sums(rows + 1, s.outputs);
  for (int64_t g = 0; g < s.groups; g++) {
    const T* a = padded_rows(1, w + g * rows * s.outputs, c + g * s.outputs, s);
    for (int64_t n = 0; n < s.batch; n++, x += in, slope += out) {
      picture.take(x);
      blocks<T>(Lanes<T>::padded(s.outputs), [&](int64_t o) { push_block<T, P, 2>(picture, a, slope, sums, s, o); },
                [&](int64_t o) { push_block<T, P, 1>(picture, a, slope, sums, s, o); });
      sums.end_picture();
    }
    for (int64_t o = 0; o < s.outputs; o++) {
      for (int64_t k = 0; k < rows; k++) g_v[(g * rows + k) * s.outputs + o] = T(sums.of(k, o));
      g_d[g * s.outputs + o] = T(sums.of(rows, o));
    }
    sums.clear();
  }
}

// Mean [numbers] and covariance [numbers, numbers] of each group's windows, in double precision: the variance of a filter's
// output may be a small difference of large entries.
template <typename T>
void moments(const T* x, double* mean, double* covariance, const Shape& s) {
  typedef Lanes<double> D;
  const int64_t in = s.height * s.width * s.channels, rows = s.numbers(), padded = D::padded(rows);
  const double count = double(s.batch) * s.out_h * s.out_w;
  Picture<T> picture(s);
  Sums<double> sums(rows + 1, rows);
  std::vector<double> window(padded);
  for (int64_t g = 0; g < s.groups; g++) {
    for (int64_t n = 0; n < s.batch; n++, x += in) {
      picture.take(x);
      for (int64_t i = 0; i < s.out_h; i++)
        for (int64_t j = 0; j < s.out_w; j++) {
          const T* from = picture.window(i, j);
          for (int64_t k = 0; k < rows; k++) window[k] = from[picture.at(k)];
          for (int64_t c = 0; c < padded; c += D::N) {
            const typename D::V v = D::load(window.data() + c);
            sums.add(rows, c, v);
            // The other half follows by symmetry.
            for (int64_t k = 0; k < std::min(rows, c + D::N); k++) sums.add(k, c, window[k] * v);
          }
        }
      sums.end_picture();
    }
    for (int64_t k = 0; k < rows; k++) mean[g * rows + k] = sums.of(rows, k) / count;
    for (int64_t k = 0; k < rows; k++)
      for (int64_t l = k; l < rows; l++)
        covariance[(g * rows + k) * rows + l] = covariance[(g * rows + l) * rows + k] =
            sums.of(k, l) / count - mean[g * rows + k] * mean[g * rows + l];
    sums.clear();
  }
}

}  // namespace

#define METADIST_PATCHES(T, NAME)                                                                                        \
  void pick_##NAME(const T* x, const T* w, const T* c, const T* v, const T* d, T* y, const Shape* s, int64_t pool) {     \
    pool == 2 ? pick<T, 2>(x, w, c, v, d, y, *s) : pick<T, 1>(x, w, c, v, d, y, *s);                                     \
  }                                                                                                                      \
  void push_##NAME(const T* x, const T* w, const T* c, const T* slope, T* v, T* d, const Shape* s, int64_t pool) {       \
    pool == 2 ? push<T, 2>(x, w, c, slope, v, d, *s) : push<T, 1>(x, w, c, slope, v, d, *s);                             \
  }                                                                                                                      \
  void moments_##NAME(const T* x, double* mean, double* covariance, const Shape* s) { moments(x, mean, covariance, *s); }

extern "C" {
METADIST_PATCHES(float, f32)
METADIST_PATCHES(double, f64)
}
