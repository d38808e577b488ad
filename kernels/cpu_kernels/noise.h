// The random numbers of serving/engine/noise.py, for drafting: a function of a position's keys and a token, by
// SplitMix64. The noise of 64 tokens is bounded by one number, so that few tokens of a large vocabulary need their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector.h"

namespace draftsmith {

constexpr int kGroupBits = 6;  // tokens of the same id >> kGroupBits share a bound

inline uint64_t random_bits(uint64_t key, uint64_t counter) {
  uint64_t x = key + (counter + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

/// Strictly between 0 and 1.
inline double unit(uint64_t bits) { return (double(bits >> 12) + 0.5) * 0x1p-52; }

/// The place of the largest logits[i] * inverse_temperature + Gumbel noise of token ids[i], or of token i where ids is
/// null; shared, single: the keys of the position, for groups and for single tokens.
inline int64_t noisy_choice(const float* logits, const int64_t* ids, int64_t n, float inverse_temperature,
                            uint64_t shared, uint64_t single) {
  struct Group {
    int64_t first, last, winner;  // places, and the member whose noise is the bound
    double least, bound;          // the least exponential among the members; what a score can reach
  };
  static thread_local std::vector<Group> groups;
  groups.clear();
  const double highest = logits[place_of_largest(logits, n)];  // 0 from here on: a tiny temperature must not hide noise
  const auto id = [=](int64_t i) { return ids == nullptr ? i : ids[i]; };
  for (int64_t first = 0, last; first < n; first = last) {
    const int64_t group = id(first) >> kGroupBits;
    float largest = -std::numeric_limits<float>::infinity();
    for (last = first; last < n && id(last) >> kGroupBits == group; ++last)
      largest = logits[last] > largest ? logits[last] : largest;
    const uint64_t bits = random_bits(shared, uint64_t(group));
    const double least = -std::log(unit(bits)) / (1 << kGroupBits);
    groups.push_back({first, last, int64_t(bits & ((1 << kGroupBits) - 1)), least,
                      (largest - highest) * inverse_temperature - std::log(least)});
  }
  int64_t best = 0;
  double most = -std::numeric_limits<double>::infinity();
  const auto look_at = [&](const Group& group) {
    const double ceiling = -std::log(group.least);
    for (int64_t i = group.first; i < group.last; ++i) {
      const double score = (logits[i] - highest) * inverse_temperature;
      if (score + ceiling < most) continue;
      const bool wins = (id(i) & ((1 << kGroupBits) - 1)) == group.winner;
      const double excess = wins ? 0.0 : -std::log(unit(random_bits(single, uint64_t(id(i)))));
      const double noisy = score - std::log(excess + group.least);
      if (noisy > most) most = noisy, best = i;
    }
  };
  const auto promising = [](const Group& a, const Group& b) { return a.bound < b.bound; };
  if (n > 0) look_at(*std::max_element(groups.begin(), groups.end(), promising));
  for (const Group& group : groups)
    if (group.bound >= most) look_at(group);
  return best;
}

}  // namespace draftsmith
