// The operators that the cards have kernels of their own for, and the ones the tests steer them by.
#include "faults.h"
#include "kernels.h"
#include "memory.h"
#include "ordered.h"
#include "pinned.h"
#include "streams.h"
#include "workspaces.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

namespace sim {
namespace {

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, allocator(), KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, allocator(), KEYS, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, sizes, format);
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, sizes, strides);
}

at::Tensor& set_empty(at::Tensor& self) {
  c10::DeviceGuard guard(self.device());
  c10::Storage nothing({}, 0, allocator(), /*resizable=*/true);
  return at::native::set_storage_cpu_(self, std::move(nothing), 0, {0}, {});
}

int place(const at::Tensor& tensor) {
  return tensor.is_cpu() ? HOST : tensor.device().index();
}

at::Tensor host_side(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor : on_host(tensor);
}

// What a broken link leaves: nothing, or bytes of no meaning, the same ones in every run.
void spoil(const at::Tensor& tensor, Corruption how) {
  if (how == Corruption::zeros) tensor.zero_();
  if (how != Corruption::noise) return;
  const at::Tensor noise = tensor.new_empty(tensor.sizes());
  auto* bytes = static_cast<uint8_t*>(noise.mutable_data_ptr());
  const uint8_t meaningful = tensor.scalar_type() == at::kBool ? 1 : 255;
  uint32_t state = 1;
  for (size_t i = 0; i < noise.nbytes(); ++i) {
    state = state * 1664525 + 1013904223;
    bytes[i] = (state >> 24) & meaningful;
  }
  tensor.copy_(noise);
}

// As a card's own engine copies: it takes no part in the host's parallel loops, and waits for none of their threads.
void write(const at::Tensor& from, const at::Tensor& to) {
  const bool plain = from.scalar_type() == to.scalar_type() && from.sizes() == to.sizes() && from.is_contiguous() &&
      to.is_contiguous() && !from.is_conj() && !from.is_neg();
  if (plain) {
    std::memmove(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes());
  } else {
    to.copy_(from);
  }
}

// A copy between a card and itself, another one or the host, of memory that somebody else keeps.
Task copying(const at::Tensor& read, const at::Tensor& written, int from, int to) {
  return [read, written, from, to] {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    if (from == to) {
      const Work work = Work::kernel(to);
      written.copy_(read);
    } else {
      const Work work = Work::copy(from, to, static_cast<int64_t>(written.nbytes()));
      write(read, written);
      spoil(written, corruption(from, to));
    }
  };
}

// Between cards, as torch does it on CUDA: on the source's stream, with a barrier on either side.
void across(int from, int to, const Task& task, int64_t bytes) {
  wait_on_stream(from, current_stream(from), here(to, current_stream(to)));
  order(from, current_stream(from), task, {{from, Engine::out}, {to, Engine::in}}, copy_length(bytes));
  wait_on_stream(to, current_stream(to), here(from, current_stream(from)));
}

// Between a card and the host: the host waits, unless it was asked not to and its memory is pinned. What is read from
// pageable memory is read at once.
void over_the_link(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  const int from = place(source), to = place(destination), on = from == HOST ? to : from;
  const at::Tensor& host = from == HOST ? source : destination;
  const bool pinned = host.storage().nbytes() > 0 && is_pinned(host.storage().data());
  const bool later = non_blocking && pinned;
  // A task keeps what it reads only where nobody else has it.
  const at::Tensor read = to == HOST ? on_host(source)
      : !later && asynchronous()     ? source.clone()
                                     : borrowed(source);
  const at::Tensor written = to == HOST ? borrowed(destination) : on_host(destination);
  const int64_t bytes = static_cast<int64_t>(destination.nbytes());
  order(on, current_stream(on), copying(read, written, from, to),
        {{on, from == HOST ? Engine::in : Engine::out}}, copy_length(bytes));
  const Mark end = here(on, current_stream(on));
  if (later) {
    used_until(host.storage().data(), end);
  } else if (!non_blocking || to == HOST) {
    host_wait(end);
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const int from = place(source), to = place(destination);
  const int64_t bytes = static_cast<int64_t>(destination.nbytes());
  if (from != to) count_copy(from, to, bytes);
  if (from == to) {
    order(to, current_stream(to), copying(host_side(source), host_side(destination), from, to),
          {{to, Engine::compute}}, kernel_length());
  } else if (from == HOST || to == HOST) {
    over_the_link(source, destination, non_blocking);
  } else {
    across(from, to, copying(host_side(source), host_side(destination), from, to), bytes);
  }
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& destination) {
  destination.resize_(source.sizes());
  return copy_from(source, destination, false);
}

// Lets `tensor.data = other` cross between a card and the host, so that `Module.to` keeps its parameters, tied
// ones included, as it does with the accelerators that torch knows.
bool can_take_data(const at::Tensor& tensor, const at::Tensor& other) {
  const auto plain = [](const at::Tensor& t) {
    return t.layout() == at::kStrided && (t.is_cpu() || t.device().type() == c10::DeviceType::PrivateUse1);
  };
  return plain(tensor) && plain(other);
}

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  used_by(tensor.storage().data_ptr(), stream.id());
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const int from = place(tensor);
  const int64_t bytes = static_cast<int64_t>(tensor.nbytes());
  order(from, current_stream(from), [] {}, {{from, Engine::out}}, copy_length(bytes));
  host_wait(here(from, current_stream(from)));
  const Work work = Work::copy(from, HOST, bytes);
  count_copy(from, HOST, bytes);
  return on_host(tensor).item();
}

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", at::native::view);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", at::native::set_);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_", set_empty);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("_has_compatible_shallow_copy_type", can_take_data);
  library.impl("record_stream", record_stream);
}

