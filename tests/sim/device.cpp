// The simulated cards as torch devices: the current card, streams, events and hooks.
#include "faults.h"
#include "kernels.h"
#include "memory.h"
#include "pinned.h"
#include "streams.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>
#include <cstring>

namespace sim {
namespace {

constexpr c10::DeviceType TYPE = c10::DeviceType::PrivateUse1;

using Clock = std::chrono::steady_clock;

// What an event marks: a point in a stream, and the real time at which the host came by.
struct Recorded {
  Mark mark;
  Clock::time_point time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(count()); }

  c10::Device getDevice() const override { return {TYPE, static_cast<c10::DeviceIndex>(current())}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    make_context(device.index());
    return {TYPE, static_cast<c10::DeviceIndex>(exchange(device.index()))};
  }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange(device.index()); }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    c10::DeviceCapability able;
    able.capability_data.supported_scalar_types.has_BFloat16 = bfloat16();
    return able;
  }

  c10::Stream getStream(c10::Device device) const override { return stream(device, current_stream(device.index())); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    make_context(device.index());
    return stream(device, next_stream());
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(next.device(), exchange_stream(next.device_index(), next.id()));
  }
  bool queryStream(const c10::Stream& asked) const override { return poll(here(asked.device_index(), asked.id())); }
  void synchronizeStream(const c10::Stream& asked) const override {
    host_wait(here(asked.device_index(), asked.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    make_context(index);
    host_wait_all(index);
  }

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Recorded;
    *static_cast<Recorded*>(*event) = {here(on.device_index(), on.id()), Clock::now()};
  }
  void block(void* event, const c10::Stream& waiting) const override {
    if (event != nullptr) wait_on_stream(waiting.device_index(), waiting.id(), static_cast<Recorded*>(event)->mark);
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || poll(static_cast<Recorded*>(event)->mark);
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) host_wait(static_cast<Recorded*>(event)->mark);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Recorded*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    used_by(data, stream.id());
  }
  // Milliseconds, of the virtual clock where kernels are ordered.
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    const auto* from = static_cast<Recorded*>(start);
    const auto* to = static_cast<Recorded*>(end);
    if (asynchronous()) return static_cast<double>(to->mark.time - from->mark.time) / 1e9;
    return std::chrono::duration<double, std::milli>(to->time - from->time).count();
  }

 private:
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    card(device.index());
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override {
    const std::vector<int64_t> found = contexts();
    return std::find(found.begin(), found.end(), index) != found.end();
  }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(count()); }

  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current()); }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchangeDevice(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    card(index);
    return static_cast<c10::DeviceIndex>(exchange(index));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? getCurrentDevice() : exchangeDevice(index);
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index < 0 ? current() : index);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    c10::DataPtr resized = allocator()->allocate(bytes);
    host_wait_all(storage.device().index());
    if (bytes > 0 && storage.nbytes() > 0) {
      std::memcpy(resized.get(), storage.data(), std::min(bytes, storage.nbytes()));
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(resized));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

} // namespace
} // namespace sim
