// x [rows, in] times packed weights, accumulated in float32.
//
// Packed: panels of kPanel output features, and within a panel step after step of inputs, padded with zeros to whole
// steps. In float32 a step is one input: [panels, in, kPanel]. In bfloat16 the inputs lie in pairs, padded to a
// multiple of kDepth: [panels, in / 2, kPanel, 2], which is what dot products of pairs and tiles of matrices read, and
// what a shift and a mask make floats of. In int8 a step is a block of 32 inputs with a scale for each feature, as in
// GGUF's Q8_0, in int4 one with a scale and a minimum, as in Q4_1; x is rounded to int8 in the same blocks, and the
// products of a block are summed exactly, as integers.
//
// Each output is one chain of additions over the steps in order, whatever the number of rows and the tiles are: a
// row's result does not depend on the rows beside it, bit for bit. So the arithmetic is chosen for the process and
// never by the width of a pass.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
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
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DRAFTSMITH_DOTS 1  // of four bytes
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define DRAFTSMITH_PAIRS_OF_BYTES 1
#endif

namespace draftsmith {

constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 32;                       // inputs that a tile of bfloat16 holds
constexpr int kBlockInputs = 32;                 // of an int8 or int4 block, which share a scale

constexpr int kBlockBytes = 16 << 10;  // of a panel: stays in the L1 cache while several groups of rows pass
constexpr int kAhead = 2048;           // bytes to prefetch ahead in one stream: processors stop at the end of a page

/// What is added to an int8 weight's byte. The instruction for dot products of four bytes takes one side unsigned; what
/// the 128 adds is the same for all features, and is taken off by `Int8Inputs::start`.
#if defined(DRAFTSMITH_DOTS)
constexpr int kOffset = 128;
#else
constexpr int kOffset = 0;
#endif

/// A block of inputs of a panel in int8: weight = scale * (byte - kOffset).
struct Int8Weights {
  uint16_t scales[kPanel];  // float16
  uint8_t bytes[kBlockInputs / 4][kPanel][4];
};

/// The same in int4: weight = scale * level + minimum. A byte has the level of one input and of that 16 later.
struct Int4Weights {
  uint16_t scales[kPanel], minima[kPanel];  // float16
  uint8_t levels[kBlockInputs / 8][kPanel][4];
};

/// A block of a row of x in int8: x = scale * value.
struct Int8Inputs {
  int32_t start;  // -kOffset * the sum of the values
  float scale;    // NaN where a value of the block is not finite
  float sum;      // scale * the sum of the values
  int8_t values[kBlockInputs];
};

/// How bfloat16 weights are multiplied; weights of other formats have one way each.
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

/// Formats of integers in blocks.
template <typename Weight>
constexpr bool kBlocked = std::is_same_v<Weight, Int8Weights> || std::is_same_v<Weight, Int4Weights>;

/// Inputs of a step; elements of `Weight` in a step of a panel, and of `X` in a step of a row.
template <typename Weight>
constexpr int kInputs = kBlocked<Weight> ? kBlockInputs : std::is_same_v<Weight, BFloat16> ? 2 : 1;
template <typename Weight>
constexpr int kElements = kBlocked<Weight> ? 1 : kPanel * kInputs<Weight>;
template <typename X, typename Weight>
constexpr int kXElements = std::is_same_v<X, Int8Inputs> ? 1 : kInputs<Weight>;

/// Rows whose sums fill the registers: 24 of 32, or 12 of 16; with integers there are sums of a block beside them.
template <typename Weight>
constexpr int kMaxRows = kBlocked<Weight> ? (kLanes == 16 ? 6 : 3) : (kLanes == 16 ? 12 : 6);

/// Steps of a panel, padded.
template <typename Weight>
constexpr int64_t steps_of(int64_t in) {
  constexpr int64_t whole = std::is_same_v<Weight, float> ? 1 : kDepth;  // kBlockInputs are as many
  return (in + whole - 1) / whole * whole / kInputs<Weight>;
}

/// sums[r][h] += a step's inputs of each row at `x` times those of a panel at `weights`.
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

/// Four values of x in every lane: read from memory by one instruction, where the way through a scalar takes three.
inline Words four_of(const Int8Inputs& x, int four) {
  int32_t bytes;
  std::memcpy(&bytes, x.values + 4 * four, sizeof bytes);
  return Words(bytes - Ints{});
}

#if defined(__AVX512VNNI__)
inline Ints dot_bytes(Ints sums, Words bytes, Words x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)x);
}
#elif defined(__AVXVNNI__)
inline Ints dot_bytes(Ints sums, Words bytes, Words x) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)bytes, (__m256i)x);
}
#elif defined(__AVX512BW__)
inline Words magnitude_of(Words x) { return (Words)_mm512_abs_epi8((__m512i)x); }
inline Words with_sign_of(Words x, Words bytes) {  // where x is 0 any sign will do
  const auto minus = _mm512_movepi8_mask((__m512i)x);
  return (Words)_mm512_mask_sub_epi8((__m512i)bytes, minus, _mm512_setzero_si512(), (__m512i)bytes);
}
inline Ints pairs_of(Words unsigned_bytes, Words bytes) {
  return (Ints)_mm512_maddubs_epi16((__m512i)unsigned_bytes, (__m512i)bytes);
}
inline Ints add_halves(Ints a, Ints b) { return (Ints)_mm512_add_epi16((__m512i)a, (__m512i)b); }
inline Ints widen(Ints pairs) { return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
#elif defined(DRAFTSMITH_PAIRS_OF_BYTES)
inline Words magnitude_of(Words x) { return (Words)_mm256_abs_epi8((__m256i)x); }
inline Words with_sign_of(Words x, Words bytes) { return (Words)_mm256_sign_epi8((__m256i)bytes, (__m256i)x); }
inline Ints pairs_of(Words unsigned_bytes, Words bytes) {
  return (Ints)_mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)bytes);
}
inline Ints add_halves(Ints a, Ints b) { return (Ints)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline Ints widen(Ints pairs) { return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
#endif

/// Sums of products of a block's bytes and x, exact: `add` is for int8 weights, `add_levels` for levels below 16.
struct Dots {
  Ints sums = {};

#if defined(DRAFTSMITH_DOTS)
  void add(Words bytes, Words x) { sums = dot_bytes(sums, bytes, x); }
  void add_levels(Words levels, Words x) { sums = dot_bytes(sums, levels, x); }
  Ints total() const { return sums; }
#elif defined(DRAFTSMITH_PAIRS_OF_BYTES)
  Ints pairs = {};  // sums of 16 bits

  // the instruction saturates at 2^15 and takes one side unsigned: |x| |weight| is at most 127 * 127, and two of them fit
  void add(Words bytes, Words x) { sums += widen(pairs_of(magnitude_of(x), with_sign_of(x, bytes))); }
  // a pair is at most 2 * 15 * 127, and the eight pairs of a block fit
  void add_levels(Words levels, Words x) { pairs = add_halves(pairs, pairs_of(levels, x)); }
  Ints total() const { return sums + widen(pairs); }
#else
  void add(Words bytes, Words x) {
    UNROLL for (int i = 0; i < 4; ++i)
      sums += ((Ints)(bytes << (24 - 8 * i)) >> 24) * ((Ints)(x << (24 - 8 * i)) >> 24);
  }
  void add_levels(Words levels, Words x) { add(levels, x); }
  Ints total() const { return sums; }
#endif
};

template <int Rows>
inline void multiply_inputs(const Int8Inputs* x, int64_t x_stride, const Int8Weights* weights,
                            Floats (&sums)[Rows][2]) {
  Dots dots[Rows][2];
  UNROLL for (int four = 0; four < kBlockInputs / 4; ++four)
    UNROLL for (int h = 0; h < 2; ++h) {
      const Words some = load_raw<Words>(&weights->bytes[four][h * kLanes][0]);
      UNROLL for (int r = 0; r < Rows; ++r) dots[r][h].add(some, four_of(x[r * x_stride], four));
    }
  UNROLL for (int h = 0; h < 2; ++h) {
    const Floats scales = load_float16(weights->scales + h * kLanes);
    UNROLL for (int r = 0; r < Rows; ++r) {
      const Int8Inputs& row = x[r * x_stride];
      const Floats total = __builtin_convertvector(row.start + dots[r][h].total(), Floats);
      sums[r][h] = fma(total, scales * splat(row.scale), sums[r][h]);
    }
  }
}

template <int Rows>
inline void multiply_inputs(const Int8Inputs* x, int64_t x_stride, const Int4Weights* weights,
                            Floats (&sums)[Rows][2]) {
  constexpr int kHalf = kBlockInputs / 8;
  Dots dots[Rows][2];
  UNROLL for (int four = 0; four < kHalf; ++four)
    UNROLL for (int h = 0; h < 2; ++h) {
      const Words both = load_raw<Words>(&weights->levels[four][h * kLanes][0]);
      const Words low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
      UNROLL for (int r = 0; r < Rows; ++r) {
        dots[r][h].add_levels(low, four_of(x[r * x_stride], four));
        dots[r][h].add_levels(high, four_of(x[r * x_stride], four + kHalf));
      }
    }
  UNROLL for (int h = 0; h < 2; ++h) {
    const Floats scales = load_float16(weights->scales + h * kLanes);
    const Floats minima = load_float16(weights->minima + h * kLanes);
    UNROLL for (int r = 0; r < Rows; ++r) {
      const Int8Inputs& row = x[r * x_stride];
      sums[r][h] = fma(__builtin_convertvector(dots[r][h].total(), Floats), scales * splat(row.scale), sums[r][h]);
      sums[r][h] = fma(minima, splat(row.sum), sums[r][h]);
    }
  }
}

/// Where to prefetch from while a tile is multiplied, and how many bytes to go on with each step. One group of rows
/// reads its own stream ahead; several groups fetch a share of the next block each, so that memory is never idle.
struct Prefetch {
  const char* from;
  int64_t step;
};

/// Prefetches of a step of a panel.
template <typename Weight>
constexpr int kLines = kBlocked<Weight> ? (sizeof(Weight) + 63) / 64 : kInputs<Weight>;

/// out [Rows, Panels * kPanel] (+)= `steps` steps of x [Rows, ...] times `Panels` panels, `panel_stride` elements
/// apart.
template <int Rows, int Panels, typename X, typename Weight>
void multiply_tile(const X* x, int64_t x_stride, const Weight* weights, int64_t panel_stride, int64_t steps,
                   float* out, int64_t out_stride, bool accumulate, Prefetch ahead) {
  Floats sums[Panels][Rows][2] = {};
  if (accumulate)
    UNROLL for (int r = 0; r < Rows; ++r)
      UNROLL for (int p = 0; p < Panels; ++p)
        UNROLL for (int h = 0; h < 2; ++h) sums[p][r][h] = load(out + r * out_stride + p * kPanel + h * kLanes);
  for (int64_t step = 0; step < steps; ++step) {
    UNROLL for (int p = 0; p < Panels; ++p) {
      const char* next = ahead.from + p * panel_stride * sizeof(Weight);
      for (int line = 0; line < kLines<Weight>; ++line) __builtin_prefetch(next + line * ahead.step);
      multiply_inputs<Rows>(x + step * kXElements<X, Weight>, x_stride,
                            weights + p * panel_stride + step * kElements<Weight>, sums[p]);
    }
    ahead.from += kLines<Weight> * ahead.step;
  }
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int p = 0; p < Panels; ++p)
      UNROLL for (int h = 0; h < 2; ++h) store(out + r * out_stride + p * kPanel + h * kLanes, sums[p][r][h]);
}

/// As multiply_tile, with the numbers of rows (1 to kMaxRows) and panels known at run time only.
/// One or two rows take several panels at once: eight chains of multiply-adds hide the latency of one. Not so integers
/// on narrow vectors: a block's sums start anew, and one stream from memory is faster than four.
template <int Rows, typename X, typename Weight>
void multiply_rows(int rows, const X* x, int64_t x_stride, const Weight* weights, int64_t panel_stride,
                   int64_t panels, int64_t steps, float* out, int64_t out_stride, bool accumulate,
                   Prefetch ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return multiply_rows<Rows - 1>(rows, x, x_stride, weights, panel_stride, panels, steps, out, out_stride,
                                     accumulate, ahead);
  }
  constexpr int kAtOnce = (kBlocked<Weight> && kLanes < 16) || Rows > 2 ? 1 : Rows == 2 ? 2 : 4;
  const auto at = [&](int64_t p) { return Prefetch{ahead.from + p * panel_stride * sizeof(Weight), ahead.step}; };
  int64_t p = 0;
  for (; p + kAtOnce <= panels; p += kAtOnce)
    multiply_tile<Rows, kAtOnce>(x, x_stride, weights + p * panel_stride, panel_stride, steps, out + p * kPanel,
                                 out_stride, accumulate, at(p));
  if constexpr (kAtOnce == 4)
    for (; p + 2 <= panels; p += 2)
      multiply_tile<Rows, 2>(x, x_stride, weights + p * panel_stride, panel_stride, steps, out + p * kPanel, out_stride,
                             accumulate, at(p));
  for (; p < panels; ++p)
    multiply_tile<Rows, 1>(x, x_stride, weights + p * panel_stride, panel_stride, steps, out + p * kPanel, out_stride,
                           accumulate, at(p));
}

