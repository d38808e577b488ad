// Attention of ragged rows over a key-value cache in blocks: a slot's entries lie in the blocks that its row of a table
// names, kBlock in each. The loops run over whole blocks, in which the keys of a head lie one after the other.
//
// Softmax takes two passes (all scores of a row, their maximum, then weights), and weights times values is one chain of
// multiply-adds over the keys in order. A masked key adds exactly nothing, so a token's result depends on the visible
// keys and their order alone, bit for bit: not on tiles, nor on the tokens beside it, nor on gaps that a tree leaves.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "vector.h"

namespace draftsmith {

constexpr int kBlock = 16;  // entries of a block

/// A [heads, tokens or places, features] array whose last stride is 1.
template <typename T>
struct Strided {
  T* data;
  int64_t head, entry;  // strides
  T* at(int64_t h, int64_t e) const { return data + h * head + e * entry; }
};

struct Segment {
  int64_t slot, base, past, start, count;
};

template <typename T>
struct Attention {
  Strided<const T> q, k, v;        // [heads, tokens, features]
  Strided<T> k_cache, v_cache;     // [key heads, blocks * kBlock places, features]
  const int64_t* blocks;           // [slots, blocks_a_slot]: where the entries of a slot are, kBlock in each
  int64_t blocks_a_slot;
  const int64_t* positions;        // [tokens]
  const Segment* segments;         // [segment_count]
  const uint8_t* mask;             // [tokens, mask_width], or null: causal
  T* out;                          // [tokens, query heads, value width]
  int64_t segment_count, mask_width, query_heads, key_heads, width, value_width, window;
  float scale, softcap;
};

constexpr int kRowsATile = 12;   // query rows (token, head) that share one reading of the keys
constexpr int kKeysATile = 128;  // keys whose values stay in the L1 cache while those rows pass
constexpr int kRowsAStep = 3, kKeysAStep = 4, kVectorsAStep = 4;  // 12 sums in registers

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/// The sums over the lanes of four vectors, each in one fixed order: neighbours, pairs, fours, ...
inline void sum_lanes(const Floats (&values)[4], float* to) {
#if defined(__AVX2__)
  __m256 folded[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m512 value = (__m512)values[i];
    folded[i] = _mm256_add_ps(_mm512_castps512_ps256(value),
                              _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1)));
#else
    folded[i] = (__m256)values[i];
#endif
  }
  const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(folded[0], folded[1]), _mm256_hadd_ps(folded[2], folded[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    float lanes[kLanes];
    store(lanes, values[i]);
    for (int step = 1; step < kLanes; step *= 2)
      for (int lane = 0; lane < kLanes; lane += 2 * step) lanes[lane] += lanes[lane + step];
    to[i] = lanes[0];
  }
#endif
}

/// scores[row][0..4) = q[row] . keys[0..4), over `width` features (a multiple of kLanes).
template <int Rows, typename T>
inline void dot_products(const float* q, const T* const (&keys)[kKeysAStep], int64_t width, float* scores,
                         int64_t stride) {
  Floats sums[Rows][kKeysAStep] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Floats query[Rows];
    UNROLL for (int r = 0; r < Rows; ++r) query[r] = in_register(load(q + r * width + d));
    UNROLL for (int i = 0; i < kKeysAStep; ++i) {
      const Floats key = in_register(load(keys[i] + d));
      UNROLL for (int r = 0; r < Rows; ++r) sums[r][i] = fma(query[r], key, sums[r][i]);
    }
  }
  UNROLL for (int r = 0; r < Rows; ++r) sum_lanes(sums[r], scores + r * stride);
}

/// Keys or values of a tile, whose width is a multiple of kLanes: block by block, rows `stride` apart.
template <typename T>
struct Entries {
  const T* blocks[kKeysATile / kBlock];
  int64_t stride;
};

/// out[row][0..Vectors * kLanes) += weights[row][key] * values[key], key after key; from feature `column` of the
/// values.
template <int Rows, int Vectors, typename T>
inline void add_values(const float* weights, int64_t weight_stride, const Entries<T>& values, int64_t column, int64_t keys,
                       float* out, int64_t out_stride) {
  Floats sums[Rows][Vectors];
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int c = 0; c < Vectors; ++c) sums[r][c] = load(out + r * out_stride + c * kLanes);
  for (int64_t first = 0; first < keys; first += kBlock) {
    const T* from = values.blocks[first / kBlock] + column;
    const int64_t last = std::min(first + kBlock, keys);
    for (int64_t key = first; key < last; ++key, from += values.stride) {
      UNROLL for (int c = 0; c < Vectors; ++c) {
        const Floats value = in_register(load(from + c * kLanes));
        UNROLL for (int r = 0; r < Rows; ++r)
          sums[r][c] = fma(splat(weights[r * weight_stride + key]), value, sums[r][c]);
      }
    }
  }
  UNROLL for (int r = 0; r < Rows; ++r)
    UNROLL for (int c = 0; c < Vectors; ++c) store(out + r * out_stride + c * kLanes, sums[r][c]);
}

