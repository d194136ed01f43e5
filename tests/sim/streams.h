// Streams of the simulated cards: what is ordered runs at once, or when somebody must wait for it.
#pragma once

#include "clock.h"

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace sim {

// Must not drop the last reference to a tensor that Python knows: torch takes Python's lock for that.
using Task = std::function<void()>;

// When what is ordered runs. Any number from FIRST_SEED on draws it.
constexpr int64_t SYNCHRONOUS = -1; // at once: there is nothing to wait for
constexpr int64_t LATE = 0; // when somebody waits for it
constexpr int64_t EARLY = 1; // on side streams at once, on default streams when somebody waits for it
constexpr int64_t FIRST_SEED = 2;

// A point in a stream: after its first `tasks` tasks, and when they end on the virtual clock.
struct Mark {
  int card = 0;
  int64_t stream = 0;
  uint64_t tasks = 0;
  Picoseconds time = 0;
};

// Whoever touches queues or memory holds this lock, and waits for it without Python's.
class Locked {
 public:
  Locked();

 private:
  std::unique_lock<std::recursive_mutex> lock_;
};

void set_schedule(int64_t wanted); // runs what is still ordered first
bool asynchronous();

int64_t current_stream(int card); // of the calling thread
int64_t exchange_stream(int card, int64_t stream);
int64_t next_stream(); // of the 32 that all who ask for new ones share, as with CUDA

// Puts a task that keeps an engine busy for so long behind all that was ordered on the stream.
void order(int card, int64_t stream, Task task, const Engines& engines = {}, Picoseconds length = 0);
// The same without looking for failures: for what must not throw.
void enqueue(int card, int64_t stream, Task task, const Engines& engines = {}, Picoseconds length = 0);
Mark here(int card, int64_t stream); // after everything that was ordered so far
bool done(const Mark& mark);
bool poll(const Mark& mark); // whether it was done; a card goes on while the host asks
void wait_on_stream(int card, int64_t stream, const Mark& mark); // the stream goes on behind the mark
void host_wait(const Mark& mark); // the calling thread does; raises what a task of the card failed with
void host_wait_all(int card);
void drain(int card, int64_t stream); // runs what was ordered, as if it were behind the caller: no host waits

// Fails the nth next task of the card that keeps its compute engine busy (1 is the very next).
void fail_kernel(int64_t card, int64_t nth);
void fail_if_due(int card); // where kernels run at once
void check_failure(int card); // raises what a task of the card failed with, for ever
void clear_streams(); // runs what is ordered, and forgets failures, waits and times

void run_all(); // everything that is ordered

int64_t host_waits(); // how often the host waited for something that was not done
std::vector<std::string> places_of_waits(); // where in Python's code, innermost first, if that was asked for
void tell_places_of_waits(bool wanted);

} // namespace sim