/// sums [rows, panels * kPanel] = x times `panels` panels, by multiply_rows.
/// A few rows stream the weights once; more of them come back to a block of a panel that is still in the L1 cache.
template <typename X, typename Weight>
void multiply_panels(const X* x, int64_t x_stride, const Weight* weights, int64_t steps, int64_t panels, int64_t rows,
                     float* sums) {
  constexpr int64_t kBytes = kElements<Weight> * sizeof(Weight);  // of a step
  const int64_t panel_size = steps * kElements<Weight>, stride = panels * kPanel;
  const int64_t row_groups = (rows + kMaxRows<Weight> - 1) / kMaxRows<Weight>;
  const int64_t block_steps = kBlockBytes / kBytes;
  const int64_t blocks = row_groups == 1 ? 1 : (steps + block_steps - 1) / block_steps;
  const int64_t at_once = row_groups == 1 ? panels : 1;
  for (int64_t p = 0; p < panels; p += at_once)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t group = 0; group < row_groups; ++group) {
        const int64_t from = block * steps / blocks, end = (block + 1) * steps / blocks;
        const int64_t first = group * rows / row_groups, last = (group + 1) * rows / row_groups;
        const Weight* some = weights + p * panel_size + from * kElements<Weight>;
        const auto* bytes = reinterpret_cast<const char*>(some);
        const int64_t line = kBytes / kLines<Weight>, block_bytes = (end - from) * kBytes;
        const Prefetch ahead =
            row_groups == 1 ? Prefetch{bytes + kAhead, line}
                            : Prefetch{bytes + block_bytes + group * block_bytes / row_groups, line / row_groups};
        const auto* inputs = x + first * x_stride + from * kXElements<X, Weight>;
        multiply_rows<kMaxRows<Weight>>(int(last - first), inputs, x_stride, some, panel_size, at_once, end - from,
                                        sums + first * stride + p * kPanel, stride, block > 0, ahead);
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
inline void multiply_panels_by_tiles(const BFloat16* x, int64_t x_stride, const BFloat16* weights, int64_t steps,
                                     int64_t panels, int64_t rows, float* sums) {
  const int64_t depth = steps * kInputs<BFloat16>, panel_size = depth * kPanel, stride = panels * kPanel;
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
  constexpr int kStep = kInputs<Weight>;
  const int64_t depth = steps_of<Weight>(in) * kStep;
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

/// The same, rounded to int8: scale = the block's largest magnitude / 127 in float16, which gives weights that come
/// from Q8_0 their own integers and scales back.
inline void pack_panels(const float* weight, int64_t features, int64_t in, Int8Weights* packed) {
  const int64_t steps = steps_of<Int8Weights>(in);
  for_each_tile((features + kPanel - 1) / kPanel, [&](int64_t panel) {
    for (int64_t step = 0; step < steps; ++step) {
      Int8Weights& to = packed[panel * steps + step];
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t feature = panel * kPanel + lane, first = step * kBlockInputs;
        const int64_t count = feature < features ? std::min<int64_t>(kBlockInputs, in - first) : 0;
        const float* from = weight + feature * in + first;
        float largest = 0;
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(from[i]));
        to.scales[lane] = float16_bits(largest / 127);
        const float scale = float16_value(to.scales[lane]);
        for (int i = 0; i < kBlockInputs; ++i) {
          const float level = i < count && scale > 0 ? std::nearbyint(from[i] / scale) : 0.0f;
          to.bytes[i / 4][lane][i % 4] = uint8_t(kOffset + int(std::clamp(level, -127.0f, 127.0f)));
        }
      }
    }
  });
}

