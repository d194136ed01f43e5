#include "memory.h"

#include "streams.h"

#include <c10/core/CPUAllocator.h>

#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <set>

namespace sim {
namespace {

// What outlives the process's last tensor is never taken down.
auto& cards = *new std::array<Card, MAX_CARDS>;
std::atomic<int> cards_in_use{0};
std::mutex configuring;
thread_local int current_card = 0;
std::atomic<bool> caching{false};
std::atomic<int64_t> context_bytes{0};

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

// What tensors may take of a card. To be called with its lock.
int64_t room(const Card& asked) {
  return asked.limit - (asked.context ? context_bytes.load() : 0);
}

int64_t taken(const Card& asked) {
  return caching ? asked.segments->reserved() : asked.bytes.current;
}

// The wording is that of CUDA's allocator, so that what reads it there reads it here.
[[noreturn]] void out_of_memory(int index, const Card& full, int64_t wanted, bool on_demand) {
  const int64_t used = full.bytes.current;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false,
      "sim out of memory. Tried to allocate ", printed(wanted), ". SIM ", index,
      " has a total capacity of ", printed(full.limit), " of which ",
      printed(std::max<int64_t>(0, room(full) - taken(full))), " is free. Of the allocated memory ",
      printed(used), " is allocated by PyTorch, and ", printed(std::max<int64_t>(0, taken(full) - used)),
      " is reserved by PyTorch but unallocated.", on_demand ? " This allocation was made to fail on demand." : "");
  std::abort();
}

// Memory that was given back while other streams were at work on it.
struct Leaving {
  std::shared_ptr<Segments> segments;
  Piece* piece;
  int index;
  std::vector<Mark> users;
};
auto& leaving = *new std::list<Leaving>; // guarded as queues are

// Whoever still reads what was given back reads no number: after what was ordered on its stream until now.
void give_back(const std::shared_ptr<Segments>& segments, int index, Piece* piece) {
  enqueue(index, piece->stream, [segments, data = piece->data, size = piece->size] { std::memset(data, 0xFF, size); });
  segments->give_back(piece);
}

void let_go_of_leaving() {
  for (auto it = leaving.begin(); it != leaving.end();) {
    if (std::all_of(it->users.begin(), it->users.end(), done)) {
      give_back(it->segments, it->index, it->piece);
      it = leaving.erase(it);
    } else {
      ++it;
    }
  }
}

void count_reserved(int index, int64_t bytes) {
  std::lock_guard lock(cards[index].mutex);
  cards[index].reserved.increase(std::max<int64_t>(0, bytes));
  cards[index].reserved.decrease(std::max<int64_t>(0, -bytes));
}

// As with CUDA, this waits for who still uses what was given back, and, where there is something to free, for the card.
void empty_cache(int index) {
  const Locked lock;
  for (const Leaving& each : leaving) {
    if (each.index != index) continue;
    for (const Mark& user : each.users) host_wait(user);
  }
  let_go_of_leaving();
  if (!cards[index].segments->has_free_segment()) return;
  host_wait_all(index);
  count_reserved(index, -cards[index].segments->release());
}

Piece* piece_of(int index, int64_t bytes) {
  const Locked lock;
  const int64_t stream = current_stream(index);
  let_go_of_leaving();
  Card& asked = cards[index];
  if (Piece* found = asked.segments->reuse(stream, bytes)) return found;
  const auto full = [&] {
    return caching && Segments::segment_size(bytes) > room(asked) - asked.segments->reserved();
  };
  if (full()) {
    ++asked.retries;
    empty_cache(index);
  }
  if (full()) {
    ++asked.ooms;
    out_of_memory(index, asked, bytes, false);
  }
  count_reserved(index, Segments::segment_size(bytes));
  return asked.segments->extend(stream, bytes);
}

// Returns the generation of the card that the bytes count on.
int64_t charge(int index, int64_t bytes) {
  make_context(index);
  Card& charged = cards[index];
  std::lock_guard lock(charged.mutex);
  const bool on_demand = charged.fail_in > 0 && --charged.fail_in == 0;
  if (on_demand || (!caching && bytes > room(charged) - charged.bytes.current)) {
    ++charged.ooms;
    out_of_memory(index, charged, bytes, on_demand);
  }
  charged.bytes.increase(bytes);
  charged.blocks.increase(1);
  return charged.generation;
}

void discharge(int index, int64_t bytes, int64_t generation) {
  Card& charged = cards[index];
  std::lock_guard lock(charged.mutex);
  if (charged.generation != generation) return;
  charged.bytes.decrease(bytes);
  charged.blocks.decrease(1);
}

// Bytes counted on a card, and the host memory that stands for them: a piece of its segments, or, where everything
// runs at once and no bytes are reserved, a storage of its own.
struct Block {
  const int index;
  const int64_t bytes;
  const int64_t generation;
  c10::Storage host;
  std::shared_ptr<Segments> segments;
  Piece* piece = nullptr;
  std::set<int64_t> users; // other streams

