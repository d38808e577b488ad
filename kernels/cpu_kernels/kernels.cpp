// The operators as PyTorch sees them: checks, strides and dtypes; the work is in the headers.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "drafting.h"
#include "layers.h"
#include "linear.h"

namespace draftsmith {
namespace {

template <typename T>
const T* const_data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

/// body(T{}) with the element type of `dtype`.
template <typename Body>
void with_type(at::ScalarType dtype, const char* what, Body&& body) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, what, " must be float32 or bfloat16, not ", dtype);
  if (dtype == at::kFloat)
    body(float{});
  else
    body(BFloat16{});
}

/// Memory for weights, which are read once a step, in order: large pages save most of the address translation.
at::Tensor weight_memory(int64_t bytes) {
  constexpr int64_t page = 1 << 21;
  if (bytes < page) return at::empty({bytes}, at::kByte);
  const at::Tensor memory = at::empty({bytes + 2 * page}, at::kByte);  // what lies around the pages is never touched
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data_ptr()), first = (begin + page - 1) / page * page;
#if defined(__linux__)
  madvise(reinterpret_cast<void*>(first), (bytes + page - 1) / page * page, MADV_HUGEPAGE);
#endif
  return memory.narrow(0, int64_t(first - begin), bytes);
}

/// The packed form: [panels, steps, elements of a step], or bytes of a block of integers.
template <typename Weight, typename From>
at::Tensor pack_as(const at::Tensor& rows) {
  const int64_t features = rows.size(0), in = rows.size(1);
  const int64_t panels = (features + kPanel - 1) / kPanel, step = kElements<Weight> * sizeof(Weight);
  const at::Tensor packed = weight_memory(panels * steps_of<Weight>(in) * step);
  pack_panels(const_data<From>(rows), features, in, static_cast<Weight*>(packed.data_ptr()));
  const at::ScalarType dtype = kBlocked<Weight> ? at::kByte : rows.scalar_type();
  return packed.view({panels, steps_of<Weight>(in), step}).view(dtype);
}

at::Tensor pack(const at::Tensor& weight, int64_t bits) {
  TORCH_CHECK(weight.dim() == 2, "pack takes a weight [out, in], not ", weight.dim(), " dimensions");
  TORCH_CHECK(bits == 0 || bits == 4 || bits == 8, "pack rounds to 4 or 8 bits, not ", bits);
  const at::Tensor rows = weight.contiguous();
  at::Tensor packed;
  with_type(rows.scalar_type(), "the weight", [&](auto kind) {
    using T = decltype(kind);
    packed = bits == 8   ? pack_as<Int8Weights, float>(rows.to(at::kFloat))
             : bits == 4 ? pack_as<Int4Weights, float>(rows.to(at::kFloat))
                         : pack_as<T, T>(rows);
  });
  return packed;
}

/// The weight that `packed` is, for `in` and `out` features; `bias` may be undefined or empty.
Packed packed_weight(const at::Tensor& packed, const at::Tensor& bias, int64_t in, int64_t out, const char* what) {
  const at::ScalarType dtype = packed.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kByte, what,
              ": a packed weight is float32, bfloat16 or integers in bytes, not ", dtype);
  const bool four = packed.size(-1) == int64_t(sizeof(Int4Weights));
  const Format format = dtype == at::kFloat      ? Format::kFloat32
                        : dtype == at::kBFloat16 ? Format::kBFloat16
                        : four                   ? Format::kInt4
                                                 : Format::kInt8;
  const auto shape = [in](auto kind) {
    using Weight = decltype(kind);
    return std::pair(steps_of<Weight>(in), int64_t(kBlocked<Weight> ? sizeof(Weight) : kElements<Weight>));
  };
  const auto [steps, step] = format == Format::kFloat32    ? shape(float{})
                             : format == Format::kBFloat16 ? shape(BFloat16{})
                             : format == Format::kInt4     ? shape(Int4Weights{})
                                                           : shape(Int8Weights{});
  TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.size(0) == (out + kPanel - 1) / kPanel &&
                  packed.size(1) == steps && packed.size(2) == step,
              what, ": x ends in ", in, " features, and a weight of shape ", packed.sizes(), " was not packed for ", in,
              " and ", out, " features on this machine");
  const bool biased = bias.defined() && bias.numel() > 0;
  TORCH_CHECK(!biased || (bias.numel() == out && bias.scalar_type() == at::kFloat && bias.is_contiguous()), what,
              ": the bias is not of ", out, " features");
  return {packed.const_data_ptr(), format, biased ? const_data<float>(bias) : nullptr, in, out};
}