/// Scale and minimum (float16) of a block of weights in int4.
struct Int4Scale {
  uint16_t scale, minimum;

  int level(float weight) const {
    const float step = float16_value(scale);
    const float steps = step != 0 ? (weight - float16_value(minimum)) / step : 0.0f;
    return int(std::clamp(std::nearbyint(steps), 0.0f, 15.0f));
  }
  float value(int level) const { return std::fma(float16_value(scale), float(level), float16_value(minimum)); }
};

/// As GGUF's Q4_1 or Q4_0 has it, whichever rounds the block less: from the minimum in 15 steps to the maximum, or in
/// eighths of the weight of largest magnitude. So blocks that were written in one of the two get their own levels back.
inline Int4Scale int4_scale(const float* weights, int64_t count) {
  const auto larger = [](float a, float b) { return std::abs(a) < std::abs(b); };
  const auto [low, high] = std::minmax_element(weights, weights + count);
  const float largest = *std::max_element(weights, weights + count, larger);
  const Int4Scale fifteenths{float16_bits((*high - *low) / 15), float16_bits(*low)};
  const Int4Scale eighths{float16_bits(largest / -8), float16_bits(largest)};
  const auto error = [=](const Int4Scale& scale) {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += std::abs(scale.value(scale.level(weights[i])) - weights[i]);
    return total;
  };
  return error(eighths) < error(fifteenths) ? eighths : fifteenths;
}