/// f(constant Rows) for each group of at most kRowsAStep among `rows` rows: f(first row, integral_constant).
template <typename Body>
inline void for_row_groups(int rows, Body&& body) {
  int row = 0;
  for (; row + 3 <= rows; row += 3) body(row, std::integral_constant<int, 3>());
  if (rows - row == 2) body(row, std::integral_constant<int, 2>());
  if (rows - row == 1) body(row, std::integral_constant<int, 1>());
}

/// Scratch of one thread; it only grows.
struct Scratch {
  std::vector<float> queries, scores, out, block;
};

/// body(Entries) for the first `count` entries (at most kKeysATile) of the blocks: where they lie, or as floats in
/// `scratch`, padded where `width` is no multiple of kLanes. Floats save work where several groups of rows read them.
template <typename T, typename Body>
void with_entries(const Strided<T>& cache, int64_t head, const int64_t* blocks, int64_t count, int64_t width, int rows,
                  std::vector<float>& scratch, const Body& body) {
  const int64_t padded = round_up(width, kLanes);
  const auto place = [&](int64_t first) { return cache.at(head, blocks[first / kBlock] * kBlock); };
  if (padded == width && (std::is_same_v<T, float> || rows <= kRowsAStep)) {
    Entries<T> entries{{}, cache.entry};
    for (int64_t first = 0; first < count; first += kBlock) entries.blocks[first / kBlock] = place(first);
    return body(entries);
  }
  Entries<float> entries{{}, padded};
  scratch.resize(std::max<int64_t>(scratch.size(), kKeysATile * padded));
  if (padded != width) std::fill(scratch.begin(), scratch.end(), 0.0f);
  for (int64_t first = 0; first < count; first += kBlock) {
    float* to = scratch.data() + first * padded;
    entries.blocks[first / kBlock] = to;
    for (int64_t i = 0; i < std::min<int64_t>(kBlock, count - first); ++i)
      convert(place(first) + i * cache.entry, to + i * padded, width);
  }
  body(entries);
}

/// Which keys query row `token` of a segment sees, besides the mask: [first, last).
struct Range {
  int64_t first, last;
};

template <typename T>
Range visible_keys(const Attention<T>& a, const Segment& segment, int64_t token) {
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, a.positions[segment.start + token] - a.window + 1) : 0;
  if (a.mask == nullptr) return {first, segment.past + token + 1};
  return {std::min(first, segment.base), segment.past + segment.count};  // the mask already has the window
}

/// Scores to unnormalised weights, in place, for one query row; returns their sum over the keys in order.
template <typename T>
void weigh(const Attention<T>& a, const Segment& segment, int64_t token, Range tile, float* scores, int64_t stride) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Range visible = visible_keys(a, segment, token);
  if (a.softcap > 0)
    for (int64_t i = 0; i < stride; i += kLanes) {
      const Floats doubled = exp(load(scores + i) * (2 * a.scale / a.softcap));
      store(scores + i, (1.0f - 2.0f / (doubled + 1.0f)) * a.softcap);
    }
  else
    for (int64_t i = 0; i < stride; i += kLanes) store(scores + i, load(scores + i) * a.scale);
  std::fill(scores, scores + std::max<int64_t>(0, visible.first - tile.first), -infinity);
  std::fill(scores + (visible.last - tile.first), scores + stride, -infinity);
  if (a.mask != nullptr) {
    const uint8_t* row = a.mask + (segment.start + token) * a.mask_width;
    for (int64_t key = segment.base; key < visible.last; ++key)
      if (!row[key - segment.base]) scores[key - tile.first] = -infinity;
  }
  Floats largest = splat(-infinity);
  for (int64_t i = 0; i < stride; i += kLanes) {
    const Floats value = load(scores + i);
    largest = (value > largest) ? value : largest;
  }
  float lanes[kLanes];
  store(lanes, largest);
  const Floats maximum = splat(*std::max_element(lanes, lanes + kLanes));
  for (int64_t i = 0; i < stride; i += kLanes) store(scores + i, exp(load(scores + i) - maximum));
}

