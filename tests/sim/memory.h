// The memory of the simulated cards: limits, counters and the allocator.
#pragma once

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
  int64_t fail_in = 0; // the allocation, counted from now, that fails; 0 for none
  int64_t ooms = 0;
  int64_t generation = 0; // how often the card was withdrawn
  c10::CachingAllocator::Stat bytes;
  c10::CachingAllocator::Stat blocks;
};

Card& card(int64_t index); // throws unless 0 <= index < count()
int count();

// Sets how many cards there are and their limits in bytes. Throws, changing nothing, if a card
// that would vanish still holds bytes.
void configure(const std::vector<int64_t>& limits);

// Leaves no card. What is still allocated stays usable, and counts on no later card.
void withdraw();

int current();
int exchange(int index); // makes a card the calling thread's current one, returns the old one

c10::DeviceAllocator* allocator();

// Counts a storage of host memory as allocated on a card for as long as the result lives.
c10::DataPtr adopt(int index, c10::Storage host);

// The host storage behind memory of ours, null for empty memory. Its bytes are the same bytes.
const c10::Storage* host_of(const c10::Storage& storage);

} // namespace sim
