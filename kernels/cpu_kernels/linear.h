// x [rows, in] times packed weights, accumulated in float32.
//
// Packed: panels of kPanel output features. In float32, within a panel feature after feature for each input: [panels,
// in, kPanel]. In bfloat16 the inputs lie in pairs, padded with zeros to a multiple of kDepth: [panels, in / 2, kPanel,
// 2], which is what dot products of pairs and tiles of matrices read, and what a shift and a mask make floats of.
//
// Each output is one chain of additions over the inputs in order, whatever the number of rows and the tiles are: a
// row's result does not depend on the rows beside it, bit for bit. So the arithmetic is chosen for the process and
// never by the width of a pass.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.h"
#include "vector.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define DRAFTSMITH_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512BF16__)
#define DRAFTSMITH_PAIRS 1
#endif

namespace draftsmith {

constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 32;                       // inputs that a tile of bfloat16 holds
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;  // accumulators fill the registers: 24 of 32, or 12 of 16

constexpr int kBlockBytes = 16 << 10;  // of a panel: stays in the L1 cache while several groups of rows pass
constexpr int kAhead = 2048;           // bytes to prefetch ahead in one stream: processors stop at the end of a page

/// How bfloat16 weights are multiplied; float32 weights are always multiplied in float32.
enum class Arithmetic {
  kFloat32,  // weights become floats, and x stays as it is
  kPairs,    // x is rounded to bfloat16, pairs of products are added in float32 (AVX512-BF16)
  kTiles,    // the same by tiles of 16 x 32 (AMX)
};

inline bool has_arithmetic(Arithmetic kind) {
#if defined(DRAFTSMITH_TILES)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl: the kernel grants tiles per process
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  if (kind == Arithmetic::kTiles) return granted;
#endif
#if defined(DRAFTSMITH_PAIRS)
  if (kind == Arithmetic::kPairs) return true;
#endif
  return kind == Arithmetic::kFloat32;
}

/// The arithmetic of this process: at first the fastest that the machine has.
inline std::atomic<Arithmetic>& arithmetic() {
  static std::atomic<Arithmetic> chosen{has_arithmetic(Arithmetic::kTiles)   ? Arithmetic::kTiles
                                        : has_arithmetic(Arithmetic::kPairs) ? Arithmetic::kPairs
                                                                             : Arithmetic::kFloat32};
  return chosen;
}

/// Inputs of a panel with the padding.
template <typename Weight>
constexpr int64_t packed_depth(int64_t in) {
  return sizeof(Weight) == 2 ? (in + kDepth - 1) / kDepth * kDepth : in;
}

/// Inputs that lie together in a panel.
template <typename Weight>
constexpr int kTogether = sizeof(Weight) == 2 ? 2 : 1;

/// sums[r][h] += the `kTogether<Weight>` inputs of each row at `x` times those of a panel at `weights`.
template <int Rows>
inline void multiply_inputs(const float* x, int64_t x_stride, const float* weights, Floats (&sums)[Rows][2]) {
  UNROLL for (int h = 0; h < 2; ++h) {
    const Floats weight = load(weights + h * kLanes);
    UNROLL for (int r = 0; r < Rows; ++r) sums[r][h] = fma(splat(x[r * x_stride]), weight, sums[r][h]);
  }
}

template <int Rows>
inline void multiply_inputs(const float* x, int64_t x_stride, const BFloat16* weights, Floats (&sums)[Rows][2]) {
  UNROLL for (int h = 0; h < 2; ++h) {
    const Words both = load_raw<Words>(weights + h * 2 * kLanes);
    const Floats first = (Floats)(both << 16), second = (Floats)(both & 0xffff0000u);
    UNROLL for (int r = 0; r < Rows; ++r) sums[r][h] = fma(splat(x[r * x_stride]), first, sums[r][h]);
    UNROLL for (int r = 0; r < Rows; ++r) sums[r][h] = fma(splat(x[r * x_stride + 1]), second, sums[r][h]);
  }
}

#if defined(DRAFTSMITH_PAIRS)
template <int Rows>
inline void multiply_inputs(const BFloat16* x, int64_t x_stride, const BFloat16* weights, Floats (&sums)[Rows][2]) {
  UNROLL for (int h = 0; h < 2; ++h) {
    const auto weight = (__m512bh)load_raw<Words>(weights + h * 2 * kLanes);
    UNROLL for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride, sizeof pair);
      sums[r][h] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][h], (__m512bh)_mm512_set1_epi32(pair), weight);
    }
  }
}
#endif

