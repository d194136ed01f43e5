// Operators that are put into the stream of their card, with results that are there before they are computed.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace sim {

// Orders an operator: its Meta kernel tells the results' shapes, and the host's kernel runs later. False, and nothing
// changed, for one that draws, whose results depend on numbers, or that torch cannot foresee: it must run at once.
bool order_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// Whether the host needs numbers from a card before the operator can return.
bool waits_for_numbers(const c10::OperatorHandle& op);

std::vector<std::string> run_at_once(); // names of operators that were not ordered since the last call
void note_at_once(const c10::OperatorHandle& op);

} // namespace sim
