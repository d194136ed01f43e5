#include "memory.h"

#include <c10/core/CPUAllocator.h>

#include <cstdio>
#include <cstring>
#include <memory>

namespace sim {
namespace {

std::array<Card, MAX_CARDS> cards;
std::atomic<int> cards_in_use{0};
std::mutex configuring;
thread_local int current_card = 0;

c10::Device device(int index) {
  return {c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(index)};
}

std::string printed(int64_t bytes) {
  const char* units[] = {"bytes", "KiB", "MiB", "GiB"};
  int unit = 0;
  double size = static_cast<double>(bytes);
  for (; size >= 1024 && unit < 3; ++unit) size /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", size, units[unit]);
  return text;
}

// The wording is that of CUDA's allocator, so that what reads it there reads it here.
[[noreturn]] void out_of_memory(int index, const Card& full, int64_t wanted, bool on_demand) {
  const int64_t used = full.bytes.current;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false,
      "sim out of memory. Tried to allocate ", printed(wanted), ". SIM ", index,
      " has a total capacity of ", printed(full.limit), " of which ",
      printed(std::max<int64_t>(0, full.limit - used)), " is free. Of the allocated memory ",
      printed(used), " is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated.",
      on_demand ? " This allocation was made to fail on demand." : "");
  std::abort();
}

// Returns the generation of the card that the bytes count on.
int64_t charge(int index, int64_t bytes) {
  Card& charged = card(index);
  std::lock_guard lock(charged.mutex);
  const bool on_demand = charged.fail_in > 0 && --charged.fail_in == 0;
  if (on_demand || bytes > charged.limit - charged.bytes.current) {
    ++charged.ooms;
    out_of_memory(index, charged, bytes, on_demand);
  }
  charged.bytes.increase(bytes);
  charged.blocks.increase(1);
  return charged.generation;
}

// Bytes counted on a card, and the host memory that stands for them.
struct Block {
  const int index;
  const int64_t bytes;
  const int64_t generation;
  c10::Storage host;

  Block(int index, int64_t bytes) : index(index), bytes(bytes), generation(charge(index, bytes)) {}
  Block(const Block&) = delete;
  ~Block() {
    Card& charged = cards[index];
    std::lock_guard lock(charged.mutex);
    if (charged.generation != generation) return;
    charged.bytes.decrease(bytes);
    charged.blocks.decrease(1);
  }
};

void release(void* block) {
  delete static_cast<Block*>(block);
}

// The block is charged before this is called, so that memory the card lacks is not asked of the host.
c10::DataPtr handed_out(std::unique_ptr<Block> block, c10::Storage host) {
  host.unsafeGetStorageImpl()->set_resizable(false);
  block->host = std::move(host);
  const c10::Device where = device(block->index);
  void* data = block->host.mutable_data();
  return {data, block.release(), &release, where};
}

// Statistics as torch lays them out: every pool is the same pool, and nothing is cached.
c10::CachingDeviceAllocator::DeviceStats stats(Card& counted) {
  std::lock_guard lock(counted.mutex);
  c10::CachingDeviceAllocator::DeviceStats stats;
  constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  stats.allocated_bytes[all] = stats.reserved_bytes[all] = counted.bytes;
  stats.active_bytes[all] = stats.requested_bytes[all] = counted.bytes;
  stats.allocation[all] = stats.segment[all] = stats.active[all] = counted.blocks;
  stats.num_ooms = counted.ooms;
  stats.num_device_alloc = counted.blocks.allocated;
  stats.num_device_free = counted.blocks.freed;
  return stats;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int index = current();
    card(index);
    if (bytes == 0) return {nullptr, nullptr, &release, device(index)};
    auto block = std::make_unique<Block>(index, bytes);
    return handed_out(std::move(block), c10::Storage({}, bytes, c10::GetCPUAllocator()));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, std::size_t bytes) const override { std::memcpy(dest, src, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    return stats(card(index));
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard lock(card(index).mutex);
    card(index).bytes.reset_accumulated();
    card(index).blocks.reset_accumulated();
    card(index).ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    std::lock_guard lock(card(index).mutex);
    card(index).bytes.reset_peak();
    card(index).blocks.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    std::lock_guard lock(card(index).mutex);
    const Card& asked = card(index);
    return {std::max<int64_t>(0, asked.limit - asked.bytes.current), asked.limit};
  }
};

Allocator the_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &the_allocator);

} // namespace

Card& card(int64_t index) {
  TORCH_CHECK(
      index >= 0 && index < count(),
      "sim error: invalid device ordinal ", index, ", there are ", count(), " simulated cards");
  return cards[index];
}

int count() {
  return cards_in_use;
}

void configure(const std::vector<int64_t>& limits) {
  std::lock_guard one_at_a_time(configuring);
  const int wanted = static_cast<int>(limits.size());
  TORCH_CHECK_VALUE(wanted <= MAX_CARDS, "at most ", MAX_CARDS, " simulated cards, got ", wanted);
  for (int index = 0; index < wanted; ++index) {
    TORCH_CHECK_VALUE(limits[index] >= 0, "a limit is bytes, got ", limits[index], " for sim:", index);
  }
  for (int index = wanted; index < count(); ++index) {
    std::lock_guard lock(cards[index].mutex);
    TORCH_CHECK_VALUE(
        cards[index].bytes.current == 0,
        "sim:", index, " cannot vanish: ", cards[index].bytes.current, " bytes are still allocated on it");
  }
  for (int index = 0; index < wanted; ++index) {
    std::lock_guard lock(cards[index].mutex);
    cards[index].limit = limits[index];
  }
  cards_in_use = wanted;
  current_card = 0;
}

void withdraw() {
  std::lock_guard one_at_a_time(configuring);
  cards_in_use = 0;
  current_card = 0;
  for (Card& gone : cards) {
    std::lock_guard lock(gone.mutex);
    ++gone.generation;
    gone.bytes = gone.blocks = {};
    gone.ooms = gone.fail_in = 0;
  }
}

int current() {
  return current_card;
}

int exchange(int index) {
  return std::exchange(current_card, index);
}

c10::DeviceAllocator* allocator() {
  return &the_allocator;
}

c10::DataPtr adopt(int index, c10::Storage host) {
  auto block = std::make_unique<Block>(index, host.nbytes());
  return handed_out(std::move(block), std::move(host));
}

const c10::Storage* host_of(const c10::Storage& storage) {
  const auto* block = storage.data_ptr().cast_context<Block>(&release);
  return block ? &block->host : nullptr;
}

} // namespace sim