at::Tensor packed_linear_op(const at::Tensor& x, const at::Tensor& packed, int64_t features,
                            const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.dim() > 0, "packed_linear: x has no dimensions");
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const Packed weight = packed_weight(packed, added, x.size(-1), features, "packed_linear");
  auto shape = x.sizes().vec();
  shape.back() = features;
  at::Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  const at::Tensor input = x.to(at::kFloat).contiguous();
  with_type(x.scalar_type(), "x", [&](auto kind) {
    auto* to = static_cast<decltype(kind)*>(out.data_ptr());
    packed_linear(const_data<float>(input), weight, to, out.numel() / features);
  });
  return out;
}

template <typename T>
Strided<T> strided(const at::Tensor& tensor) {
  return {static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(-3), tensor.stride(-2)};
}

at::Tensor rows_in_memory(const at::Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

/// Checks segments, and that the blocks which they need are reserved: a slot's blocks, then -1 to the row's end.
void check_segments(const Segment* segments, int64_t count, const at::Tensor& blocks, const at::Tensor& cache,
                    int64_t tokens, int64_t mask_width, bool masked) {
  TORCH_CHECK(blocks.scalar_type() == at::kLong && blocks.dim() == 2 && blocks.is_contiguous(),
              "slot_attention: the blocks are int64 [slots, blocks of a slot]");
  const int64_t slots = blocks.size(0), columns = blocks.size(1), all = cache.size(-2) / kBlock;
  for (const Segment* s = segments; s < segments + count; ++s) {
    if (s->count == 0) continue;
    TORCH_CHECK(s->count > 0 && s->start >= 0 && s->start + s->count <= tokens && s->slot >= 0 && s->slot < slots &&
                    s->base >= 0 && s->base <= s->past && s->past + s->count <= columns * kBlock,
                "slot_attention: segment (slot ", s->slot, ", base ", s->base, ", past ", s->past, ", start ", s->start,
                ", count ", s->count, ") does not fit ", slots, " slots of ", columns * kBlock, " entries and ",
                tokens, " tokens");
    const int64_t last = const_data<int64_t>(blocks)[s->slot * columns + (s->past + s->count - 1) / kBlock];
    TORCH_CHECK(last >= 0 && last < all, "slot_attention: slot ", s->slot, " has no block for entry ",
                s->past + s->count - 1);
    TORCH_CHECK(!masked || s->past + s->count - s->base <= mask_width, "slot_attention: a mask of ", mask_width,
                " columns is narrower than a segment's ", s->past + s->count - s->base, " keys");
  }
}

at::Tensor slot_attention_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache,
                             at::Tensor v_cache, const at::Tensor& blocks, const at::Tensor& positions,
                             const at::Tensor& segments, const at::Tensor& mask, double scale, int64_t window,
                             double softcap) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k_cache.dim() == 3 && v_cache.dim() == 3,
              "slot_attention: q, k and v have 4 dimensions, the cache has 3");
  const int64_t heads = q.size(1), tokens = q.size(2), key_heads = k.size(1);
  TORCH_CHECK(q.size(0) == 1 && k.size(2) == tokens && v.size(2) == tokens && v.size(1) == key_heads &&
                  heads % key_heads == 0 && k.size(3) == q.size(3) && positions.numel() == tokens,
              "slot_attention: shapes of q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK(k_cache.size(0) == key_heads && v_cache.size(0) == key_heads && k_cache.size(2) == k.size(3) &&
                  v_cache.size(2) == v.size(3) && k_cache.size(1) == v_cache.size(1) && k_cache.stride(2) == 1 &&
                  v_cache.stride(2) == 1,
              "slot_attention: caches ", k_cache.sizes(), " and ", v_cache.sizes(), " do not fit the keys and values");
  for (const at::ScalarType dtype : {k.scalar_type(), v.scalar_type(), k_cache.scalar_type(), v_cache.scalar_type()})
    TORCH_CHECK(dtype == q.scalar_type(), "slot_attention: q, k, v and the cache share one dtype");
  TORCH_CHECK(positions.scalar_type() == at::kLong && segments.scalar_type() == at::kLong && segments.dim() == 2 &&
                  segments.size(1) == 5,
              "slot_attention: positions and segments [n, 5] are int64");
  const bool masked = mask.numel() > 0;
  TORCH_CHECK(!masked || (mask.scalar_type() == at::kBool && mask.dim() == 2 && mask.size(0) == tokens),
              "slot_attention: the mask is bool [tokens, keys]");

  const at::Tensor rows = segments.contiguous(), where = positions.contiguous(), seen = mask.contiguous();
  const at::Tensor queries = rows_in_memory(q), keys = rows_in_memory(k), values = rows_in_memory(v);
  const auto* first = reinterpret_cast<const Segment*>(const_data<int64_t>(rows));
  const int64_t mask_width = masked ? mask.size(1) : 0;
  check_segments(first, rows.size(0), blocks, k_cache, tokens, mask_width, masked);
  // zeros, because padding tokens that no segment names must stay finite
  at::Tensor out = at::zeros({1, tokens, heads, v.size(3)}, q.options());
  with_type(q.scalar_type(), "q", [&](auto kind) {
    using T = decltype(kind);
    slot_attention(Attention<T>{
        strided<const T>(queries), strided<const T>(keys), strided<const T>(values), strided<T>(k_cache),
        strided<T>(v_cache), const_data<int64_t>(blocks), blocks.size(1), const_data<int64_t>(where), first,
        masked ? const_data<uint8_t>(seen) : nullptr,
        static_cast<T*>(out.data_ptr()), rows.size(0), mask_width, heads, key_heads, q.size(3), v.size(3), window,
        float(scale), float(softcap)});
  });
  return out;
}

