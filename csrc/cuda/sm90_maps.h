// What tensor maps say of x, y and g, and for which layers they can say it. No CUDA here.
#pragma once

#include "sm90_exchange.h"
#include "sm90_layout.h"

namespace ghl::cuda::sm90 {

// Innermost dimension first, as cuTensorMapEncodeTiled and -Im2col take them; strides in bytes, of
// all dimensions but the innermost. An element is 16 bits.
struct MapOfMatrix {
  const void* data;
  uint64_t sizes[2], strides[1];
};
struct MapOfImages {
  const void* data;
  uint64_t sizes[4], strides[3];
  int32_t lower[2], upper[2];  // (w, h): the first and last pixel of patches, from either corner
  uint32_t steps[4];
};

// The stride of a dimension of one is any number: one is made up that maps accept.
inline int64_t usable_stride(int64_t size, int64_t stride, int64_t inner) {
  return size == 1 ? (inner + 7) / 8 * 8 : stride;
}

inline MapOfMatrix map_of_signal(const Matrix& signal, const DualWgradParams& p) {
  const int64_t columns = int64_t(p.groups) * p.neurons;
  const int64_t row = usable_stride(p.rows, signal.row, columns);
  return {signal.data, {uint64_t(columns), uint64_t(p.rows)}, {uint64_t(row) * 2}};
}

inline MapOfMatrix map_of_exchange(const DualWgradParams& p, const Exchange& exchange) {
  const uint64_t rows = uint64_t(p.splits) * exchange.ring_rows;
  return {exchange.u, {uint64_t(p.neurons), rows}, {uint64_t(p.neurons) * 2}};
}

inline int32_t images_of(const DualWgradParams& p) {
  return p.rows / (p.out_height * p.out_width);
}

// The distance of neighbouring rows where x is a matrix (a linear layer, a dense 1×1 convolution);
// 0 where it is not.
inline int64_t row_stride_of_x(const DualWgradParams& p) {
  const bool pointwise = p.kernel_h * p.kernel_w * p.stride_h * p.stride_w == 1 &&
                         p.padding_h == 0 && p.padding_w == 0;
  if (!pointwise) return 0;
  const int64_t sizes[3] = {p.in_width, p.in_height, images_of(p)};
  const int64_t strides[3] = {p.x.width, p.x.height, p.x.image};
  int64_t row = 0, rows = 1;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) continue;
    if (rows == 1) row = strides[i];
    if (strides[i] != row * rows) return 0;
    rows *= sizes[i];
  }
  return usable_stride(rows, row, int64_t(p.groups) * p.channels);
}

inline MapOfMatrix map_of_rows(const DualWgradParams& p) {
  const uint64_t columns = uint64_t(p.groups) * p.channels;
  return {p.x.data, {columns, uint64_t(p.rows)}, {uint64_t(row_stride_of_x(p)) * 2}};
}

// The bounding box holds the first pixels of patches: from -padding in steps of the stride to the
// last output position's, and not a pixel further, so that the walk wraps where outputs do.
inline MapOfImages map_of_images(const DualWgradParams& p) {
  const int64_t channels = int64_t(p.groups) * p.channels;
  const int64_t width = usable_stride(p.in_width, p.x.width, channels);
  const int64_t height = usable_stride(p.in_height, p.x.height, width * p.in_width);
  const int64_t image = usable_stride(images_of(p), p.x.image, height * p.in_height);
  return {p.x.data,
          {uint64_t(channels), uint64_t(p.in_width), uint64_t(p.in_height), uint64_t(images_of(p))},
          {uint64_t(width) * 2, uint64_t(height) * 2, uint64_t(image) * 2},
          {-p.padding_w, -p.padding_h},
          {(p.out_width - 1) * p.stride_w - p.padding_w - (p.in_width - 1),
           (p.out_height - 1) * p.stride_h - p.padding_h - (p.in_height - 1)},
          {1, uint32_t(p.stride_w), uint32_t(p.stride_h), 1}};
}

// The limits of cuTensorMapEncode*: strides of 16 bytes, below 2^40.
inline bool fits_map(uint64_t stride) {
  return stride > 0 && stride % 16 == 0 && stride < uint64_t{1} << 40;
}
inline bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline const char* signal_unfit(const DualWgradParams& p) {
  for (const Matrix& signal : {p.y, p.g}) {
    if (signal.column != 1 || !aligned(signal.data) ||
        !fits_map(map_of_signal(signal, p).strides[0]))
      return "y and g must have neurons side by side, and rows at multiples of 16 bytes that do "
             "not "
             "coincide";
  }
  return nullptr;
}

inline const char* images_unfit(const DualWgradParams& p) {
  const MapOfImages map = map_of_images(p);
  for (uint64_t stride : map.strides) {
    if (!fits_map(stride)) return "pixels of x must lie at multiples of 16 bytes, none twice";
  }
  if (p.stride_h > 8 || p.stride_w > 8) return "the stride of the convolution must be 8 or less";
  if ((p.kernel_h - 1) * p.dilation_h > 255 || (p.kernel_w - 1) * p.dilation_w > 255)
    return "a kernel with its dilation must span 256 pixels or fewer";
  for (int i = 0; i < 2; ++i) {
    if (map.lower[i] < -128 || map.upper[i] < -128 || map.upper[i] > 127)
      return "padding, and a kernel less its padding, must be 128 pixels or less";
  }
  return nullptr;
}

// Why the kernel cannot run a layer, or null.
inline const char* unfit(const DualWgradParams& p) {
  if (p.dtype == Dtype::float32) return "numbers must have 16 bits";
  if (p.rows <= 0 || p.neurons <= 0 || p.channels <= 0) return "the layer is empty";
  if (p.x.channel != 1 || !aligned(p.x.data))
    return "x must have channels side by side and begin at a multiple of 16 bytes";
  if (p.groups > 1 && (p.channels % 8 != 0 || p.neurons % 8 != 0))
    return "groups must have multiples of 8 neurons and 8 channels: copies begin at 16 bytes";
  const int64_t row = row_stride_of_x(p);
  if (row ? !fits_map(uint64_t(row) * 2) : images_unfit(p) != nullptr)
    return row ? "rows of x must lie at multiples of 16 bytes" : images_unfit(p);
  if (p.exchange && (p.competition != Competition::softmax || p.groups != 1 || p.neurons % 8 != 0 ||
                     p.neurons > kMostExchanged || p.u_sums))
    return "u that is exchanged must be a softmax of one group, of a multiple of 8 neurons up to "
           "1024, without its sums";
  if (p.competition != Competition::linear && !p.statistics.largest && !p.exchange &&
      (p.groups != 1 || p.neurons > kNeurons || p.neurons % 8 != 0))
    return "without statistics there must be one group, and neurons a multiple of 8 up to 64";
  return signal_unfit(p);
}

}  // namespace ghl::cuda::sm90