/// The same as pack_panels, rounded to int4.
inline void pack_panels(const float* weight, int64_t features, int64_t in, Int4Weights* packed) {
  const int64_t steps = steps_of<Int4Weights>(in);
  for_each_tile((features + kPanel - 1) / kPanel, [&](int64_t panel) {
    for (int64_t step = 0; step < steps; ++step) {
      Int4Weights& to = packed[panel * steps + step] = Int4Weights{};
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t feature = panel * kPanel + lane, first = step * kBlockInputs;
        if (feature >= features) continue;
        const int64_t count = std::min<int64_t>(kBlockInputs, in - first);
        const float* from = weight + feature * in + first;
        const Int4Scale scale = int4_scale(from, count);
        to.scales[lane] = scale.scale, to.minima[lane] = scale.minimum;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t place = i % (kBlockInputs / 2), half = i / (kBlockInputs / 2);
          to.levels[place / 4][lane][i % 4] |= uint8_t(scale.level(from[i]) << half * 4);
        }
      }
    }
  });
}

/// A row of x rounded to int8, block by block; the last one is padded with zeros.
inline void round_row(const float* x, int64_t in, Int8Inputs* to) {
  static_assert(kBlockInputs % kLanes == 0);
  constexpr int kVectors = kBlockInputs / kLanes;
  for (int64_t first = 0; first < in; first += kBlockInputs, ++to) {
    float padded[kBlockInputs] = {};
    const float* from = x + first;
    if (in - first < kBlockInputs) from = std::copy_n(from, in - first, padded) - (in - first);
    Floats values[kVectors], largest{}, zero{};
    UNROLL for (int v = 0; v < kVectors; ++v) {
      values[v] = load(from + v * kLanes);
      const Floats magnitude = (Floats)((Words)values[v] & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
      zero += values[v] * 0.0f;  // NaN where a value is not finite
    }
    float lanes[kLanes];
    store(lanes, largest);
    const float most = *std::max_element(lanes, lanes + kLanes);
    const bool finite = sum(zero) == 0.0f, nothing = !(most > 1e-30f) || !finite;
    const Floats shifter = splat(12582912.0f), factor = splat(nothing ? 0.0f : 127.0f / most);
    int32_t rounded[kBlockInputs], total = 0;
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const Floats scaled = nothing ? Floats{} : values[v] * factor;
      const Ints level = (Ints)(scaled + shifter) - (Ints)shifter;  // to the nearest integer
      std::memcpy(rounded + v * kLanes, &level, sizeof level);
    }
    for (int i = 0; i < kBlockInputs; ++i) {
      total += rounded[i];
      to->values[i] = int8_t(rounded[i]);
    }
    to->start = -kOffset * total;
    to->scale = finite ? (nothing ? 0.0f : most / 127) : std::numeric_limits<float>::quiet_NaN();
    to->sum = to->scale * float(total);
  }
}