/// Places in `weights` of a layer's tensors; one that a layer does not have is empty.
enum {
  kInputNorm, kEmbedNorm, kQkv, kQkvBias, kQNorm, kKNorm, kO, kOBias, kPostNorm, kGateUp, kGateUpBias, kDown, kDownBias,
  kTensorsALayer
};

const float* norm_weight(const at::Tensor& weight, int64_t size) {
  TORCH_CHECK(weight.numel() == 0 || (weight.numel() == size && weight.scalar_type() == at::kFloat),
              "decoder_layers: a norm has ", weight.numel(), " weights for ", size, " features");
  return weight.numel() ? const_data<float>(weight) : nullptr;
}

LayerWeights layer_weights(const at::Tensor* own, int64_t size, int64_t heads, int64_t key_heads, int64_t width,
                           int64_t value_width) {
  const int64_t inner = own[kGateUp].size(0) * kPanel / 2, entering = own[kEmbedNorm].numel() ? 2 * size : size;
  const auto packed = [&](int place, int64_t in, int64_t out) {
    return packed_weight(own[place], own[place + 1], in, out, "decoder_layers");
  };
  return {norm_weight(own[kInputNorm], size), norm_weight(own[kEmbedNorm], size),
          packed(kQkv, entering, heads * width + key_heads * (width + value_width)), norm_weight(own[kQNorm], width),
          norm_weight(own[kKNorm], width), packed(kO, heads * value_width, size), norm_weight(own[kPostNorm], size),
          packed(kGateUp, size, 2 * inner), packed(kDown, inner, size)};
}

