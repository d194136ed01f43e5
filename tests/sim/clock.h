// The virtual clock: when each engine of each card is busy, whatever the real time.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace sim {

using Picoseconds = int64_t;

enum class Engine : int64_t { compute, in, out };
using Engines = std::vector<std::pair<int, Engine>>; // of which card which

Picoseconds picoseconds(double seconds);

// Keeps the engines busy for so long together, from the first moment on at which all are free and that is not
// before `ready`. Returns when that ends.
Picoseconds book(const Engines& engines, Picoseconds ready, Picoseconds length);

Picoseconds host_time(); // of the calling thread, which only waits take time of
void host_reached(Picoseconds time);

std::vector<int64_t> booked(); // card, engine, begin and end of each time at which one is busy, flat
void clear_clock();

} // namespace sim
