#include "kernels.h"

#include "faults.h"
#include "memory.h"
#include "ordered.h"
#include "streams.h"
#include "workspaces.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

namespace sim {
namespace {

bool on_card(const at::Tensor& tensor) {
  return tensor.device().type() == c10::DeviceType::PrivateUse1;
}

// One operator call: what it was given, what the host's kernel gets instead, and what goes back.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack) : schema_(op.schema()), stack_(stack) {
    find_card();
    lend_arguments();
  }

  int card_index() const { return device_.index(); }

  void take_results() {
    for (const auto& loan : loans_) settle(loan);
    const size_t first = stack_.size() - schema_.returns().size();
    for (size_t i = first; i < stack_.size(); ++i) {
      at::IValue& value = stack_[i];
      if (value.isTensor()) {
        value = taken(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(taken(tensor));
        value = std::move(list);
      }
    }
  }

 private:
  struct Loan {
    at::Tensor card;
    at::Tensor host;
  };

  at::IValue& argument(size_t i) { return stack_[stack_.size() - schema_.arguments().size() + i]; }

  template <typename Visit>
  void each_tensor(Visit visit) {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const at::IValue& value = argument(i);
      if (value.isTensor()) {
        visit(i, value.toTensor());
      } else if (value.isTensorList() || value.isOptionalTensorList()) {
        for (const at::IValue& item : value.toListRef()) {
          if (item.isTensor()) visit(i, item.toTensor());
        }
      }
    }
  }

  // Indices may stay on the host, as with CUDA.
  bool may_be_on_host(size_t i, const at::Tensor& tensor) const {
    const c10::Argument& argument = schema_.arguments()[i];
    return (tensor.dim() == 0 && !is_written(argument)) || argument.name() == "indices";
  }

  static bool is_written(const c10::Argument& argument) {
    return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  }

  // The card of the call is that of the first tensor on one; every other tensor must be there too.
  void find_card() {
    bool found = false;
    each_tensor([&](size_t, const at::Tensor& tensor) {
      if (!found && tensor.defined() && on_card(tensor)) {
        device_ = tensor.device();
        found = true;
      }
    });
    if (!found) return;
    each_tensor([&](size_t i, const at::Tensor& tensor) {
      if (!tensor.defined() || tensor.device() == device_) return;
      if (tensor.is_cpu() && may_be_on_host(i, tensor)) return;
      TORCH_CHECK(
          false, "Expected all tensors to be on the same device, but found at least two devices, ", device_, " and ",
          tensor.device(), "! (when checking argument ", schema_.arguments()[i].name(), " of ", schema_.name(), ")");
    });
  }

