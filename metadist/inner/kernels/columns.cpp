// Windows of pictures as rows of a matrix, and the sum of such rows back into pictures. Both copy and add runs of
// whole channels; columns.py says the same in tensor operations, in the same order of additions.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

struct Shape {
  int64_t batch, height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, out_h, out_w;
};

template <typename T>
void windows(const T* x, T* rows, const Shape& s) {
  const int64_t run = s.kernel_w * s.channels;
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t i = 0; i < s.out_h; i++)
      for (int64_t j = 0; j < s.out_w; j++) {
        T* row = rows + ((b * s.out_h + i) * s.out_w + j) * s.kernel_h * run;
        const int64_t left = j * s.stride_w - s.pad_w;
        const int64_t first = std::max<int64_t>(0, -left), last = std::max(first, std::min(s.kernel_w, s.width - left));
        for (int64_t u = 0; u < s.kernel_h; u++, row += run) {
          const int64_t y = i * s.stride_h + u - s.pad_h;
          if (y < 0 || y >= s.height || first == last) {
            std::memset(row, 0, sizeof(T) * run);
            continue;
          }
          std::memset(row, 0, sizeof(T) * first * s.channels);
          std::memcpy(row + first * s.channels, x + ((b * s.height + y) * s.width + left + first) * s.channels,
                      sizeof(T) * (last - first) * s.channels);
          std::memset(row + last * s.channels, 0, sizeof(T) * (s.kernel_w - last) * s.channels);
        }
      }
}

template <typename T>
void sum_windows(const T* rows, T* x, const Shape& s) {
  const int64_t run = s.kernel_w * s.channels;
  std::memset(x, 0, sizeof(T) * s.batch * s.height * s.width * s.channels);
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t i = 0; i < s.out_h; i++)
      for (int64_t j = 0; j < s.out_w; j++) {
        const T* row = rows + ((b * s.out_h + i) * s.out_w + j) * s.kernel_h * run;
        const int64_t left = j * s.stride_w - s.pad_w;
        const int64_t first = std::max<int64_t>(0, -left), last = std::max(first, std::min(s.kernel_w, s.width - left));
        for (int64_t u = 0; u < s.kernel_h; u++, row += run) {
          const int64_t y = i * s.stride_h + u - s.pad_h;
          if (y < 0 || y >= s.height) continue;
          T* to = x + ((b * s.height + y) * s.width + left + first) * s.channels;
          const T* from = row + first * s.channels;
          for (int64_t n = (last - first) * s.channels; n > 0; n--) *to++ += *from++;
        }
      }
}

}  // namespace

extern "C" {
void windows_f32(const float* x, float* rows, const Shape* s) { windows(x, rows, *s); }
void windows_f64(const double* x, double* rows, const Shape* s) { windows(x, rows, *s); }
void sum_windows_f32(const float* rows, float* x, const Shape* s) { sum_windows(rows, x, *s); }
void sum_windows_f64(const double* rows, double* x, const Shape* s) { sum_windows(rows, x, *s); }
}
