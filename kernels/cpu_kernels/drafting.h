// Chains of drafts in one call: an EAGLE-3 head reads what the target has accepted, then its own drafts, step by step:
// layer, norm, LM head and the choice of a token, with nothing between the steps of a chain.
#pragma once

#include <vector>

#include "layers.h"
#include "noise.h"

namespace draftsmith {

constexpr int kConfidences = 16;  // equal parts of [0, 1], in which the largest probability of a step may lie

/// A head with its cache, and the embeddings of its target.
template <typename T>
struct ChainHead {
  Packed fc;  // of the target's auxiliary states; without a weight the states are its output
  LayerWeights layer;
  const float* norm;  // [hidden], after the layer
  bool norm_output;   // a step reads the normed state of the one before
  Packed lm_head;
  const int64_t* vocabulary;  // [lm_head.out] target ids
  const T* embedding;         // [ids, hidden]
  const float *cos, *sin;     // [positions, rotary]
  Attention<T> attention;     // but for segments, positions, q, k, v and out
  int64_t hidden, rotary;
  float eps;
};

/// What is drafted for one sequence.
struct ChainJob {
  int64_t length;             // the most tokens; 0: nothing, its accepted tokens are only read
  const int64_t* keys;        // [length, 2] of the noise that is added at each position, or null: none
  const int64_t* ids;         // that the noise is of, or null: the places in the draft vocabulary
  float inverse_temperature;  // of the head's probabilities; with noise, of the scores too
  float floor;                // the chain ends before the probability that all of it is accepted falls below this,
  const float* calibration;   // [kConfidences]: that of one token, by the part of its step's largest probability
};

/// Drafted tokens; entries behind a chain's end are not written.
struct ChainDrafts {
  int64_t* tokens;     // [sequences, longest] target ids
  float* confidences;  // [sequences, longest]: the largest probability, known before the choice
  float* logits;       // [sequences, longest, lm_head.out], or null
};

/// One pass of the layer over segments, in place: states [tokens, hidden], each with the embedding of ids[token].
template <typename T>
void read_tokens(const ChainHead<T>& head, const std::vector<Segment>& segments, const int64_t* ids, float* states) {
  static thread_local std::vector<float> embeds, turns;
  static thread_local std::vector<int64_t> positions;
  int64_t tokens = 0;
  for (const Segment& segment : segments) tokens += segment.count;
  const int64_t size = head.hidden, rotary = head.rotary;
  embeds.resize(tokens * size), turns.resize(2 * tokens * rotary), positions.resize(tokens);
  for (const Segment& segment : segments)
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t token = segment.start + i, position = segment.past + i;
      positions[token] = position;
      convert(head.embedding + ids[token] * size, embeds.data() + token * size, size);
      std::copy_n(head.cos + position * rotary, rotary, turns.data() + token * rotary);
      std::copy_n(head.sin + position * rotary, rotary, turns.data() + (tokens + token) * rotary);
    }
  Attention<T> attention = head.attention;
  attention.positions = positions.data();
  attention.segments = segments.data();
  attention.segment_count = int64_t(segments.size());
  const LayerShape shape{tokens, size, rotary, head.eps, turns.data(), turns.data() + tokens * rotary, embeds.data()};
  decoder_layer(shape, head.layer, attention, states);
  if (head.norm_output)
    for (int64_t token = 0; token < tokens; ++token)
      rms_norm(states + token * size, head.norm, head.eps, size, states + token * size);
}

/// The largest of n values at temperature 1 / inverse: its place, and its probability.
inline std::pair<int64_t, float> most_probable(const float* logits, int64_t n, float inverse) {
  const int64_t place = place_of_largest(logits, n);
  Floats sums{};
  float total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += exp((load(logits + i) - logits[place]) * inverse);
  for (; i < n; ++i) total += std::exp((logits[i] - logits[place]) * inverse);
  return {place, 1 / (total + sum(sums))};
}

/// Reads `states` of the segments' tokens (one segment a sequence, which may be empty; `ids`: the token after each),
/// then drafts. hidden [sequences, hidden]: the head's output at the last token read, in and out.
template <typename T>
void draft_chains(const ChainHead<T>& head, const std::vector<Segment>& segments, const float* states,
                  const int64_t* ids, float* hidden, const std::vector<ChainJob>& jobs, int64_t longest,
                  ChainDrafts drafts) {
  static thread_local std::vector<float> read, flowing, normed, logits;
  const int64_t sequences = int64_t(jobs.size()), size = head.hidden, vocabulary = head.lm_head.out;
  int64_t tokens = 0;
  for (const Segment& segment : segments) tokens += segment.count;
  if (tokens > 0) {
    read.resize(tokens * size);
    if (head.fc.weight != nullptr)
      packed_linear(states, head.fc, read.data(), tokens);
    else
      std::copy_n(states, tokens * size, read.data());
    read_tokens(head, segments, ids, read.data());
  }
  std::vector<int64_t> active, chosen;
  for (int64_t s = 0; s < sequences; ++s) {
    const Segment& segment = segments[s];
    if (segment.count > 0)
      std::copy_n(read.data() + (segment.start + segment.count - 1) * size, size, hidden + s * size);
    if (jobs[s].length > 0) active.push_back(s);
  }
  flowing.resize(sequences * size);
  for (size_t row = 0; row < active.size(); ++row)
    std::copy_n(hidden + active[row] * size, size, flowing.data() + row * size);

  std::vector<float> surviving(sequences, 1.0f);  // the estimated probability that all so far is accepted
  for (int64_t step = 0; !active.empty(); ++step) {
    const int64_t rows = int64_t(active.size());
    normed.assign(flowing.begin(), flowing.begin() + rows * size);
    for (int64_t row = 0; row < rows && !head.norm_output; ++row)
      rms_norm(normed.data() + row * size, head.norm, head.eps, size, normed.data() + row * size);
    multiply(normed.data(), head.lm_head, rows, logits);

    std::vector<Segment> own;
    std::vector<int64_t> going_on;
    chosen.clear();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t s = active[row], place = s * longest + step;
      const ChainJob& job = jobs[s];
      const float* scores = logits.data() + row * vocabulary;
      auto [token, confidence] = most_probable(scores, vocabulary, job.inverse_temperature);
      const int part = confidence > 0 ? std::min(int(confidence * kConfidences), kConfidences - 1) : 0;  // NaN: 0
      surviving[s] *= job.calibration[part];
      // known before this step's choice: under the rejection rule a drawn token must not decide whether it is drafted
      if (step > 0 && surviving[s] < job.floor) continue;
      if (job.keys != nullptr)
        token = noisy_choice(scores, job.ids, vocabulary, job.inverse_temperature,
                             uint64_t(job.keys[2 * step]), uint64_t(job.keys[2 * step + 1]));
      drafts.tokens[place] = head.vocabulary[token];
      drafts.confidences[place] = confidence;
      if (drafts.logits != nullptr) std::copy_n(scores, vocabulary, drafts.logits + place * vocabulary);
      if (step + 1 == job.length) continue;
      const int64_t observed = segments[s].past + segments[s].count, kept = int64_t(going_on.size());
      if (kept < row) std::copy_n(flowing.data() + row * size, size, flowing.data() + kept * size);
      own.push_back({segments[s].slot, observed, observed + step, kept, 1});
      chosen.push_back(head.vocabulary[token]);
      going_on.push_back(s);
    }
    active = going_on;
    if (!active.empty()) read_tokens(head, own, chosen.data(), flowing.data());
  }
}

}  // namespace draftsmith
