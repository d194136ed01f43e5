#include "pinned.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_set>

namespace sim {
namespace {

std::mutex mutex;
std::unordered_set<const void*> pinned;

void unpin(void* context) {
  auto* host = static_cast<c10::DataPtr*>(context);
  {
    std::lock_guard lock(mutex);
    pinned.erase(host->get());
  }
  delete host;
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* host = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    std::lock_guard lock(mutex);
    if (bytes > 0) pinned.insert(host->get());
    return {host->get(), host, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* dest, const void* src, std::size_t bytes) const override {
    default_copy_data(dest, src, bytes);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator allocator;
REGISTER_HOST_ALLOCATOR(at::DeviceType::PrivateUse1, &allocator)

} // namespace

c10::Allocator* pinned_allocator() {
  return &allocator;
}

bool is_pinned(const void* data) {
  std::lock_guard lock(mutex);
  return pinned.count(data) > 0;
}

} // namespace sim
