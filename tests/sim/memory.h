// The memory of the simulated cards: limits, counters and the allocator.
#pragma once

#include "segments.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace sim {

constexpr int MAX_CARDS = 16;

struct Card {
  std::mutex mutex; // guards everything below
  int64_t limit = 0;
  bool context = false; // whether this process has a context on it
  int64_t fail_in = 0; // the allocation, counted from now, that fails; 0 for none
  int64_t ooms = 0;
  int64_t retries = 0; // allocations that were tried again after the cache was emptied
  int64_t generation = 0; // how often the card was withdrawn
  c10::CachingAllocator::Stat bytes;
  c10::CachingAllocator::Stat blocks;
  c10::CachingAllocator::Stat reserved; // of the bytes in segments
  std::shared_ptr<Segments> segments = std::make_shared<Segments>(); // guarded as queues are
};

Card& card(int64_t index); // throws unless 0 <= index < count()
int count();

// Sets how many cards there are and their limits in bytes. Throws, changing nothing, if a card
// that would vanish still holds bytes.
void configure(const std::vector<int64_t>& limits);

// Leaves no card. What is still allocated stays usable, and counts on no later card.
void withdraw();

// Counts the bytes that CUDA's caching allocator would reserve, instead of those that are asked for.
void set_caching(bool wanted);

// What a context takes of a card, outside of the allocator. Nothing else but the limit is known without one.
void set_context_bytes(int64_t bytes);
void make_context(int64_t index);
std::vector<int64_t> contexts(); // the cards on which this process has one

int current();
int exchange(int index); // makes a card the calling thread's current one, returns the old one

c10::DeviceAllocator* allocator();

// Counts a storage of host memory as allocated on a card for as long as the result lives.
c10::DataPtr adopt(int index, c10::Storage host);

// A storage of the host that is memory of a card, null for empty memory. It keeps the memory only where nothing waits.
c10::Storage host_of(const c10::Storage& storage);

// Memory of a card is free for others once these streams, too, are done with what they were asked for until then.
void used_by(const c10::DataPtr& data, int64_t stream);

} // namespace sim
