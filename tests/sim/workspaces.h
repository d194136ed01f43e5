// Workspaces that matrix products take on a card, one for each handle and stream, until somebody clears them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>

namespace sim {

void set_workspace_bytes(int64_t bytes); // 0, as at first, for none
void take_workspace(const c10::OperatorHandle& op, int card, int64_t stream); // where the operator needs one
void clear_workspaces();

} // namespace sim
