// Running the host's kernels on the memory of the simulated cards.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace sim {

// The same bytes, sizes and strides as a host tensor. Nothing is copied.
at::Tensor on_host(const at::Tensor& tensor);

// A host tensor again, which does not keep its memory: tasks must not keep what Python knows.
at::Tensor borrowed(const at::Tensor& host);

// Runs the host's kernel of any operator, or orders it. Inputs are read and written where they are, results that
// share memory with an input stay views of it, and fresh results become allocations of the card.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack);

at::Generator& default_generator(int64_t index);

} // namespace sim
