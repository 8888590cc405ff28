// Tiles of the presynaptic input: the zero-padded patches of some rows, packed for the microkernel.
//
// One image at a time is staged as padded NHWC, so that a patch is a few contiguous runs; the
// patches themselves exist for one tile only. A linear layer is the case of a 1x1 image.
#pragma once

#include "kernels.h"
#include "signals.h"

namespace ghl::cpu {
namespace {

// Columns of a panel: two vectors, or one for a last panel that needs no more.
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

struct PatchGeometry {
  int64_t channels, height, width;  // of the staged image
  int64_t group_channels, columns;  // of one group's patch: columns = kh * kw * group_channels
  bool direct;                      // x already is what staging would make of it

  template <class In, class T>
  static PatchGeometry of(const PairParams& p, const In*, const T*) {
    PatchGeometry g;
    g.channels = p.x.size[1];
    g.height = p.x.size[2] + 2 * p.padding[0];
    g.width = p.x.size[3] + 2 * p.padding[1];
    g.group_channels = g.channels / p.groups;
    g.columns = g.group_channels * p.kernel_size[0] * p.kernel_size[1];
    g.direct = sizeof(In) == sizeof(T) && p.padding[0] == 0 && p.padding[1] == 0 &&
               (p.x.stride[1] == 1 || g.channels == 1);
    return g;
  }
};

template <class T>
inline int64_t group_panel_elements(int64_t columns) {
  return divide_up(columns, kPanel<T>) * kPanel<T> * kTileRows;
}

template <class T>
inline int64_t panel_width(int64_t columns, int64_t column) {
  return columns - column / kPanel<T> * kPanel<T> <= kLanes<T> ? kLanes<T> : kPanel<T>;
}

template <class In, class T>
class Patches {
 public:
  // `image` is zeroed: its border is the padding and stays as it is.
  Patches(const PairParams& p, T* image, T* panels)
      : p_(p),
        geometry_(PatchGeometry::of(p, static_cast<const In*>(nullptr), image)),
        image_(image),
        panels_(panels) {}

  // Rows [row0, row0 + rows) of the patches of groups [group0, group1).
  void pack(int64_t row0, int64_t rows, int64_t group0, int64_t group1) {
    const int64_t positions = p_.y.size[2] * p_.y.size[3];
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t image = (row0 + m) / positions, position = (row0 + m) % positions;
      if (image != staged_) stage(image);
      const int64_t h = position / p_.y.size[3] * p_.stride[0];
      const int64_t w = position % p_.y.size[3] * p_.stride[1];
      const T* corner = source_ + h * row_step_ + w * column_step_;
      for (int64_t group = group0; group < group1; ++group)
        pack_row(corner + group * geometry_.group_channels, m, panel(group - group0, 0));
    }
  }

  const T* panel(int64_t group, int64_t column) const {
    return panels_ + group * group_panel_elements<T>(geometry_.columns) + column * kTileRows;
  }
  T* panel(int64_t group, int64_t column) {
    return const_cast<T*>(static_cast<const Patches*>(this)->panel(group, column));
  }

 private:
  void stage(int64_t image) {
    staged_ = image;
    const In* from = static_cast<const In*>(p_.x.data) + image * p_.x.stride[0];
    if (geometry_.direct) {
      source_ = reinterpret_cast<const T*>(from);
      row_step_ = p_.x.stride[2];
      column_step_ = p_.x.stride[3];
      return;
    }
    source_ = image_;
    column_step_ = geometry_.channels;
    row_step_ = geometry_.channels * geometry_.width;
    T* inside = image_ + p_.padding[0] * row_step_ + p_.padding[1] * column_step_;
    const int64_t channels = geometry_.channels, height = p_.x.size[2], width = p_.x.size[3];
    for (int64_t h = 0; h < height; ++h, from += p_.x.stride[2], inside += row_step_) {
      if (p_.x.stride[3] == 1) {
        transpose(from, p_.x.stride[1], channels, width, inside, channels);
      } else {
        for (int64_t w = 0; w < width; ++w)
          convert(from + w * p_.x.stride[3], p_.x.stride[1], inside + w * channels, channels);
      }
    }
  }

  void pack_row(const T* corner, int64_t m, T* group_panels) {
    const int64_t taps = p_.kernel_size[1];
    const bool one_run = column_step_ * p_.dilation[1] == geometry_.group_channels || taps == 1;
    const int64_t run = one_run ? taps * geometry_.group_channels : geometry_.group_channels;
    int64_t column = 0;
    for (int64_t i = 0; i < p_.kernel_size[0]; ++i) {
      const T* from = corner + i * p_.dilation[0] * row_step_;
      for (int64_t j = 0; j < (one_run ? 1 : taps); ++j, column += run)
        copy_run(from + j * p_.dilation[1] * column_step_, run, m, column, group_panels);
    }
  }

  void copy_run(const T* from, int64_t count, int64_t m, int64_t column, T* group_panels) {
    while (count > 0) {
      const int64_t lane = column % kPanel<T>, width = panel_width<T>(geometry_.columns, column);
      const int64_t take = minimum(count, width - lane);
      T* to = group_panels + (column - lane) * kTileRows + m * width + lane;
      for (int64_t i = 0; i < take; ++i) to[i] = from[i];
      from += take;
      column += take;
      count -= take;
    }
  }

  const PairParams& p_;
  const PatchGeometry geometry_;
  T* const image_;
  T* const panels_;
  const T* source_ = nullptr;
  int64_t row_step_ = 0, column_step_ = 0;
  int64_t staged_ = -1;
};

}  // namespace
}  // namespace ghl::cpu
