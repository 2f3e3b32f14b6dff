// The cells of a max pooling with the ReLU around it: what comes out, and where it came from.
#pragma once
#include "lanes.h"

namespace lanes {

// Q candidates for one output, channel by channel. The first of the largest is chosen, if it is positive.
template <typename T, int Q>
struct Choice {
  typedef typename Lanes<T>::V V;
  V u[Q];

  // The output; what is not a number stays what it is.
  V value() const {
    V best = u[0];
    for (int q = 1; q < Q; q++) best = u[q] > best ? u[q] : best;
    return best <= 0 ? V{} : best;
  }
  // `slope` at the chosen candidate, zeros elsewhere.
  void put_back(V slope, V* to) const {
    V best = u[0];
    to[0] = slope;
    for (int q = 1; q < Q; q++) {
      const auto more = u[q] > best;
      best = more ? u[q] : best;
      to[q] = more ? slope : V{};
      for (int r = 0; r < q; r++) to[r] = more ? V{} : to[r];
    }
    for (int q = 0; q < Q; q++) to[q] = best > 0 ? to[q] : V{};
  }
  // Of the candidates' `values` that of the chosen one, zero if there is none.
  V picked(const V* values) const {
    V best = u[0], found = values[0];
    for (int q = 1; q < Q; q++) {
      const auto more = u[q] > best;
      best = more ? u[q] : best;
      found = more ? values[q] : found;
    }
    return best > 0 ? found : V{};
  }
};

// Adds up K rows of channels: rows and pictures in T, the whole in double.
template <typename T>
class Sums {
 public:
  Sums(int64_t rows, int64_t channels)
      : padded_(Lanes<T>::padded(channels)), picture_(rows * padded_), all_(rows * padded_) {}
  T* row(int64_t k) { return picture_.data() + k * padded_; }
  void add(int64_t k, int64_t c, typename Lanes<T>::V more) { Lanes<T>::store(row(k) + c, Lanes<T>::load(row(k) + c) + more); }
  void end_picture() {
    for (size_t n = 0; n < all_.size(); n++) all_[n] += picture_[n], picture_[n] = 0;
  }
  double of(int64_t k, int64_t c) const { return all_[k * padded_ + c]; }
  void clear() { std::fill(all_.begin(), all_.end(), 0.0); }

 private:
  int64_t padded_;
  std::vector<T> picture_;
  std::vector<double> all_;
};

}  // namespace lanes
