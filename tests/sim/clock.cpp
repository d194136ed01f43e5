#include "clock.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <mutex>

namespace sim {
namespace {

std::mutex booking;
std::map<std::pair<int, Engine>, std::map<Picoseconds, Picoseconds>> busy; // begins and ends
std::atomic<int64_t> epoch{0};

struct HostTime {
  int64_t epoch = -1;
  Picoseconds time = 0;
};
thread_local HostTime host;

HostTime& host_now() {
  if (host.epoch != epoch) host = {epoch, 0};
  return host;
}

// The first moment from `begin` on at which this engine is free for so long.
Picoseconds free_from(const std::map<Picoseconds, Picoseconds>& times, Picoseconds begin, Picoseconds length) {
  auto next = times.upper_bound(begin);
  if (next != times.begin()) begin = std::max(begin, std::prev(next)->second);
  for (; next != times.end() && next->first < begin + length; ++next) begin = std::max(begin, next->second);
  return begin;
}

// Neighbors are joined, so that there are as many entries as there are pauses.
void keep_busy(std::map<Picoseconds, Picoseconds>& times, Picoseconds begin, Picoseconds end) {
  const auto after = times.find(end);
  if (after != times.end()) {
    end = after->second;
    times.erase(after);
  }
  const auto next = times.lower_bound(begin);
  if (next != times.begin() && std::prev(next)->second == begin) {
    std::prev(next)->second = end;
  } else {
    times.emplace(begin, end);
  }
}

} // namespace

Picoseconds picoseconds(double seconds) {
  return std::llround(seconds * 1e12);
}

Picoseconds book(const Engines& engines, Picoseconds ready, Picoseconds length) {
  if (engines.empty() || length == 0) return ready + length;
  std::lock_guard lock(booking);
  Picoseconds begin = ready;
  for (bool moved = true; moved;) {
    moved = false;
    for (const auto& engine : engines) {
      const Picoseconds later = free_from(busy[engine], begin, length);
      moved = moved || later != begin;
      begin = later;
    }
  }
  for (const auto& engine : engines) keep_busy(busy[engine], begin, begin + length);
  return begin + length;
}

Picoseconds host_time() {
  return host_now().time;
}

void host_reached(Picoseconds time) {
  host_now().time = std::max(host_now().time, time);
}

std::vector<int64_t> booked() {
  std::lock_guard lock(booking);
  std::vector<int64_t> flat;
  for (const auto& [engine, times] : busy) {
    for (const auto& [begin, end] : times) {
      flat.insert(flat.end(), {engine.first, static_cast<int64_t>(engine.second), begin, end});
    }
  }
  return flat;
}

void clear_clock() {
  std::lock_guard lock(booking);
  busy.clear();
  ++epoch;
}

} // namespace sim