  void lend_arguments() {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      at::IValue& value = argument(i);
      const c10::Argument& formal = schema_.arguments()[i];
      if (value.isTensor()) {
        value = lent(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(lent(tensor));
        value = std::move(list);
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const auto& tensor : value.toOptionalTensorVector()) {
          list.push_back(tensor ? std::optional(lent(*tensor)) : std::nullopt);
        }
        value = std::move(list);
      } else if (value.isDevice()) {
        if (value.toDevice().type() == c10::DeviceType::PrivateUse1) device_ = indexed(value.toDevice());
        value = c10::Device(c10::DeviceType::CPU);
      } else if (value.isGenerator()) {
        const c10::Device found = value.toGenerator().device();
        TORCH_CHECK(false, "Expected a 'sim' device type for generator but found '", found, "'");
      } else if (value.isNone() && formal.name() == "generator") {
        value = default_generator(card_index());
      }
    }
  }

  static c10::Device indexed(c10::Device device) {
    return device.has_index() ? device : c10::Device(device.type(), static_cast<c10::DeviceIndex>(current()));
  }

  at::Tensor lent(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    loans_.push_back({tensor, on_card(tensor) ? on_host(tensor) : tensor});
    return loans_.back().host;
  }

  // A kernel may have resized what it was given to write into.
  void settle(const Loan& loan) {
    if (!on_card(loan.card)) return;
    if (loan.card.storage().nbytes() == 0 && loan.host.storage().nbytes() > 0) {
      c10::StorageImpl* storage = loan.card.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(adopt(loan.card.device().index(), loan.host.storage()));
      storage->set_nbytes(loan.host.storage().nbytes());
    }
    if (loan.host.sizes() != loan.card.sizes() || loan.host.strides() != loan.card.strides()) {
      loan.card.unsafeGetTensorImpl()->set_sizes_and_strides(
          loan.host.sizes(), loan.host.strides(), loan.host.storage_offset());
    }
  }

  at::Tensor taken(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (const Loan& loan : loans_) {
      if (result.is_same(loan.host)) return loan.card;
    }
    for (const Loan& loan : loans_) {
      if (!result.storage().is_alias_of(loan.host.storage())) continue;
      return on_card(loan.card) ? placed(result, loan.card.storage()) : taken(result.clone());
    }
    for (const Loan& fresh : fresh_) {
      if (result.storage().is_alias_of(fresh.host.storage())) return placed(result, fresh.card.storage());
    }
    c10::Storage storage(
        {}, result.storage().nbytes(),
        result.storage().nbytes() > 0 ? adopt(card_index(), result.storage()) : empty_memory(),
        allocator(), /*resizable=*/true);
    fresh_.push_back({placed(result, storage), result});
    return fresh_.back().card;
  }

  c10::DataPtr empty_memory() const {
    c10::DeviceGuard guard(device_);
    return allocator()->allocate(0);
  }

  static at::Tensor placed(const at::Tensor& result, const c10::Storage& storage) {
    at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), result.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    tensor._set_conj(result.is_conj());
    tensor._set_neg(result.is_neg());
    return tensor;
  }

  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
  c10::Device device_{c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(current())};
  std::vector<Loan> loans_;
  std::vector<Loan> fresh_;
};

} // namespace

at::Tensor on_host(const at::Tensor& tensor) {
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      host_of(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

at::Tensor borrowed(const at::Tensor& host) {
  void* data = host.storage().nbytes() > 0 ? const_cast<void*>(host.storage().data()) : nullptr;
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage({}, host.storage().nbytes(), c10::DataPtr(data, c10::DeviceType::CPU), nullptr, false),
      c10::DispatchKeySet(c10::DispatchKey::CPU), host.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  alias._set_conj(host.is_conj());
  alias._set_neg(host.is_neg());
  return alias;
}

namespace {

// Whether the operator makes views and nothing else.
bool only_looks(const c10::OperatorHandle& op) {
  for (const c10::Argument& result : op.schema().returns()) {
    if (result.alias_info() == nullptr || result.alias_info()->isWrite()) return false;
  }
  return true;
}

// What is not ordered runs behind all that was, and whoever needs its numbers waits for them.
void catch_up(const c10::OperatorHandle& op, int card) {
  note_at_once(op);
  order(card, current_stream(card), [] {}, {{card, Engine::compute}}, kernel_length());
  if (waits_for_numbers(op)) {
    host_wait(here(card, current_stream(card)));
  } else {
    drain(card, current_stream(card));
  }
}

} // namespace

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const bool looks = only_looks(op);
  if (asynchronous() && !looks && order_operator(op, stack)) return;
  Call call(op, *stack);
  {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    if (!looks) {
      take_workspace(op, call.card_index(), current_stream(call.card_index()));
      if (asynchronous()) {
        catch_up(op, call.card_index());
      } else {
        fail_if_due(call.card_index());
      }
    }
    const Work work = Work::kernel(call.card_index());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.take_results();
}

at::Generator& default_generator(int64_t index) {
  static std::array<at::Generator, MAX_CARDS> generators = [] {
    std::array<at::Generator, MAX_CARDS> made;
    for (auto& generator : made) generator = at::detail::createCPUGenerator();
    return made;
  }();
  card(index);
  return generators[index];
}

} // namespace sim