/// hidden [1, N, H] through all layers -> [1 + captured, N, H] float32: what comes out of the last layer, and what
/// enters the captured ones, in their order. One entry a layer in windows and masks; `cos` and `sin` are [N, rotary].
at::Tensor decoder_layers_op(const at::Tensor& hidden, const at::Tensor& embeds, const at::Tensor& cos,
                             const at::Tensor& sin, at::TensorList weights, at::TensorList k_cache,
                             at::TensorList v_cache, const at::Tensor& blocks, const at::Tensor& positions,
                             const at::Tensor& segments, at::TensorList masks, at::IntArrayRef windows,
                             at::IntArrayRef captured, int64_t heads, double eps, double scale, double softcap) {
  const int64_t layers = k_cache.size(), tokens = hidden.size(-2), size = hidden.size(-1);
  TORCH_CHECK(int64_t(weights.size()) == layers * kTensorsALayer && int64_t(v_cache.size()) == layers &&
                  int64_t(masks.size()) == layers && int64_t(windows.size()) == layers && layers > 0,
              "decoder_layers: the lists are not of ", layers, " layers");
  TORCH_CHECK(positions.numel() == tokens && cos.numel() == sin.numel() &&
                  cos.numel() % std::max<int64_t>(tokens, 1) == 0 && segments.dim() == 2 && segments.size(1) == 5,
              "decoder_layers: positions, cos, sin or segments do not fit ", tokens, " tokens");
  for (const int64_t layer : captured)
    TORCH_CHECK(layer >= 0 && layer <= layers, "decoder_layers: there is no layer ", layer);
  at::Tensor out = at::empty({1 + int64_t(captured.size()), tokens, size}, hidden.options().dtype(at::kFloat));
  if (tokens == 0) return out;
  const at::Tensor stream = out[0];
  stream.copy_(hidden.view({tokens, size}));
  const at::Tensor turn_cos = cos.to(at::kFloat).contiguous(), turn_sin = sin.to(at::kFloat).contiguous();
  const at::Tensor embedded = embeds.to(at::kFloat).contiguous();
  const at::Tensor rows = segments.contiguous(), where = positions.contiguous();
  const LayerShape shape{tokens, size, cos.numel() / tokens, float(eps), const_data<float>(turn_cos),
                         const_data<float>(turn_sin), embeds.numel() ? const_data<float>(embedded) : nullptr};
  const auto* first = reinterpret_cast<const Segment*>(const_data<int64_t>(rows));
  auto* residual = static_cast<float*>(stream.data_ptr());
  with_type(k_cache[0].scalar_type(), "the cache", [&](auto kind) {
    using T = decltype(kind);
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (size_t place = 0; place < captured.size(); ++place)
        if (captured[place] == layer) out[1 + place].copy_(stream);
      const at::Tensor *own = &weights[layer * kTensorsALayer], &keys = k_cache[layer], &values = v_cache[layer];
      const at::Tensor seen = masks[layer].contiguous();
      const bool masked = seen.numel() > 0;
      const int64_t key_heads = keys.size(0), width = keys.size(2), value_width = values.size(2);
      const int64_t mask_width = masked ? seen.size(1) : 0;
      TORCH_CHECK(shape.rotary <= width && heads % key_heads == 0 && keys.stride(2) == 1 && values.stride(2) == 1 &&
                      (!masked || seen.size(0) == tokens) && values.scalar_type() == keys.scalar_type(),
                  "decoder_layers: cache, heads or mask of layer ", layer, " do not fit");
      check_segments(first, rows.size(0), blocks, keys, tokens, mask_width, masked);
      const LayerWeights weight = layer_weights(own, size, heads, key_heads, width, value_width);
      decoder_layer(shape, weight,
                    Attention<T>{{}, {}, {}, strided<T>(keys), strided<T>(values), const_data<int64_t>(blocks),
                                 blocks.size(1), const_data<int64_t>(where), first,
                                 masked ? const_data<uint8_t>(seen) : nullptr, nullptr, rows.size(0), mask_width, heads,
                                 key_heads, width, value_width, windows[layer], float(scale), float(softcap)},
                    residual);
    }
  });
  for (size_t place = 0; place < captured.size(); ++place)
    if (captured[place] == layers) out[1 + place].copy_(stream);
  return out;
}

