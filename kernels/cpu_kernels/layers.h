// All decoder layers of a pre-norm transformer with rotary positions and a gated MLP, in one call: the residual stream
// stays in float32 from the first layer to the last, and nothing but the work itself happens between two products.
#pragma once

#include <vector>

#include "attention.h"
#include "linear.h"

namespace draftsmith {

/// Weights of one layer. Norm weights are float32; q_norm and k_norm [head width] may be null.
struct LayerWeights {
  const float* input_norm;
  const float* embed_norm;  // null, or attention reads cat(norm(embeddings), norm(hidden))
  Packed qkv;            // queries, keys and values together
  const float *q_norm, *k_norm;
  Packed o;
  const float* post_norm;
  Packed gate_up;  // gates, then what they gate
  Packed down;
};

/// What all layers share.
struct LayerShape {
  int64_t tokens, hidden, rotary;  // rotary: features of a head that turn, the first ones
  float eps;
  const float *cos, *sin;  // [tokens, rotary]
  const float* embeds;     // [tokens, hidden], or null
};

/// sum(x^2) in one fixed order.
inline float sum_of_squares(const float* x, int64_t size) {
  Floats sums{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats value = load(x + i);
    sums = fma(value, value, sums);
  }
  float total = sum(sums);
  for (; i < size; ++i) total += x[i] * x[i];
  return total;
}

/// to = x / sqrt(mean(x^2) + eps) * weight; `to` may be x.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* to) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, size) / float(size) + eps);
  for (int64_t i = 0; i < size; ++i) to[i] = x[i] * scale * weight[i];
}

/// Rotates the first `rotary` features of one head: pairs lie rotary / 2 apart.
inline void rotate(float* x, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    x[i] = low * cos[i] - high * sin[i];
    x[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

/// gate = silu(gate) * up.
inline void gate_by_silu(float* gate, const float* up, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats value = load(gate + i);
    store(gate + i, value / (exp(-value) + 1.0f) * load(up + i));
  }
  if (i == size) return;
  float rest[2][kLanes] = {};
  std::copy_n(gate + i, size - i, rest[0]);
  std::copy_n(up + i, size - i, rest[1]);
  const Floats value = load(rest[0]);
  store(rest[0], value / (exp(-value) + 1.0f) * load(rest[1]));
  std::copy_n(rest[0], size - i, gate + i);
}

/// body(token) for each token; several threads when there is work for them.
template <typename Body>
void for_each_token(int64_t tokens, const Body& body) {
  if (tokens < 16) {
    for (int64_t token = 0; token < tokens; ++token) body(token);
  } else {
    for_each_tile(tokens, body);
  }
}

/// Buffers of a pass; they only grow.
struct Activations {
  std::vector<float> normed, projected, mixed, gated;
};

/// out [tokens, weight.out] = x [tokens, weight.in] through a packed weight.
inline void multiply(const float* x, const Packed& weight, int64_t tokens, std::vector<float>& out) {
  out.resize(tokens * weight.out);
  packed_linear(x, weight, out.data(), tokens);
}

/// One layer, in place: hidden [tokens, hidden]. `attention` has everything but q, k, v and out, which it is given
/// here.
template <typename T>
void decoder_layer(const LayerShape& shape, const LayerWeights& weights, Attention<T> attention, float* hidden) {
  static thread_local Activations buffers;
  // a copy of the name: inside the loops below the name would mean each thread's own
  Activations& a = buffers;
  const int64_t size = shape.hidden, tokens = shape.tokens;
  const int64_t queries = attention.query_heads * attention.width, keys = attention.key_heads * attention.width;
  const int64_t values = attention.key_heads * attention.value_width;
  const int64_t attended = attention.query_heads * attention.value_width;

  const int64_t width = weights.qkv.in;
  a.normed.resize(tokens * std::max(width, size));
  for_each_token(tokens, [&](int64_t token) {
    float* to = a.normed.data() + token * width;
    if (weights.embed_norm != nullptr) {
      rms_norm(shape.embeds + token * size, weights.embed_norm, shape.eps, size, to);
      to += size;
    }
    rms_norm(hidden + token * size, weights.input_norm, shape.eps, size, to);
  });
  multiply(a.normed.data(), weights.qkv, tokens, a.projected);

  // rotated heads in the cache's dtype, over the place that the norm's result had: [token][queries, keys, values]
  const int64_t row = queries + keys + values;
  static thread_local std::vector<T> turned_buffer;
  std::vector<T>& turned = turned_buffer;
  turned.resize(tokens * (row + attended));
  T* mixed = turned.data() + tokens * row;
  for_each_token(tokens, [&](int64_t token) {
    float* from = a.projected.data() + token * row;
    const int64_t heads = attention.query_heads + attention.key_heads;
    for (int64_t head = 0; head < heads; ++head) {
      float* one = from + head * attention.width;
      const float* norm = head < attention.query_heads ? weights.q_norm : weights.k_norm;
      if (norm != nullptr) rms_norm(one, norm, shape.eps, attention.width, one);
      rotate(one, shape.cos + token * shape.rotary, shape.sin + token * shape.rotary, shape.rotary);
    }
    convert(from, turned.data() + token * row, row);
  });
  attention.q = {turned.data(), attention.width, row};
  attention.k = {turned.data() + queries, attention.width, row};
  attention.v = {turned.data() + queries + keys, attention.value_width, row};
  attention.out = mixed;
  std::fill(mixed, mixed + tokens * attended, T{});  // of tokens that no segment names
  slot_attention(attention);
  a.mixed.resize(tokens * attended);
  convert(mixed, a.mixed.data(), tokens * attended);

  multiply(a.mixed.data(), weights.o, tokens, a.projected);
  for_each_token(tokens, [&](int64_t token) {
    float* to = hidden + token * size;
    for (int64_t i = 0; i < size; ++i) to[i] += a.projected[token * size + i];
    rms_norm(to, weights.post_norm, shape.eps, size, a.normed.data() + token * size);
  });
  multiply(a.normed.data(), weights.gate_up, tokens, a.gated);
  const int64_t inner = weights.down.in;
  a.mixed.resize(tokens * inner);
  for_each_token(tokens, [&](int64_t token) {
    float* gate = a.gated.data() + token * 2 * inner;
    gate_by_silu(gate, gate + inner, inner);
    std::copy_n(gate, inner, a.mixed.data() + token * inner);
  });
  multiply(a.mixed.data(), weights.down, tokens, a.projected);
  for_each_token(tokens, [&](int64_t token) {
    for (int64_t i = 0; i < size; ++i) hidden[token * size + i] += a.projected[token * size + i];
  });
}

}  // namespace draftsmith