/// Attention of `rows` query rows of one segment that share a key head; row = token * group + head in the group.
template <typename T>
void attend(const Attention<T>& a, const Segment& segment, int64_t head, int64_t first_row, int rows) {
  static thread_local Scratch scratch;
  const int64_t group = a.query_heads / a.key_heads;
  const int64_t width = round_up(a.width, kLanes), value_width = round_up(a.value_width, kLanes);

  Range tile{std::numeric_limits<int64_t>::max(), 0};
  scratch.queries.assign(kRowsATile * width, 0.0f);
  for (int r = 0; r < rows; ++r) {
    const int64_t token = (first_row + r) / group, query_head = head * group + (first_row + r) % group;
    const Range range = visible_keys(a, segment, token);
    tile = {std::min(tile.first, range.first), std::max(tile.last, range.last)};
    convert(a.q.at(query_head, segment.start + token), scratch.queries.data() + r * width, a.width);
  }
  tile.first = tile.first / kBlock * kBlock;  // keys before the first that is seen get no weight
  const int64_t* blocks = a.blocks + segment.slot * a.blocks_a_slot + tile.first / kBlock;
  const int64_t keys = tile.last - tile.first, stride = round_up(keys, kLanes);
  scratch.scores.resize(kRowsATile * stride);
  float* scores = scratch.scores.data();

  for (int64_t from = 0; from < keys; from += kKeysATile) {
    const int64_t count = std::min<int64_t>(kKeysATile, keys - from);
    with_entries(a.k_cache, head, blocks + from / kBlock, count, a.width, rows, scratch.block, [&](auto& entries) {
      for_row_groups(rows, [&](int r, auto together) {
        for (int64_t first = 0; first < count; first += kBlock) {
          const auto* start = entries.blocks[first / kBlock];
          const int64_t here = std::min<int64_t>(kBlock, count - first);
          for (int64_t i = 0; i < here; i += kKeysAStep) {
            decltype(start) some[kKeysAStep];
            for (int j = 0; j < kKeysAStep; ++j) some[j] = start + std::min(i + j, here - 1) * entries.stride;
            dot_products<decltype(together)::value>(scratch.queries.data() + r * width, some, width,
                                                    scores + r * stride + from + first + i, stride);
          }
        }
      });
    });
  }
  for (int r = 0; r < rows; ++r) weigh(a, segment, (first_row + r) / group, tile, scores + r * stride, stride);

  float totals[kRowsATile] = {};
  for_row_groups(rows, [&](int r, auto together) {
    constexpr int kRows = decltype(together)::value;
    float sums[kRows] = {};
    for (int64_t key = 0; key < keys; ++key)
      UNROLL for (int i = 0; i < kRows; ++i) sums[i] += scores[(r + i) * stride + key];
    std::copy_n(sums, kRows, totals + r);
  });

  scratch.out.assign(kRowsATile * value_width, 0.0f);
  for (int64_t from = 0; from < keys; from += kKeysATile) {
    const int64_t count = std::min<int64_t>(kKeysATile, keys - from);
    with_entries(a.v_cache, head, blocks + from / kBlock, count, a.value_width, rows, scratch.block, [&](auto& entries) {
      for_row_groups(rows, [&](int r, auto together) {
        constexpr int kRows = decltype(together)::value;
        const float* weights = scores + r * stride + from;
        float* out = scratch.out.data() + r * value_width;
        int64_t d = 0;
        for (; d + kVectorsAStep * kLanes <= value_width; d += kVectorsAStep * kLanes)
          add_values<kRows, kVectorsAStep>(weights, stride, entries, d, count, out + d, value_width);
        for (; d < value_width; d += kLanes)
          add_values<kRows, 1>(weights, stride, entries, d, count, out + d, value_width);
      });
    });
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t token = (first_row + r) / group, query_head = head * group + (first_row + r) % group;
    float* out = scratch.out.data() + r * value_width;
    for (int64_t d = 0; d < value_width; d += kLanes) store(out + d, load(out + d) / totals[r]);
    convert(out, a.out + ((segment.start + token) * a.query_heads + query_head) * a.value_width, a.value_width);
  }
}

/// Keys and values of the segments' tokens into their places.
template <typename T>
void write_cache(const Attention<T>& a) {
  for (const Segment* segment = a.segments; segment < a.segments + a.segment_count; ++segment)
    for (int64_t head = 0; head < a.key_heads; ++head)
      for (int64_t i = 0; i < segment->count; ++i) {
        const int64_t token = segment->start + i, entry = segment->past + i;
        const int64_t block = a.blocks[segment->slot * a.blocks_a_slot + entry / kBlock];
        const int64_t place = block * kBlock + entry % kBlock;
        std::copy_n(a.k.at(head, token), a.width, a.k_cache.at(head, place));
        std::copy_n(a.v.at(head, token), a.value_width, a.v_cache.at(head, place));
      }
}

template <typename T>
void slot_attention(const Attention<T>& a) {
  struct Tile {
    const Segment* segment;
    int64_t head, first_row;
    int rows;
  };
  write_cache(a);
  std::vector<Tile> tiles;
  int64_t work = 0;
  for (const Segment* segment = a.segments; segment < a.segments + a.segment_count; ++segment) {
    const int64_t rows = segment->count * (a.query_heads / a.key_heads);
    work += rows * a.key_heads * (segment->past + segment->count) * (a.width + a.value_width);
    for (int64_t head = 0; head < a.key_heads; ++head)
      for (int64_t row = 0; row < rows; row += kRowsATile)
        tiles.push_back({segment, head, row, int(std::min<int64_t>(kRowsATile, rows - row))});
  }
  const auto one_tile = [&](int64_t i) {
    attend(a, *tiles[i].segment, tiles[i].head, tiles[i].first_row, tiles[i].rows);
  };
  if (work < 1 << 17) {  // less work than waking a thread
    for (size_t i = 0; i < tiles.size(); ++i) one_tile(i);
  } else {
    for_each_tile(tiles.size(), one_tile);
  }
}

}  // namespace draftsmith