/// x [rows, in] as the arithmetic reads it: [rows, depth] in its dtype, padded with zeros; the result is `x` or `room`.
template <typename To>
const To* as_inputs(const float* x, int64_t rows, int64_t in, int64_t depth, std::vector<To>& room) {
  if constexpr (std::is_same_v<To, float>)
    if (in == depth) return x;
  room.resize(rows * depth);
  To* to = room.data();  // inside the loop `room` may mean each thread's own
  const auto one_row = [=](int64_t row) {
    if constexpr (std::is_same_v<To, Int8Inputs>) {
      round_row(x + row * in, in, to + row * depth);
    } else {
      convert(x + row * in, to + row * depth, in);
      std::fill(to + row * depth + in, to + (row + 1) * depth, To{});
    }
  };
  if (rows < 16)
    for (int64_t row = 0; row < rows; ++row) one_row(row);
  else
    for_each_tile(rows, one_row);
  return to;
}

/// The formats of packed weights.
enum class Format { kFloat32, kBFloat16, kInt8, kInt4 };

/// A packed weight of `out` features; `bias` (float32, [out]) may be null.
struct Packed {
  const void* weight;
  Format format;
  const float* bias;
  int64_t in, out;
};

/// out [rows, features] = x [rows, in] times panels, which `multiply` does for some rows and panels in order.
template <typename X, typename Weight, typename Out, typename Multiply>
void multiply_all(const X* x, int64_t x_stride, const Packed& weight, Out* out, int64_t rows, int64_t rows_a_tile,
                  const Multiply& multiply_some) {
  const int64_t steps = steps_of<Weight>(weight.in), features = weight.out;
  const int64_t panels = (features + kPanel - 1) / kPanel, panels_a_tile = panels >= 64 ? 4 : 2;
  const int64_t columns = (panels + panels_a_tile - 1) / panels_a_tile;
  const auto one_tile = [&](int64_t tile) {
    const int64_t first_panel = tile % columns * panels_a_tile, first_row = tile / columns * rows_a_tile;
    const int64_t count = std::min(panels_a_tile, panels - first_panel);
    const int64_t tile_rows = std::min(rows_a_tile, rows - first_row), stride = count * kPanel;
    static thread_local std::vector<float> sums;
    sums.resize(tile_rows * stride);
    const Weight* weights = static_cast<const Weight*>(weight.weight) + first_panel * steps * kElements<Weight>;
    multiply_some(x + first_row * x_stride, x_stride, weights, steps, count, tile_rows, sums.data());
    const int64_t first = first_panel * kPanel, width = std::min(stride, features - first);
    for (int64_t r = 0; r < tile_rows; ++r) {
      float* row = sums.data() + r * stride;
      for (int64_t i = 0; weight.bias != nullptr && i < width; ++i) row[i] += weight.bias[first + i];
      convert(row, out + (first_row + r) * features + first, width);
    }
  };
  const int64_t tiles = columns * ((rows + rows_a_tile - 1) / rows_a_tile);
  if (rows * weight.in * features < 1 << 16) {  // less work than waking a thread
    for (int64_t tile = 0; tile < tiles; ++tile) one_tile(tile);
  } else {
    for_each_tile(tiles, one_tile);
  }
}