/// Places in `weights` of a head's tensors behind those of its layer.
enum { kFc = kTensorsALayer, kFinalNorm, kLmHead, kTensorsOfHead };
constexpr int64_t kByToken = 1;  // the noise of a sequence is that of target ids; 2: of places in the draft vocabulary

/// Settings of all sequences, in the order of `ChainJob`.
struct ChainSettings {
  const at::Tensor &lengths, &keys, &noise, &inverse_temperatures, &floors, &calibration;
};

std::vector<ChainJob> chain_jobs(const ChainSettings& given, const at::Tensor& vocabulary, int64_t longest) {
  const int64_t sequences = given.lengths.numel();
  for (const at::Tensor* each : {&given.lengths, &given.keys, &given.noise, &vocabulary})
    TORCH_CHECK(each->scalar_type() == at::kLong && each->is_contiguous(), "draft_chains: ids and counts are int64");
  for (const at::Tensor* each : {&given.inverse_temperatures, &given.floors, &given.calibration})
    TORCH_CHECK(each->scalar_type() == at::kFloat && each->is_contiguous(), "draft_chains: settings are float32");
  TORCH_CHECK(given.floors.numel() == sequences && given.inverse_temperatures.numel() == sequences &&
                  given.noise.numel() == sequences && given.calibration.numel() == sequences * kConfidences,
              "draft_chains: weights, states or settings do not fit ", sequences, " sequences");
  TORCH_CHECK(given.keys.numel() == sequences * longest * 2, "draft_chains: the keys are not of ", longest,
              " positions");
  const int64_t *keys = const_data<int64_t>(given.keys), *noise = const_data<int64_t>(given.noise);
  std::vector<ChainJob> jobs;
  for (int64_t s = 0; s < sequences; ++s)
    jobs.push_back({const_data<int64_t>(given.lengths)[s], noise[s] ? keys + s * longest * 2 : nullptr,
                    noise[s] == kByToken ? const_data<int64_t>(vocabulary) : nullptr,
                    const_data<float>(given.inverse_temperatures)[s], const_data<float>(given.floors)[s],
                    const_data<float>(given.calibration) + s * kConfidences});
  return jobs;
}

/// The segments of the tokens that the head reads, one a sequence. Checked are they, the places of the drafts behind
/// them in the cache, and the ids; there are angles of so many `positions`.
std::vector<Segment> chain_segments(const at::Tensor& segments, const at::Tensor& ids,
                                    const std::vector<ChainJob>& jobs, const at::Tensor& blocks,
                                    const at::Tensor& k_cache, int64_t known_ids, int64_t positions) {
  const int64_t sequences = int64_t(jobs.size());
  for (const at::Tensor* each : {&ids, &segments, &blocks})
    TORCH_CHECK(each->scalar_type() == at::kLong && each->is_contiguous(), "draft_chains: ids and counts are int64");
  TORCH_CHECK(segments.dim() == 2 && segments.size(0) == sequences && segments.size(1) == 5,
              "draft_chains: weights, states or settings do not fit ", sequences, " sequences");
  const auto* first = reinterpret_cast<const Segment*>(const_data<int64_t>(segments));
  int64_t reach = 0, counted = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const Segment& read = first[s];
    TORCH_CHECK(read.count >= 0 && read.start == counted, "draft_chains: the segments do not follow each other");
    counted += read.count;
    const Segment written{read.slot, 0, read.past, 0, read.count + std::max<int64_t>(0, jobs[s].length - 1)};
    reach = std::max(reach, written.past + written.count);
    check_segments(&written, 1, blocks, k_cache, written.count, 0, false);
  }
  TORCH_CHECK(counted == ids.numel() && reach <= positions, "draft_chains: ids or angles do not fit the segments");
  for (int64_t i = 0; i < counted; ++i) {
    const int64_t id = const_data<int64_t>(ids)[i];
    TORCH_CHECK(id >= 0 && id < known_ids, "draft_chains: there is no token ", id);
  }
  return {first, first + sequences};
}

