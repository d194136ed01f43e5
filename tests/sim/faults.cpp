#include "faults.h"

#include "memory.h"

#include <atomic>
#include <chrono>
#include <set>
#include <thread>

namespace sim {
namespace {

constexpr int PLACES = MAX_CARDS + 1; // the host and every card

template <typename T>
using PerPair = std::array<std::array<std::atomic<T>, PLACES>, PLACES>;

PerPair<int64_t> copied_bytes{};
PerPair<Corruption> corruptions{};
std::array<std::mutex, MAX_CARDS> working;
std::atomic<double> kernel_seconds{0};
std::atomic<double> byte_seconds{0};
std::atomic<bool> has_bfloat16{true};

template <typename T>
std::atomic<T>& at(PerPair<T>& table, int64_t source, int64_t destination) {
  return table[source - HOST][destination - HOST];
}

void check_place(int64_t place) {
  if (place != HOST) card(place);
}

template <typename T>
void fill(PerPair<T>& table, T value) {
  for (auto& row : table) {
    for (auto& entry : row) entry = value;
  }
}

} // namespace

void fail_allocation(int64_t index, int64_t nth) {
  TORCH_CHECK_VALUE(nth >= 1, "the next allocation is number 1, got ", nth);
  Card& failing = card(index);
  std::lock_guard lock(failing.mutex);
  failing.fail_in = nth;
}

void delay(double per_kernel_seconds, double per_copied_byte_seconds) {
  TORCH_CHECK_VALUE(per_kernel_seconds >= 0 && per_copied_byte_seconds >= 0, "a delay is 0 seconds or more");
  kernel_seconds = per_kernel_seconds;
  byte_seconds = per_copied_byte_seconds;
}

void corrupt(int64_t source, int64_t destination, Corruption how) {
  check_place(source);
  check_place(destination);
  at(corruptions, source, destination) = how;
}

void set_bfloat16(bool supported) {
  has_bfloat16 = supported;
}

bool bfloat16() {
  return has_bfloat16;
}

void clear_faults() {
  for (int index = 0; index < count(); ++index) {
    std::lock_guard lock(card(index).mutex);
    card(index).fail_in = 0;
  }
  delay(0, 0);
  fill(corruptions, Corruption::none);
  has_bfloat16 = true;
}

Corruption corruption(int source, int destination) {
  return at(corruptions, source, destination);
}

void count_copy(int source, int destination, int64_t bytes) {
  at(copied_bytes, source, destination) += bytes;
}

std::vector<int64_t> copied() {
  std::vector<int64_t> flat;
  for (int64_t source = HOST; source < MAX_CARDS; ++source) {
    for (int64_t destination = HOST; destination < MAX_CARDS; ++destination) {
      const int64_t bytes = at(copied_bytes, source, destination);
      if (bytes > 0) flat.insert(flat.end(), {source, destination, bytes});
    }
  }
  return flat;
}

void clear_copied() {
  fill<int64_t>(copied_bytes, 0);
}

Work Work::kernel(int index) {
  return {{index}, kernel_seconds};
}

Work Work::copy(int source, int destination, int64_t bytes) {
  return {{source, destination}, byte_seconds * static_cast<double>(bytes)};
}

Work::Work(std::initializer_list<int> cards, double seconds) {
  if (kernel_seconds == 0 && byte_seconds == 0) return;
  // In the order of their indices, so that two copies in opposite directions cannot wait for each other.
  for (const int index : std::set<int>(cards)) {
    if (index != HOST) locks_.emplace_back(working[index]);
  }
  if (seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

} // namespace sim