  Block(int index, int64_t bytes) : index(index), bytes(bytes), generation(charge(index, bytes)) {}
  Block(const Block&) = delete;
  ~Block() {
    if (piece != nullptr) leave();
    discharge(index, bytes, generation);
  }

  void take_piece() {
    segments = cards[index].segments;
    piece = piece_of(index, bytes);
  }

  void leave() {
    const Locked lock;
    std::vector<Mark> marks;
    for (const int64_t user : users) marks.push_back(here(index, user));
    if (marks.empty()) {
      give_back(segments, index, piece);
    } else {
      leaving.push_back({segments, piece, index, std::move(marks)});
    }
  }
};

void release(void* block) {
  delete static_cast<Block*>(block);
}

bool in_segments() {
  return caching || asynchronous();
}

// The block is charged before this is called, so that memory the card lacks is not asked of the host.
c10::DataPtr handed_out(std::unique_ptr<Block> block, c10::Storage host) {
  host.unsafeGetStorageImpl()->set_resizable(false);
  block->host = std::move(host);
  const c10::Device where = device(block->index);
  void* data = block->host.mutable_data();
  return {data, block.release(), &release, where};
}

c10::DataPtr handed_out(std::unique_ptr<Block> block) {
  block->take_piece();
  const c10::Device where = device(block->index);
  void* data = block->piece->data;
  return {data, block.release(), &release, where};
}

// Statistics as torch lays them out, of all pools together.
c10::CachingDeviceAllocator::DeviceStats stats(Card& counted) {
  std::lock_guard lock(counted.mutex);
  c10::CachingDeviceAllocator::DeviceStats stats;
  constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  stats.allocated_bytes[all] = stats.reserved_bytes[all] = counted.bytes;
  if (caching) stats.reserved_bytes[all] = counted.reserved;
  stats.active_bytes[all] = stats.requested_bytes[all] = counted.bytes;
  stats.allocation[all] = stats.segment[all] = stats.active[all] = counted.blocks;
  stats.num_ooms = counted.ooms;
  stats.num_alloc_retries = counted.retries;
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
    if (in_segments()) return handed_out(std::move(block));
    return handed_out(std::move(block), c10::Storage({}, bytes, c10::GetCPUAllocator()));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, std::size_t bytes) const override { std::memcpy(dest, src, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    for (int index = 0; index < count(); ++index) {
      if (cards[index].context) empty_cache(index);
    }
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override { used_by(data, stream.id()); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    return stats(card(index));
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard lock(card(index).mutex);
    card(index).bytes.reset_accumulated();
    card(index).blocks.reset_accumulated();
    card(index).reserved.reset_accumulated();
    card(index).ooms = card(index).retries = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    std::lock_guard lock(card(index).mutex);
    card(index).bytes.reset_peak();
    card(index).blocks.reset_peak();
    card(index).reserved.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    make_context(index);
    std::lock_guard lock(card(index).mutex);
    const Card& asked = card(index);
    return {std::max<int64_t>(0, room(asked) - taken(asked)), asked.limit};
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
  run_all();
  cards_in_use = 0;
  current_card = 0;
  for (Card& gone : cards) {
    std::lock_guard lock(gone.mutex);
    ++gone.generation;
    gone.bytes = gone.blocks = gone.reserved = {};
    gone.ooms = gone.retries = gone.fail_in = 0;
    gone.context = false;
    gone.segments = std::make_shared<Segments>();
  }
}

void set_caching(bool wanted) {
  caching = wanted;
}

void set_context_bytes(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "a context takes bytes, got ", bytes);
  context_bytes = bytes;
}

void make_context(int64_t index) {
  Card& asked = card(index);
  std::lock_guard lock(asked.mutex);
  asked.context = true;
}

std::vector<int64_t> contexts() {
  std::vector<int64_t> found;
  for (int index = 0; index < count(); ++index) {
    std::lock_guard lock(cards[index].mutex);
    if (cards[index].context) found.push_back(index);
  }
  return found;
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
  if (!in_segments()) return handed_out(std::move(block), std::move(host));
  c10::DataPtr data = handed_out(std::move(block));
  drain(index, current_stream(index)); // who had this memory before may still be at work on it
  std::memcpy(data.get(), host.data(), host.nbytes());
  return data;
}

c10::Storage host_of(const c10::Storage& storage) {
  const auto* block = storage.data_ptr().cast_context<Block>(&release);
  if (block == nullptr) return c10::Storage({}, 0, c10::GetCPUAllocator(), /*resizable=*/true);
  if (block->host) return block->host;
  return c10::Storage({}, storage.nbytes(), c10::DataPtr(block->piece->data, c10::DeviceType::CPU), nullptr, false);
}

void used_by(const c10::DataPtr& data, int64_t stream) {
  auto* block = data.cast_context<Block>(&release);
  if (block == nullptr || block->piece == nullptr || block->piece->stream == stream) return;
  const Locked lock;
  block->users.insert(stream);
}

} // namespace sim