/// The head of these weights, for states of `features` features; 0: there are none to be read.
template <typename T>
ChainHead<T> chain_head(at::TensorList weights, const at::Tensor& embedding, const at::Tensor& vocabulary,
                        const at::Tensor& k_cache, const at::Tensor& v_cache, int64_t size, int64_t features,
                        int64_t heads) {
  const int64_t key_heads = k_cache.size(0), width = k_cache.size(2), value_width = v_cache.size(2);
  TORCH_CHECK(embedding.scalar_type() == k_cache.scalar_type() && v_cache.scalar_type() == k_cache.scalar_type() &&
                  embedding.dim() == 2 && embedding.size(1) == size && embedding.is_contiguous() &&
                  k_cache.stride(2) == 1 && v_cache.stride(2) == 1 && heads % key_heads == 0,
              "draft_chains: embeddings and cache do not fit");
  ChainHead<T> head{};
  if (weights[kFc].numel() && features > 0)
    head.fc = packed_weight(weights[kFc], {}, features, size, "draft_chains");
  else
    TORCH_CHECK(features == 0 || features == size, "draft_chains: the states are not of ", size, " features");
  head.layer = layer_weights(weights.data(), size, heads, key_heads, width, value_width);
  head.norm = norm_weight(weights[kFinalNorm], size);
  for (int place : {int(kInputNorm), int(kPostNorm), int(kFinalNorm)})
    TORCH_CHECK(weights[place].numel() > 0, "draft_chains: norm ", place, " is missing");
  head.lm_head = packed_weight(weights[kLmHead], {}, size, vocabulary.numel(), "draft_chains");
  head.vocabulary = const_data<int64_t>(vocabulary);
  head.embedding = const_data<T>(embedding);
  head.hidden = size;
  return head;
}

/// See `ops.FusedChains`. Returns tokens, confidences and logits [sequences, longest, ...]; -1 behind a chain's end.
std::tuple<at::Tensor, at::Tensor, at::Tensor> draft_chains_op(
    const at::Tensor& states, const at::Tensor& ids, const at::Tensor& segments, at::Tensor hidden,
    at::TensorList weights, const at::Tensor& embedding, const at::Tensor& vocabulary, const at::Tensor& cos,
    const at::Tensor& sin, at::Tensor k_cache, at::Tensor v_cache, const at::Tensor& blocks, const at::Tensor& lengths,
    const at::Tensor& keys, const at::Tensor& noise, const at::Tensor& inverse_temperatures, const at::Tensor& floors,
    const at::Tensor& calibration, int64_t heads, double eps, double scale, bool norm_output, bool keep_logits) {
  TORCH_CHECK(hidden.dim() == 2 && states.dim() == 2 && k_cache.dim() == 3 && v_cache.dim() == 3 && cos.dim() == 2 &&
                  cos.size(1) > 0,
              "draft_chains: states and angles have 2 dimensions, the cache has 3");
  const int64_t sequences = lengths.numel(), size = hidden.size(-1), tokens = ids.numel(), key_heads = k_cache.size(0);
  const int64_t width = k_cache.size(2), value_width = v_cache.size(2), rotary = cos.size(-1);
  for (const at::Tensor& each : {hidden, cos, sin})
    TORCH_CHECK(each.scalar_type() == at::kFloat && each.is_contiguous(),
                "draft_chains: states and angles are float32");
  TORCH_CHECK(states.size(0) == tokens && v_cache.size(0) == key_heads && v_cache.size(1) == k_cache.size(1),
              "draft_chains: states or cache do not fit ", tokens, " tokens and ", key_heads, " heads");
  TORCH_CHECK(weights.size() == kTensorsOfHead && hidden.size(0) == sequences,
              "draft_chains: weights, states or settings do not fit ", sequences, " sequences");
  TORCH_CHECK(cos.numel() == sin.numel() && rotary <= width, "draft_chains: ids or angles do not fit the segments");
  const int64_t longest = sequences > 0 ? std::max<int64_t>(0, lengths.max().item<int64_t>()) : 0;
  const ChainSettings settings{lengths, keys, noise, inverse_temperatures, floors, calibration};
  const std::vector<ChainJob> jobs = chain_jobs(settings, vocabulary, longest);
  const std::vector<Segment> read =
      chain_segments(segments, ids, jobs, blocks, k_cache, embedding.size(0), cos.size(0));

  at::Tensor chosen = at::full({sequences, longest}, -1, lengths.options());
  at::Tensor confidences = at::zeros({sequences, longest}, hidden.options());
  at::Tensor logits = at::empty({sequences, keep_logits ? longest : 0, vocabulary.numel()}, hidden.options());
  const at::Tensor input = states.to(at::kFloat).contiguous();
  with_type(k_cache.scalar_type(), "the cache", [&](auto kind) {
    using T = decltype(kind);
    const int64_t features = tokens > 0 ? input.size(-1) : 0;
    auto head = chain_head<T>(weights, embedding, vocabulary, k_cache, v_cache, size, features, heads);
    head.norm_output = norm_output;
    head.cos = const_data<float>(cos), head.sin = const_data<float>(sin);
    head.rotary = rotary, head.eps = float(eps);
    head.attention = {{}, {}, {}, strided<T>(k_cache), strided<T>(v_cache), const_data<int64_t>(blocks), blocks.size(1),
                      nullptr, nullptr, nullptr, nullptr, 0, 0, heads, key_heads, width, value_width, 0, float(scale),
                      0.0f};
    draft_chains(head, read, const_data<float>(input), const_data<int64_t>(ids),
                 static_cast<float*>(hidden.data_ptr()), jobs, longest,
                 {static_cast<int64_t*>(chosen.data_ptr()), static_cast<float*>(confidences.data_ptr()),
                  keep_logits ? static_cast<float*>(logits.data_ptr()) : nullptr});
  });
  return {chosen, confidences, logits};
}