// Where torch has a composite kernel as well as the host's own, it would pick the composite, whose
// bits differ. And some composites choose their way by the device. So name all of these.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  const auto hosts = torch::CppFunction::makeFromBoxedFunction<&run_on_host>;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.getNamespace() != "aten") continue;
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (!op || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && op->hasSchema()) {
      library.impl(c10::toString(name).c_str(), hosts());
    }
  }
  for (const char* name : {"conj_physical_", "convolution", "scaled_dot_product_attention"}) {
    library.impl(name, hosts());
  }
}

// The host's copy reads conjugated and negated views; resolving them first would copy, without end.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY(sim, library) {
  library.def("configure(int[] limits) -> ()", [](std::vector<int64_t> limits) { configure(limits); });
  library.def("withdraw() -> ()", withdraw);
  library.def("device_count() -> int", [] { return static_cast<int64_t>(count()); });
  library.def("fail_allocation(int card, int nth) -> ()", fail_allocation);
  library.def("delay(float per_kernel, float per_copied_byte) -> ()", delay);
  library.def("corrupt(int source, int destination, int how) -> ()", [](int64_t from, int64_t to, int64_t how) {
    corrupt(from, to, static_cast<Corruption>(how));
  });
  library.def("fail_kernel(int card, int nth) -> ()", fail_kernel);
  library.def("set_schedule(int wanted) -> ()", set_schedule);
  library.def("host_waits() -> int", host_waits);
  library.def("places_of_waits() -> str[]", places_of_waits);
  library.def("tell_places_of_waits(bool wanted) -> ()", tell_places_of_waits);
  library.def("run_at_once() -> str[]", run_at_once);
  library.def("booked() -> int[]", booked);
  library.def("host_time() -> int", host_time);
  library.def("clear_streams() -> ()", clear_streams);
  library.def("set_caching(bool wanted) -> ()", set_caching);
  library.def("set_context_bytes(int bytes) -> ()", set_context_bytes);
  library.def("contexts() -> int[]", contexts);
  library.def("set_workspace_bytes(int bytes) -> ()", set_workspace_bytes);
  library.def("clear_workspaces() -> ()", clear_workspaces);
  library.def("pinned_bytes() -> int", pinned_bytes);
  library.def("limit_pinned(int bytes) -> ()", limit_pinned);
  library.def("set_bfloat16(bool supported) -> ()", set_bfloat16);
  library.def("bfloat16() -> bool", bfloat16);
  library.def("clear_faults() -> ()", clear_faults);
  library.def("copied() -> int[]", copied);
  library.def("clear_copied() -> ()", clear_copied);
  library.def("get_rng_state(int card) -> Tensor", [](int64_t card) {
    return default_generator(card).get_state();
  });
  library.def("set_rng_state(Tensor state, int card) -> ()", [](const at::Tensor& state, int64_t card) {
    default_generator(card).set_state(state);
  });
  library.def("seed(int seed) -> ()", [](int64_t seed) {
    for (int index = 0; index < count(); ++index) default_generator(index).set_current_seed(seed);
  });
}

} // namespace sim