/// out [rows, out features] = x [rows, in] W^T + bias.
template <typename Out>
void packed_linear(const float* x, const Packed& weight, Out* out, int64_t rows) {
  static thread_local std::vector<float> floats;
  static thread_local std::vector<BFloat16> halves;
  static thread_local std::vector<Int8Inputs> integers;
  constexpr int64_t kTileRows = 48;
  if (weight.format == Format::kFloat32)
    return multiply_all<float, float>(x, weight.in, weight, out, rows, kTileRows, multiply_panels<float, float>);
  if (weight.format == Format::kInt8 || weight.format == Format::kInt4) {
    const int64_t blocks = steps_of<Int8Weights>(weight.in);
    const Int8Inputs* rounded = as_inputs(x, rows, weight.in, blocks, integers);
    if (weight.format == Format::kInt8)
      return multiply_all<Int8Inputs, Int8Weights>(rounded, blocks, weight, out, rows, kTileRows,
                                                   multiply_panels<Int8Inputs, Int8Weights>);
    return multiply_all<Int8Inputs, Int4Weights>(rounded, blocks, weight, out, rows, kTileRows,
                                                 multiply_panels<Int8Inputs, Int4Weights>);
  }
  const int64_t depth = steps_of<BFloat16>(weight.in) * kInputs<BFloat16>;
  const Arithmetic by = arithmetic().load();
#if defined(DRAFTSMITH_TILES)
  if (by == Arithmetic::kTiles)
    return multiply_all<BFloat16, BFloat16>(as_inputs(x, rows, weight.in, depth, halves), depth, weight, out, rows, 128,
                                            multiply_panels_by_tiles);
#endif
#if defined(DRAFTSMITH_PAIRS)
  if (by == Arithmetic::kPairs)
    return multiply_all<BFloat16, BFloat16>(as_inputs(x, rows, weight.in, depth, halves), depth, weight, out, rows,
                                            kTileRows, multiply_panels<BFloat16, BFloat16>);
#endif
  multiply_all<float, BFloat16>(as_inputs(x, rows, weight.in, depth, floats), depth, weight, out, rows, kTileRows,
                                multiply_panels<float, BFloat16>);
}

}  // namespace draftsmith