/// The largest of each row of logits [rows, vocab], of equal ones the first, once `keys` [rows, 2] noise has been added
/// to logits * inverse_temperature; without keys the largest logit -> ids [rows].
at::Tensor choices_op(const at::Tensor& logits, const std::optional<at::Tensor>& keys, double inverse_temperature) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "choices takes logits [rows, vocab]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(!keys || (keys->scalar_type() == at::kLong && keys->is_contiguous() && keys->numel() == 2 * rows),
              "choices takes two keys for each row");
  const at::Tensor given = logits.contiguous();
  at::Tensor out = at::empty({rows}, logits.options().dtype(at::kLong));
  auto* ids = static_cast<int64_t*>(out.data_ptr());
  with_type(given.scalar_type(), "logits", [&](auto kind) {
    using T = decltype(kind);
    for_each_tile(rows, [&](int64_t row) {
      static thread_local std::vector<float> scores;
      scores.resize(vocab);
      convert(const_data<T>(given) + row * vocab, scores.data(), vocab);
      if (keys) {
        const auto* pair = reinterpret_cast<const uint64_t*>(const_data<int64_t>(*keys)) + 2 * row;
        ids[row] = noisy_choice(scores.data(), static_cast<const int64_t*>(nullptr), vocab, float(inverse_temperature),
                                pair[0], pair[1]);
      } else {
        ids[row] = place_of_largest(scores.data(), vocab);
      }
    });
  });
  return out;
}

at::Tensor rms_norm_op(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t size = weight.numel();
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == size && weight.scalar_type() == at::kFloat && weight.is_contiguous(),
              "rms_norm takes x [..., ", size, "] and float32 weights");
  const at::Tensor input = x.to(at::kFloat).contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  with_type(x.scalar_type(), "x", [&](auto kind) {
    using T = decltype(kind);
    std::vector<float> row(size);
    for (int64_t from = 0; from < x.numel(); from += size) {
      rms_norm(const_data<float>(input) + from, const_data<float>(weight), float(eps), size, row.data());
      convert(row.data(), static_cast<T*>(out.data_ptr()) + from, size);
    }
  });
  return out;
}

