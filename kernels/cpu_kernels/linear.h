// x [rows, in] times packed weights, accumulated in float32.
//
// Packed: panels of kPanel output features, within a panel feature after feature for each input: [panels, in, kPanel].
// In bfloat16 the features i and kLanes + i are neighbours, so that one load gives two vectors of floats by a shift
// and a mask. Each output is one chain of multiply-adds over the inputs in order, whatever the number of rows and the
// tiles are: a row's result does not depend on the rows beside it, bit for bit.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"
#include "vector.h"

namespace draftsmith {

constexpr int kPanel = 2 * kLanes;
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;  // accumulators fill the registers: 24 of 32, or 12 of 16

constexpr int kBlockBytes = 16 << 10;  // of a panel: stays in the L1 cache while several groups of rows pass
constexpr int kAhead = 2048;           // bytes to prefetch ahead in one stream: processors stop at the end of a page

inline void load_panel(const float* from, Floats& low, Floats& high) {
  low = load(from);
  high = load(from + kLanes);
}

inline void load_panel(const BFloat16* from, Floats& low, Floats& high) {
  const Words both = load_raw<Words>(from);
  low = (Floats)(both << 16);
  high = (Floats)(both & 0xffff0000u);
}

/// Where to prefetch from while a tile is multiplied, and how many bytes to go on with each input. One group of rows
/// reads its own stream ahead; several groups fetch a share of the next block each, so that memory is never idle.
struct Prefetch {
  const char* from;
  int64_t step;
};

/// out [Rows, Panels * kPanel] (+)= x [Rows, depth] times `Panels` panels that lie `panel_stride` weights apart.
template <int Rows, int Panels, typename Weight>
void multiply_tile(const float* x, int64_t x_stride, const Weight* weights, int64_t panel_stride, int64_t depth,
                   float* out, int64_t out_stride, bool accumulate, Prefetch ahead) {
  Floats sums[Rows][Panels][2] = {};
  if (accumulate)
    UNROLL for (int r = 0; r < Rows; ++r)
      UNROLL for (int p = 0; p < Panels; ++p)
        UNROLL for (int h = 0; h < 2; ++h) sums[r][p][h] = load(out + r * out_stride + p * kPanel + h * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    UNROLL for (int p = 0; p < Panels; ++p) {
      Floats low, high;
      const Weight* from = weights + p * panel_stride + k * kPanel;
      __builtin_prefetch(ahead.from + p * panel_stride * sizeof(Weight));
      load_panel(from, low, high);
      UNROLL for (int r = 0; r < Rows; ++r) {
        const Floats value = splat(x[r * x_stride + k]);
        sums[r][p][0] = fma(value, low, sums[r][p][0]);
        sums[r][p][1] = fma(value, high, sums[r][p][1]);
      }
    }
    ahead.from += ahead.step;
  }
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int p = 0; p < Panels; ++p)
      UNROLL for (int h = 0; h < 2; ++h) store(out + r * out_stride + p * kPanel + h * kLanes, sums[r][p][h]);
}

/// As multiply_tile, with the numbers of rows (1 to kMaxRows) and panels known at run time only.
/// One or two rows take several panels at once: eight chains of multiply-adds hide the latency of one.
template <int Rows, typename Weight>
void multiply_rows(int rows, const float* x, int64_t x_stride, const Weight* weights, int64_t panel_stride,
                   int64_t panels, int64_t depth, float* out, int64_t out_stride, bool accumulate,
                   Prefetch ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return multiply_rows<Rows - 1>(rows, x, x_stride, weights, panel_stride, panels, depth, out, out_stride,
                                     accumulate, ahead);
  }
  constexpr int kTogether = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  const auto at = [&](int64_t p) { return Prefetch{ahead.from + p * panel_stride * sizeof(Weight), ahead.step}; };
  int64_t p = 0;
  for (; p + kTogether <= panels; p += kTogether)
    multiply_tile<Rows, kTogether>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel,
                                   out_stride, accumulate, at(p));
  if constexpr (kTogether == 4)
    for (; p + 2 <= panels; p += 2)
      multiply_tile<Rows, 2>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel, out_stride,
                             accumulate, at(p));
  for (; p < panels; ++p)
    multiply_tile<Rows, 1>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel, out_stride,
                           accumulate, at(p));
}

