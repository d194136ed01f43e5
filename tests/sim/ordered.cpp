#include "ordered.h"

#include "faults.h"
#include "kernels.h"
#include "memory.h"
#include "streams.h"
#include "workspaces.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include <set>

namespace sim {
namespace {

constexpr c10::DeviceType CARD = c10::DeviceType::PrivateUse1;

auto& at_once = *new std::set<std::string>; // guarded as queues are

bool written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

template <typename Visit>
void each_tensor(const at::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList() || value.isOptionalTensorList()) {
    for (const at::IValue& item : value.toListRef()) {
      if (item.isTensor()) visit(item.toTensor());
    }
  }
}

// The value with every tensor of it turned into another.
template <typename Turn>
at::IValue turned(const at::IValue& value, const Turn& turn) {
  const auto each = [&](const at::Tensor& tensor) { return tensor.defined() ? turn(tensor) : tensor; };
  if (value.isTensor()) return each(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(each(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional(each(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

// A tensor of the same form on another device; its numbers are whatever is there.
at::Tensor like(const at::Tensor& tensor, c10::Device device) {
  at::Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
  made._set_conj(tensor.is_conj());
  made._set_neg(tensor.is_neg());
  return made;
}

// Whether numbers are in the same order: where a size is 1 its stride means nothing.
bool laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0) return true;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// By which the host's kernels choose their way.
at::MemoryFormat suggested(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? at::MemoryFormat::Contiguous : tensor.suggest_memory_format();
}

class Ordering {
 public:
  Ordering(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), schema_(op.schema()), stack_(stack), first_(stack.size() - schema_.arguments().size()) {}

  bool order_it() {
    if (!can_be_foreseen() || !find_card()) return false;
    if ((fresh_ || grows_) && !foresee()) return false;
    take_arguments();
    const c10::DeviceGuard guard(c10::Device(CARD, static_cast<c10::DeviceIndex>(card_)));
    if (!make_results()) return false;
    take_workspace(op_, card_, current_stream(card_));
    order(card_, current_stream(card_), [op = op_, arguments = std::move(arguments_), into = std::move(into_)] {
      compute(op, arguments, into);
    }, {{card_, Engine::compute}}, kernel_length());
    torch::jit::drop(stack_, schema_.arguments().size());
    for (at::IValue& result : results_) stack_.push_back(std::move(result));
    return true;
  }

 private:
  using Into = std::vector<std::pair<size_t, std::vector<at::Tensor>>>;

  const at::IValue& argument(size_t i) const { return stack_[first_ + i]; }

  bool can_be_foreseen() {
    if ((waits_for_numbers(op_) && !takes_rows()) || (op_.hasTag(at::Tag::nondeterministic_seeded) && !is_attention())) return false;
    for (const c10::Argument& result : schema_.returns()) {
      const auto kind = result.type()->kind();
      if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return false;
      if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return false;
      fresh_ = fresh_ || result.alias_info() == nullptr;
    }
    return true;
  }

  // It draws only where it drops something out.
  bool is_attention() const { return schema_.name() == "aten::scaled_dot_product_attention"; }

  // How many rows a mask takes depends on its numbers; how many a list of their indices takes does not.
  bool takes_rows() const {
    if (op_.operator_name() != c10::OperatorName("aten::index", "Tensor")) return false;
    bool masks = false;
    each_tensor(argument(1), [&](const at::Tensor& index) {
      masks = masks || index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
    });
    return !masks;
  }

  // The one card of all tensors, or that on which a factory is to make some.
  bool find_card() {
    bool ready = true;
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const bool is_written = written(schema_.arguments()[i]);
      const at::IValue& value = argument(i);
      each_tensor(value, [&](const at::Tensor& tensor) {
        if (!tensor.defined()) return;
        if (tensor.device().type() != CARD) {
          ready = ready && !is_written;
          return;
        }
        if (card_ < 0) card_ = tensor.device().index();
        ready = ready && tensor.device().index() == card_;
        grows_ = grows_ || (is_written && tensor.storage().nbytes() == 0);
      });
      if (value.isGenerator()) ready = false;
    }
    for (size_t i = 0; card_ < 0 && i < schema_.arguments().size(); ++i) {
      if (argument(i).isDevice() && argument(i).toDevice().type() == CARD) {
        const c10::Device named = argument(i).toDevice();
        card_ = named.has_index() ? named.index() : current();
      }
    }
    return ready && card_ >= 0;
  }

  bool foresee() {
    if (is_attention()) return foresee_attention();
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const at::IValue& value = argument(i);
      if (value.isDevice()) {
        foreseen_.emplace_back(c10::Device(c10::DeviceType::Meta));
        continue;
      }
      const bool is_written = written(schema_.arguments()[i]);
      foreseen_.push_back(turned(value, [&](const at::Tensor& tensor) {
        if (tensor.is_cpu()) return tensor;
        const at::Tensor meta = like(tensor, c10::DeviceType::Meta);
        if (is_written && tensor.storage().nbytes() == 0) growing_.emplace_back(tensor, meta);
        return meta;
      }));
    }
    try {
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &foreseen_);
    } catch (const std::exception&) {
      return false;
    }
    if (schema_.name() == "aten::convolution") foresee_layout();
    for (const auto& [tensor, meta] : growing_) tensor.resize_(meta.sizes());
    return foreseen_.size() == schema_.returns().size();
  }

  // Torch chooses among the host's kernels by what it is given, and they lay out their results in two ways.
  bool foresee_attention() {
    const auto host = [&](size_t i) { return on_host(argument(i).toTensor()); };
    const at::Tensor query = host(0), key = host(1), value = host(2);
    const auto mask = argument(3).isTensor() ? std::optional(host(3)) : std::nullopt;
    const std::optional<double> scale = argument(6).toOptional<double>();
    const double dropout = argument(4).toDouble();
    const bool causal = argument(5).toBool(), grouped = argument(7).toBool();
    if (dropout != 0) return false;
    std::vector<int64_t> sizes = query.sizes().vec();
    sizes.back() = value.size(-1);
    at::Tensor meta = at::empty(sizes, query.options().device(c10::DeviceType::Meta));
    const int64_t choice = at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, grouped);
    if (static_cast<sdp::SDPBackend>(choice) == sdp::SDPBackend::flash_attention) {
      meta = at::empty_like(like(query, c10::DeviceType::Meta));
    }
    foreseen_ = {meta};
    return true;
  }

  // Some of the host's kernels lay out their results as they find their operands; the Meta kernel goes by the device.
  void foresee_layout() {
    const at::Tensor input = on_host(argument(0).toTensor()), weight = on_host(argument(1).toTensor());
    const auto backend = at::native::select_conv_backend(
        input, weight, argument(2).isTensor() ? std::optional(on_host(argument(2).toTensor())) : std::nullopt,
        argument(3).toSymIntVector(), argument(4).toSymIntVector(), argument(5).toSymIntVector(), argument(6).toBool(),
        argument(7).toSymIntVector(), argument(8).toSymInt(), std::nullopt);
    const auto format = at::native::_determine_backend_memory_format(input, weight, backend);
    const at::Tensor meta = foreseen_[0].toTensor();
    foreseen_ = {at::empty(meta.sizes(), meta.options(), format)};
  }

  void take_arguments() {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const at::IValue& value = argument(i);
      if (value.isDevice()) {
        arguments_.emplace_back(c10::Device(c10::DeviceType::CPU));
        continue;
      }
      // What is on the host is read now, as a launch of a kernel does.
      arguments_.push_back(turned(value, [](const at::Tensor& tensor) {
        return tensor.is_cpu() ? tensor.clone() : on_host(tensor);
      }));
    }
  }

  bool make_results() {
    for (size_t r = 0; r < schema_.returns().size(); ++r) {
      if (schema_.returns()[r].alias_info() != nullptr) {
        if (!take_written(r)) return false;
        continue;
      }
      std::vector<at::Tensor> hosts;
      results_.push_back(turned(foreseen_[r], [&](const at::Tensor& meta) {
        at::Tensor made = like(as_the_host(meta), c10::Device(CARD, static_cast<c10::DeviceIndex>(card_)));
        hosts.push_back(on_host(made));
        return made;
      }));
      into_.emplace_back(r, std::move(hosts));
    }
    return true;
  }

  // Where a size is 1 its stride means nothing, but the host's kernels choose their way by it, and Meta kernels give
  // others: for a normalization, and where a number is combined with a tensor, whose strides the host keeps.
  at::Tensor as_the_host(const at::Tensor& meta) const {
    if (schema_.name() == "aten::native_group_norm" && meta.dim() > 2) {
      return at::empty(meta.sizes(), meta.options(), argument(0).toTensor().suggest_memory_format());
    }
    at::Tensor operand;
    bool with_number = false;
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      if (!argument(i).isTensor() || !argument(i).toTensor().defined()) continue;
      const at::Tensor tensor = argument(i).toTensor();
      if (tensor.dim() == 0) {
        with_number = true;
      } else if (operand.defined()) {
        return meta;
      } else {
        operand = tensor;
      }
    }
    const bool alike = with_number && operand.defined() && operand.sizes() == meta.sizes() &&
        operand.is_non_overlapping_and_dense() && laid_out_alike(operand, meta);
    return alike ? at::empty_strided(meta.sizes(), operand.strides(), meta.options()) : meta;
  }