void set_threads(int64_t threads) {
  TORCH_CHECK(threads >= 1 && threads <= 1024, "set_threads takes 1 to 1024 threads, not ", threads);
  PoolHolder::get().set_threads(int(threads));
}

constexpr std::pair<const char*, Arithmetic> kArithmetics[] = {
    {"float32", Arithmetic::kFloat32}, {"bf16", Arithmetic::kPairs}, {"amx", Arithmetic::kTiles}};

/// The names of what this machine has, the fastest last.
std::vector<std::string> arithmetics() {
  std::vector<std::string> names;
  for (const auto& [name, kind] : kArithmetics)
    if (has_arithmetic(kind)) names.push_back(name);
  return names;
}

void set_arithmetic(const std::string& wanted) {
  for (const auto& [name, kind] : kArithmetics)
    if (wanted == name && has_arithmetic(kind)) return arithmetic().store(kind);
  TORCH_CHECK(false, "set_arithmetic: this machine does not have ", wanted);
}

std::string get_arithmetic() {
  for (const auto& [name, kind] : kArithmetics)
    if (arithmetic().load() == kind) return name;
  return "";
}

int64_t get_threads() { return PoolHolder::get().threads(); }

}  // namespace
}  // namespace draftsmith

TORCH_LIBRARY(draftsmith, library) {
  library.def("pack(Tensor weight, int bits=0) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor packed, int out_features, Tensor? bias=None) -> Tensor");
  library.def(
      "slot_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor blocks, "
      "Tensor positions, Tensor segments, Tensor mask, float scale, int window=0, float softcap=0.0) -> Tensor");
  library.def(
      "decoder_layers(Tensor hidden, Tensor embeds, Tensor cos, Tensor sin, Tensor[] weights, Tensor(a!)[] k_cache, "
      "Tensor(b!)[] v_cache, Tensor blocks, Tensor positions, Tensor segments, Tensor[] masks, int[] windows, "
      "int[] captured, int heads, float eps, float scale, float softcap) -> Tensor");
  library.def(
      "draft_chains(Tensor states, Tensor ids, Tensor segments, Tensor(a!) hidden, Tensor[] weights, Tensor embedding, "
      "Tensor vocabulary, Tensor cos, Tensor sin, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor blocks, "
      "Tensor lengths, Tensor keys, Tensor noise, Tensor inverse_temperatures, Tensor floors, Tensor calibration, "
      "int heads, float eps, float scale, bool norm_output, bool keep_logits) -> (Tensor, Tensor, Tensor)");
  library.def("choices(Tensor logits, Tensor? keys=None, float inverse_temperature=1.0) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("weight_memory(int bytes) -> Tensor", &draftsmith::weight_memory);
  library.def("set_threads(int threads) -> ()", &draftsmith::set_threads);
  library.def("get_threads() -> int", &draftsmith::get_threads);
  library.def("block_size() -> int", [] { return int64_t(draftsmith::kBlock); });
  library.def("arithmetics() -> str[]", &draftsmith::arithmetics);
  library.def("set_arithmetic(str name) -> ()", [](std::string name) { draftsmith::set_arithmetic(name); });
  library.def("get_arithmetic() -> str", &draftsmith::get_arithmetic);
  library.def("panel_width() -> int", [] { return int64_t(draftsmith::kPanel); });
}

TORCH_LIBRARY_IMPL(draftsmith, CPU, library) {
  library.impl("pack", &draftsmith::pack);
  library.impl("packed_linear", &draftsmith::packed_linear_op);
  library.impl("slot_attention", &draftsmith::slot_attention_op);
  library.impl("decoder_layers", &draftsmith::decoder_layers_op);
  library.impl("draft_chains", &draftsmith::draft_chains_op);
  library.impl("choices", &draftsmith::choices_op);
  library.impl("rms_norm", &draftsmith::rms_norm_op);
}