/// Where to prefetch from while a tile is multiplied, and how many bytes to go on with each step. One group of rows
/// reads its own stream ahead; several groups fetch a share of the next block each, so that memory is never idle.
struct Prefetch {
  const char* from;
  int64_t step;
};

/// out [Rows, Panels * kPanel] (+)= x [Rows, depth] times `Panels` panels that lie `panel_stride` weights apart.
template <int Rows, int Panels, typename X, typename Weight>
void multiply_tile(const X* x, int64_t x_stride, const Weight* weights, int64_t panel_stride, int64_t depth,
                   float* out, int64_t out_stride, bool accumulate, Prefetch ahead) {
  Floats sums[Panels][Rows][2] = {};
  if (accumulate)
    UNROLL for (int r = 0; r < Rows; ++r)
      UNROLL for (int p = 0; p < Panels; ++p)
        UNROLL for (int h = 0; h < 2; ++h) sums[p][r][h] = load(out + r * out_stride + p * kPanel + h * kLanes);
  for (int64_t k = 0; k < depth; k += kTogether<Weight>) {
    UNROLL for (int p = 0; p < Panels; ++p) {
      const char* next = ahead.from + p * panel_stride * sizeof(Weight);
      for (int line = 0; line < kTogether<Weight>; ++line) __builtin_prefetch(next + line * ahead.step);
      multiply_inputs<Rows>(x + k, x_stride, weights + p * panel_stride + k * kPanel, sums[p]);
    }
    ahead.from += kTogether<Weight> * ahead.step;
  }
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int p = 0; p < Panels; ++p)
      UNROLL for (int h = 0; h < 2; ++h) store(out + r * out_stride + p * kPanel + h * kLanes, sums[p][r][h]);
}

/// As multiply_tile, with the numbers of rows (1 to kMaxRows) and panels known at run time only.
/// One or two rows take several panels at once: eight chains of multiply-adds hide the latency of one.
template <int Rows, typename X, typename Weight>
void multiply_rows(int rows, const X* x, int64_t x_stride, const Weight* weights, int64_t panel_stride,
                   int64_t panels, int64_t depth, float* out, int64_t out_stride, bool accumulate,
                   Prefetch ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return multiply_rows<Rows - 1>(rows, x, x_stride, weights, panel_stride, panels, depth, out, out_stride,
                                     accumulate, ahead);
  }
  constexpr int kAtOnce = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  const auto at = [&](int64_t p) { return Prefetch{ahead.from + p * panel_stride * sizeof(Weight), ahead.step}; };
  int64_t p = 0;
  for (; p + kAtOnce <= panels; p += kAtOnce)
    multiply_tile<Rows, kAtOnce>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel,
                                 out_stride, accumulate, at(p));
  if constexpr (kAtOnce == 4)
    for (; p + 2 <= panels; p += 2)
      multiply_tile<Rows, 2>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel, out_stride,
                             accumulate, at(p));
  for (; p < panels; ++p)
    multiply_tile<Rows, 1>(x, x_stride, weights + p * panel_stride, panel_stride, depth, out + p * kPanel, out_stride,
                           accumulate, at(p));
}

/// sums [rows, panels * kPanel] = x times `panels` panels, by multiply_rows.
/// A few rows stream the weights once; more of them come back to a block of a panel that is still in the L1 cache.
template <typename X, typename Weight>
void multiply_panels(const X* x, int64_t x_stride, const Weight* weights, int64_t depth, int64_t panels, int64_t rows,
                     float* sums) {
  constexpr int kStep = kTogether<Weight>;
  const int64_t panel_size = depth * kPanel, stride = panels * kPanel, steps = depth / kStep;
  const int64_t row_groups = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t block_steps = kBlockBytes / (kPanel * kStep * sizeof(Weight));
  const int64_t blocks = row_groups == 1 ? 1 : (steps + block_steps - 1) / block_steps;
  const int64_t at_once = row_groups == 1 ? panels : 1;
  for (int64_t p = 0; p < panels; p += at_once)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t group = 0; group < row_groups; ++group) {
        const int64_t from = block * steps / blocks * kStep, end = (block + 1) * steps / blocks * kStep;
        const int64_t first = group * rows / row_groups, last = (group + 1) * rows / row_groups;
        const Weight* some = weights + p * panel_size + from * kPanel;
        const auto* bytes = reinterpret_cast<const char*>(some);
        const int64_t one_input = kPanel * sizeof(Weight), block_bytes = (end - from) * one_input;
        const Prefetch ahead =
            row_groups == 1 ? Prefetch{bytes + kAhead, one_input}
                            : Prefetch{bytes + block_bytes + group * block_bytes / row_groups, one_input / row_groups};
        multiply_rows<kMaxRows>(int(last - first), x + first * x_stride + from, x_stride, some, panel_size, at_once,
                                end - from, sums + first * stride + p * kPanel, stride, block > 0, ahead);
      }
}

