#include "workspaces.h"

#include "memory.h"
#include "streams.h"

#include <c10/core/DeviceGuard.h>

#include <map>
#include <set>

namespace sim {
namespace {

std::atomic<int64_t> workspace_bytes{0};
// All guarded as queues are.
auto& idle_handles = *new std::set<int64_t>;
int64_t handles_made = 0;
auto& workspaces = *new std::map<std::tuple<int64_t, int, int64_t>, c10::DataPtr>; // by handle, card and stream

// Of the calling thread; a thread that ends leaves it to the next one that needs one, as with cuBLAS in torch.
struct Handle {
  int64_t number;
  Handle() {
    const Locked lock;
    if (idle_handles.empty()) {
      number = handles_made++;
    } else {
      number = *idle_handles.begin();
      idle_handles.erase(number);
    }
  }
  ~Handle() {
    const Locked lock;
    idle_handles.insert(number);
  }
};

bool multiplies(const c10::OperatorHandle& op) {
  static const std::set<std::string> names{
      "aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_", "aten::addbmm",
      "aten::mv", "aten::addmv", "aten::dot"};
  return names.count(op.operator_name().name) > 0;
}

} // namespace

void set_workspace_bytes(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "a workspace takes bytes, got ", bytes);
  workspace_bytes = bytes;
}

void take_workspace(const c10::OperatorHandle& op, int card, int64_t stream) {
  if (workspace_bytes == 0 || !multiplies(op)) return;
  thread_local Handle handle;
  const Locked lock;
  c10::DataPtr& workspace = workspaces[{handle.number, card, stream}];
  if (workspace) return;
  const c10::DeviceGuard guard(c10::Device(c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(card)));
  workspace = allocator()->allocate(workspace_bytes);
}

void clear_workspaces() {
  const Locked lock;
  workspaces.clear();
}

} // namespace sim
