// The operators as PyTorch sees them: checks, strides and dtypes; the work is in the headers.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
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

/// Weights are read once a step, in order: large pages save most of the address translation.
void ask_for_large_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  const uintptr_t page = 1 << 12, begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

at::Tensor pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "pack takes a weight [out, in], not ", weight.dim(), " dimensions");
  const at::Tensor rows = weight.contiguous();
  const int64_t features = rows.size(0), in = rows.size(1);
  const at::Tensor packed = at::empty({(features + kPanel - 1) / kPanel, in, kPanel}, rows.options());
  ask_for_large_pages(packed);
  with_type(rows.scalar_type(), "the weight", [&](auto kind) {
    using T = decltype(kind);
    pack_panels(const_data<T>(rows), features, in, static_cast<T*>(packed.data_ptr()));
  });
  return packed;
}

at::Tensor packed_linear_op(const at::Tensor& x, const at::Tensor& packed, int64_t features,
                            const std::optional<at::Tensor>& bias) {
  const int64_t in = packed.size(1);
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == in, "packed_linear: x ends in ", x.dim() ? x.size(-1) : 0,
              " features, the weight takes ", in);
  TORCH_CHECK((features + kPanel - 1) / kPanel == packed.size(0) && packed.size(2) == kPanel,
              "packed_linear: the weight was not packed for ", features, " features on this machine");
  auto shape = x.sizes().vec();
  shape.back() = features;
  at::Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  with_type(x.scalar_type(), "x", [&](auto out_kind) {
    with_type(packed.scalar_type(), "the packed weight", [&](auto kind) {
      using Out = decltype(out_kind);
      using Weight = decltype(kind);
      packed_linear(const_data<float>(input), const_data<Weight>(packed),
                    added.defined() ? const_data<float>(added) : nullptr, static_cast<Out*>(out.data_ptr()),
                    out.numel() / features, in, features);
    });
  });
  return out;
}

template <typename T>
Strided<T> strided(const at::Tensor& tensor) {
  return {static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

at::Tensor rows_in_memory(const at::Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

void check_segments(const Segment* segments, int64_t count, int64_t slots, int64_t entries, int64_t tokens,
                    int64_t mask_width, bool masked) {
  for (const Segment* s = segments; s < segments + count; ++s) {
    if (s->count == 0) continue;
    TORCH_CHECK(s->count > 0 && s->start >= 0 && s->start + s->count <= tokens && s->slot >= 0 && s->slot < slots &&
                    s->base >= 0 && s->base <= s->past && s->past + s->count <= entries,
                "slot_attention: segment (slot ", s->slot, ", base ", s->base, ", past ", s->past, ", start ", s->start,
                ", count ", s->count, ") does not fit ", slots, " slots of ", entries, " entries and ", tokens,
                " tokens");
    TORCH_CHECK(!masked || s->past + s->count - s->base <= mask_width, "slot_attention: a mask of ", mask_width,
                " columns is narrower than a segment's ", s->past + s->count - s->base, " keys");
  }
}

at::Tensor slot_attention_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_slots,
                             at::Tensor v_slots, const at::Tensor& positions, const at::Tensor& segments,
                             const at::Tensor& mask, double scale, int64_t window, double softcap) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k_slots.dim() == 4 && v_slots.dim() == 4,
              "slot_attention: q, k, v and the slots have 4 dimensions");
  const int64_t heads = q.size(1), tokens = q.size(2), key_heads = k.size(1);
  TORCH_CHECK(q.size(0) == 1 && k.size(2) == tokens && v.size(2) == tokens && v.size(1) == key_heads &&
                  heads % key_heads == 0 && k.size(3) == q.size(3) && positions.numel() == tokens,
              "slot_attention: shapes of q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK(k_slots.size(1) == key_heads && v_slots.size(1) == key_heads && k_slots.size(3) == k.size(3) &&
                  v_slots.size(3) == v.size(3) && k_slots.size(0) == v_slots.size(0) &&
                  k_slots.size(2) == v_slots.size(2) && k_slots.stride(3) == 1 && v_slots.stride(3) == 1,
              "slot_attention: slots ", k_slots.sizes(), " and ", v_slots.sizes(), " do not fit the keys and values");
  for (const at::Tensor* other : {&k, &v, &static_cast<const at::Tensor&>(k_slots), &static_cast<const at::Tensor&>(v_slots)})
    TORCH_CHECK(other->scalar_type() == q.scalar_type(), "slot_attention: q, k, v and the slots share one dtype");
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
  check_segments(first, rows.size(0), k_slots.size(0), k_slots.size(2), tokens, mask_width, masked);
  // zeros, because padding tokens that no segment names must stay finite
  at::Tensor out = at::zeros({1, tokens, heads, v.size(3)}, q.options());
  with_type(q.scalar_type(), "q", [&](auto kind) {
    using T = decltype(kind);
    slot_attention(Attention<T>{
        strided<const T>(queries), strided<const T>(keys), strided<const T>(values), strided<T>(k_slots),
        strided<T>(v_slots), const_data<int64_t>(where), first, masked ? const_data<uint8_t>(seen) : nullptr,
        static_cast<T*>(out.data_ptr()), rows.size(0), mask_width, heads, key_heads, q.size(3), v.size(3), window,
        float(scale), float(softcap)});
  });
  return out;
}

void set_threads(int64_t threads) {
  TORCH_CHECK(threads >= 1 && threads <= 1024, "set_threads takes 1 to 1024 threads, not ", threads);
  PoolHolder::get().set_threads(int(threads));
}

int64_t get_threads() { return PoolHolder::get().threads(); }

}  // namespace
}  // namespace draftsmith

TORCH_LIBRARY(draftsmith, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor packed, int out_features, Tensor? bias=None) -> Tensor");
  library.def(
      "slot_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_slots, Tensor(b!) v_slots, Tensor positions, "
      "Tensor segments, Tensor mask, float scale, int window=0, float softcap=0.0) -> Tensor");
  library.def("set_threads(int threads) -> ()", &draftsmith::set_threads);
  library.def("get_threads() -> int", &draftsmith::get_threads);
  library.def("panel_width() -> int", [] { return int64_t(draftsmith::kPanel); });
}

TORCH_LIBRARY_IMPL(draftsmith, CPU, library) {
  library.impl("pack", &draftsmith::pack);
  library.impl("packed_linear", &draftsmith::packed_linear_op);
  library.impl("slot_attention", &draftsmith::slot_attention_op);
}