/// The packed form of weight [features, in] with row stride `in`; features are padded with zeros.
template <typename Weight>
void pack_panels(const Weight* weight, int64_t features, int64_t in, Weight* packed) {
  for_each_tile((features + kPanel - 1) / kPanel, [&](int64_t panel) {
    for (int lane = 0; lane < kPanel; ++lane) {
      const bool interleaved = sizeof(Weight) == 2;
      const int position = !interleaved ? lane : lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1;
      const int64_t feature = panel * kPanel + lane;
      Weight* to = packed + panel * in * kPanel + position;
      for (int64_t k = 0; k < in; ++k) to[k * kPanel] = feature < features ? weight[feature * in + k] : Weight{};
    }
  });
}

/// out [rows, features] = x [rows, in] W^T + bias; `bias` (float32, [features]) may be null.
template <typename Weight, typename Out>
void packed_linear(const float* x, const Weight* packed, const float* bias, Out* out, int64_t rows, int64_t in,
                   int64_t features) {
  const int64_t panels = (features + kPanel - 1) / kPanel;
  const int64_t panels_a_tile = panels >= 64 ? 4 : 2;
  const int64_t rows_a_tile = 48;
  const int64_t columns = (panels + panels_a_tile - 1) / panels_a_tile;
  // a few rows stream the weights once; more of them come back to a block of a panel that is still in the L1 cache
  const int64_t block_depth = kBlockBytes / (kPanel * sizeof(Weight));
  const int64_t blocks = rows <= kMaxRows ? 1 : (in + block_depth - 1) / block_depth;

  const auto one_tile = [&](int64_t tile) {
    const int64_t first_panel = tile % columns * panels_a_tile, first_row = tile / columns * rows_a_tile;
    const int64_t count = std::min(panels_a_tile, panels - first_panel);
    const int64_t tile_rows = std::min(rows_a_tile, rows - first_row), stride = count * kPanel;
    const int64_t row_groups = (tile_rows + kMaxRows - 1) / kMaxRows;
    static thread_local std::vector<float> sums;
    sums.resize(tile_rows * stride);
    const int64_t step = row_groups == 1 ? count : 1;
    for (int64_t p = 0; p < count; p += step)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t group = 0; group < row_groups; ++group) {
          const int64_t from = block * in / blocks, depth = (block + 1) * in / blocks - from;
          const int64_t begin = group * tile_rows / row_groups, end = (group + 1) * tile_rows / row_groups;
          const Weight* weights = packed + ((first_panel + p) * in + from) * kPanel;
          const auto* bytes = reinterpret_cast<const char*>(weights);
          const int64_t one_input = kPanel * sizeof(Weight), block_bytes = depth * one_input;
          const Prefetch ahead =
              row_groups == 1 ? Prefetch{bytes + kAhead, one_input}
                              : Prefetch{bytes + block_bytes + group * block_bytes / row_groups, one_input / row_groups};
          multiply_rows<kMaxRows>(int(end - begin), x + (first_row + begin) * in + from, in,
                                  weights, in * kPanel, step, depth,
                                  sums.data() + begin * stride + p * kPanel, stride, block > 0, ahead);
        }
    const int64_t first = first_panel * kPanel, width = std::min(stride, features - first);
    for (int64_t r = 0; r < tile_rows; ++r) {
      float* row = sums.data() + r * stride;
      for (int64_t i = 0; bias != nullptr && i < width; ++i) row[i] += bias[first + i];
      convert(row, out + (first_row + r) * features + first, width);
    }
  };
  const int64_t tiles = columns * ((rows + rows_a_tile - 1) / rows_a_tile);
  if (rows * in * features < 1 << 16) {  // less work than waking a thread
    for (int64_t tile = 0; tile < tiles; ++tile) one_tile(tile);
  } else {
    for_each_tile(tiles, one_tile);
  }
}

}  // namespace draftsmith