#if defined(DRAFTSMITH_TILES)
/// The shapes of a thread's tiles. 0 to 3: sums; 4, 5: x; 6, 7: weights. Tiles 2, 3 and 5 have `second` rows.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int first, int second) {
    const int counts[8] = {first, first, second, second, first, second, kDepth / 2, kDepth / 2};
    for (int tile = 0; tile < 8; ++tile) bytes_a_row[tile] = 64, rows[tile] = uint8_t(counts[tile]);
  }
};

/// What the second pair of sums is for: further rows, or the next panel.
enum class Second { kNothing, kRows, kPanel };

/// out [rows, kPanel] = x in bfloat16 times a panel, and the same for the second pair of sums; `depth` is a multiple of
/// kDepth. The shapes of the tiles have been loaded: `first` rows of x, and those of the second pair.
template <Second Also>
void multiply_tiles(const BFloat16* x, int64_t x_stride, int first, const BFloat16* weights, int64_t depth, float* out,
                    int64_t out_stride) {
  constexpr int64_t kPairBytes = kPanel * 2 * sizeof(BFloat16);  // a pair of inputs for all features of the panel
  const int64_t x_bytes = x_stride * sizeof(BFloat16), out_bytes = out_stride * sizeof(float);
  const BFloat16 *x2 = x + first * x_stride, *weights2 = weights + depth * kPanel;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Also != Second::kNothing) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const BFloat16 *from = weights + k * kPanel, *from2 = weights2 + k * kPanel;
    const auto fetch = [](const BFloat16* some) {
      const char* ahead = reinterpret_cast<const char*>(some) + kAhead;
      UNROLL for (int line = 0; line < kDepth; ++line) __builtin_prefetch(ahead + line * 64);
    };
    fetch(from);
    _tile_loadd(4, x + k, x_bytes);
    _tile_loadd(6, from, kPairBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, from + kPanel, kPairBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Also == Second::kRows) {
      _tile_loadd(5, x2 + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (Also == Second::kPanel) {
      fetch(from2);
      _tile_loadd(6, from2, kPairBytes);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, from2 + kPanel, kPairBytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  float* out2 = Also == Second::kRows ? out + first * out_stride : out + kPanel;
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + kLanes, out_bytes);
  if constexpr (Also != Second::kNothing) {
    _tile_stored(2, out2, out_bytes);
    _tile_stored(3, out2 + kLanes, out_bytes);
  }
}

/// sums [rows, panels * kPanel] = x times `panels` panels, by tiles.
inline void multiply_panels_by_tiles(const BFloat16* x, int64_t x_stride, const BFloat16* weights, int64_t depth,
                                     int64_t panels, int64_t rows, float* sums) {
  const int64_t panel_size = depth * kPanel, stride = panels * kPanel;
  for (int64_t row = 0; row < rows; row += 32) {
    const int count = int(std::min<int64_t>(32, rows - row)), first = std::min(count, 16);
    const TileShapes shapes(first, count > 16 ? count - 16 : first);
    _tile_loadconfig(&shapes);  // each time: PyTorch's own products use the tiles of the same thread
    const BFloat16* from = x + row * x_stride;
    float* to = sums + row * stride;
    int64_t p = 0;
    for (; count > 16 && p < panels; ++p)
      multiply_tiles<Second::kRows>(from, x_stride, first, weights + p * panel_size, depth, to + p * kPanel, stride);
    for (; p + 2 <= panels; p += 2)
      multiply_tiles<Second::kPanel>(from, x_stride, first, weights + p * panel_size, depth, to + p * kPanel, stride);
    for (; p < panels; ++p)
      multiply_tiles<Second::kNothing>(from, x_stride, first, weights + p * panel_size, depth, to + p * kPanel, stride);
  }
  _tile_release();
}
#endif

/// The packed form of weight [features, in] with row stride `in`; features and inputs are padded with zeros.
template <typename Weight>
void pack_panels(const Weight* weight, int64_t features, int64_t in, Weight* packed) {
  constexpr int kStep = kTogether<Weight>;
  const int64_t depth = packed_depth<Weight>(in);
  for_each_tile((features + kPanel - 1) / kPanel, [&](int64_t panel) {
    Weight* to = packed + panel * depth * kPanel;
    for (int lane = 0; lane < kPanel; ++lane) {
      const int64_t feature = panel * kPanel + lane;
      for (int64_t k = 0; k < depth; ++k)
        to[k / kStep * kStep * kPanel + lane * kStep + k % kStep] =
            feature < features && k < in ? weight[feature * in + k] : Weight{};
    }
  });
}

/// x [rows, in] as the arithmetic reads it: [rows, depth] in its dtype, padded with zeros; the result is `x` or `room`.
template <typename To>
const To* as_inputs(const float* x, int64_t rows, int64_t in, int64_t depth, std::vector<To>& room) {
  if constexpr (std::is_same_v<To, float>)
    if (in == depth) return x;
  room.resize(rows * depth);
  To* to = room.data();  // inside the loop `room` may mean each thread's own
  const auto one_row = [=](int64_t row) {
    convert(x + row * in, to + row * depth, in);
    std::fill(to + row * depth + in, to + (row + 1) * depth, To{});
  };
  if (rows < 16)
    for (int64_t row = 0; row < rows; ++row) one_row(row);
  else
    for_each_tile(rows, one_row);
  return to;
}

/// out [rows, features] = x [rows, in] W^T + bias; `bias` (float32, [features]) may be null.
template <typename Weight, typename Out>
void packed_linear(const float* x, const Weight* packed, const float* bias, Out* out, int64_t rows, int64_t in,
                   int64_t features) {
  static thread_local std::vector<float> floats;
  static thread_local std::vector<BFloat16> halves;
  const int64_t depth = packed_depth<Weight>(in);
  const Arithmetic by = sizeof(Weight) == 2 ? arithmetic().load() : Arithmetic::kFloat32;
  const float* wide = by == Arithmetic::kFloat32 ? as_inputs(x, rows, in, depth, floats) : nullptr;
  const BFloat16* narrow = by == Arithmetic::kFloat32 ? nullptr : as_inputs(x, rows, in, depth, halves);

  const int64_t panels = (features + kPanel - 1) / kPanel;
  const int64_t panels_a_tile = panels >= 64 ? 4 : 2;
  const int64_t rows_a_tile = by == Arithmetic::kTiles ? 128 : 48;
  const int64_t columns = (panels + panels_a_tile - 1) / panels_a_tile;

  const auto one_tile = [&](int64_t tile) {
    const int64_t first_panel = tile % columns * panels_a_tile, first_row = tile / columns * rows_a_tile;
    const int64_t count = std::min(panels_a_tile, panels - first_panel);
    const int64_t tile_rows = std::min(rows_a_tile, rows - first_row), stride = count * kPanel;
    static thread_local std::vector<float> sums;
    sums.resize(tile_rows * stride);
    const Weight* weights = packed + first_panel * depth * kPanel;
    if (by == Arithmetic::kFloat32)
      multiply_panels(wide + first_row * depth, depth, weights, depth, count, tile_rows, sums.data());
    if constexpr (sizeof(Weight) == 2) {
      [[maybe_unused]] const BFloat16* from = narrow + first_row * depth;
#if defined(DRAFTSMITH_PAIRS)
      if (by == Arithmetic::kPairs) multiply_panels(from, depth, weights, depth, count, tile_rows, sums.data());
#endif
#if defined(DRAFTSMITH_TILES)
      if (by == Arithmetic::kTiles) multiply_panels_by_tiles(from, depth, weights, depth, count, tile_rows, sums.data());
#endif
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