  // The result is an argument that was written into.
  bool take_written(size_t r) {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const auto* given = schema_.arguments()[i].alias_info();
      if (given == nullptr || !given->isWrite()) continue;
      if (given->beforeSets() != schema_.returns()[r].alias_info()->beforeSets()) continue;
      results_.push_back(argument(i));
      return true;
    }
    return false;
  }

  static void compute(const c10::OperatorHandle& op, const torch::jit::Stack& arguments, const Into& into) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_modes(
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
    torch::jit::Stack called = arguments;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &called);
    for (const auto& [r, hosts] : into) {
      size_t i = 0;
      each_tensor(called[r], [&](const at::Tensor& got) {
        if (!got.defined()) return;
        TORCH_CHECK(
            laid_out_alike(hosts[i], got) && suggested(hosts[i]) == suggested(got), op.operator_name(), " gives strides ", got.strides(), " and not ",
            hosts[i].strides(), ", as its Meta kernel says");
        hosts[i++].copy_(got);
      });
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
  const size_t first_; // of the arguments on the stack
  int card_ = -1;
  bool fresh_ = false; // whether there are results that are no arguments
  bool grows_ = false; // whether what is written into has no memory yet
  std::vector<std::pair<at::Tensor, at::Tensor>> growing_; // such a tensor, and one on the meta device
  torch::jit::Stack foreseen_; // the results on the meta device
  torch::jit::Stack arguments_; // as the host's kernel gets them
  torch::jit::Stack results_;
  Into into_; // for each fresh result where its tensors belong, in host memory
};

} // namespace

bool order_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  return Ordering(op, *stack).order_it();
}

bool waits_for_numbers(const c10::OperatorHandle& op) {
  return op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
}

std::vector<std::string> run_at_once() {
  const Locked lock;
  std::vector<std::string> names(at_once.begin(), at_once.end());
  at_once.clear();
  return names;
}

void note_at_once(const c10::OperatorHandle& op) {
  const Locked lock;
  at_once.insert(c10::toString(op.operator_name()));
}

} // namespace sim
