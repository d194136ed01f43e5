#include <Python.h>

#include "streams.h"

#include "memory.h"
#include "python_lock.h"

#include <deque>
#include <map>

namespace sim {
namespace {

constexpr int64_t POOLED_STREAMS = 32;
// The wording is that of CUDA.
constexpr const char* LAUNCH_FAILURE = "sim error: unspecified launch failure";

struct Queue {
  std::deque<Task> tasks;
  uint64_t begun = 0; // tasks that were taken off
  uint64_t ordered = 0; // tasks ever put on
  Picoseconds time = 0; // when the last one ends
};

struct Failure {
  int64_t fail_in = 0; // the kernel, counted from now, that fails; 0 for none
  std::string text; // what one failed with
};

std::recursive_mutex world; // guards everything below
auto& queues = *new std::map<std::pair<int, int64_t>, Queue>;
std::array<Failure, MAX_CARDS> failures;
uint64_t drawn = 0;
int running = 0; // tasks that are being run, one inside the other
std::vector<std::string> waits;
bool tell_places = false;

std::atomic<int64_t> schedule{SYNCHRONOUS};
std::atomic<int64_t> waited{0};
std::atomic<int64_t> streams_given{0};
thread_local std::array<int64_t, MAX_CARDS> streams_of_thread{};

void run(int card, const Task& task) {
  ++running;
  try {
    task();
  } catch (const c10::Error& error) {
    if (failures[card].text.empty()) failures[card].text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    if (failures[card].text.empty()) failures[card].text = error.what();
  }
  --running;
}

void run_next(int card, Queue& queue) {
  const Task task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  ++queue.begun;
  run(card, task);
}

void run_to(const Mark& mark) {
  Queue& queue = queues[{mark.card, mark.stream}];
  while (queue.begun < mark.tasks) run_next(mark.card, queue);
}

// What runs by itself after something was ordered.
void hurry(int card, int64_t stream) {
  if (schedule == EARLY && stream != 0) run_to(here(card, stream));
  if (schedule < FIRST_SEED) return;
  for (;;) {
    drawn = drawn * 6364136223846793005ull + 1442695040888963407ull;
    if (drawn >> 62 == 0) return;
    auto it = queues.begin();
    std::advance(it, (drawn >> 33) % queues.size());
    if (it->second.begun < it->second.ordered) run_next(it->first.first, it->second);
  }
}

bool due(int card) {
  return failures[card].fail_in > 0 && --failures[card].fail_in == 0;
}

std::string place_in_python() {
  const PyGILState_STATE state = PyGILState_Ensure();
  std::string told;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const char* file = PyUnicode_AsUTF8(code->co_filename);
    const char* name = PyUnicode_AsUTF8(code->co_qualname);
    told += (told.empty() ? "" : " < ") + std::string(file) + ":" + std::to_string(PyFrame_GetLineNumber(frame)) +
        " " + name;
    Py_DECREF(code);
    PyFrameObject* outer = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = outer;
  }
  PyGILState_Release(state);
  return told;
}

void note_wait() {
  ++waited;
  {
    const Locked lock;
    if (!tell_places) return;
  }
  const std::string place = place_in_python();
  const Locked lock;
  waits.push_back(place);
}

} // namespace

Locked::Locked() : lock_(world, std::try_to_lock) {
  if (lock_.owns_lock()) return;
  const WithoutPython waiting;
  lock_.lock();
}

void set_schedule(int64_t wanted) {
  TORCH_CHECK_VALUE(wanted >= SYNCHRONOUS, "a schedule is a number from ", SYNCHRONOUS, " on, got ", wanted);
  const Locked lock;
  run_all();
  schedule = wanted;
  drawn = static_cast<uint64_t>(wanted);
}

bool asynchronous() {
  return schedule != SYNCHRONOUS;
}

int64_t current_stream(int card) {
  return streams_of_thread.at(card);
}

int64_t exchange_stream(int card, int64_t stream) {
  return std::exchange(streams_of_thread.at(card), stream);
}

int64_t next_stream() {
  return streams_given++ % POOLED_STREAMS + 1;
}

void order(int card, int64_t stream, Task task, const Engines& engines, Picoseconds length) {
  if (!asynchronous()) {
    if (!engines.empty() && engines[0].second == Engine::compute) fail_if_due(card);
    task();
    return;
  }
  check_failure(card);
  enqueue(card, stream, std::move(task), engines, length);
}

void enqueue(int card, int64_t stream, Task task, const Engines& engines, Picoseconds length) {
  const Locked lock;
  Queue& queue = queues[{card, stream}];
  if (!engines.empty() && engines[0].second == Engine::compute && due(card)) {
    task = [] { TORCH_CHECK(false, LAUNCH_FAILURE); };
  }
  queue.time = book(engines, std::max(queue.time, host_time()), length);
  queue.tasks.push_back(std::move(task));
  ++queue.ordered;
  if (running == 0) hurry(card, stream);
}

Mark here(int card, int64_t stream) {
  const Locked lock;
  const Queue& queue = queues[{card, stream}];
  return {card, stream, queue.ordered, queue.time};
}

bool done(const Mark& mark) {
  const Locked lock;
  return queues[{mark.card, mark.stream}].begun >= mark.tasks;
}

bool poll(const Mark& mark) {
  const Locked lock;
  if (done(mark)) return true;
  run_next(mark.card, queues[{mark.card, mark.stream}]);
  return false;
}

void wait_on_stream(int card, int64_t stream, const Mark& mark) {
  if (mark.card == card && mark.stream == stream) return;
  const Locked lock;
  order(card, stream, [mark] { run_to(mark); });
  Queue& queue = queues[{card, stream}];
  queue.time = std::max(queue.time, mark.time);
}

void host_wait(const Mark& mark) {
  if (!done(mark)) note_wait();
  const Locked lock;
  run_to(mark);
  host_reached(mark.time);
  check_failure(mark.card);
}

void host_wait_all(int card) {
  std::vector<Mark> marks;
  {
    const Locked lock;
    for (const auto& [key, queue] : queues) {
      if (key.first == card) marks.push_back({card, key.second, queue.ordered, queue.time});
    }
  }
  bool all_done = true;
  for (const Mark& mark : marks) all_done = all_done && done(mark);
  if (!all_done) note_wait();
  const Locked lock;
  for (const Mark& mark : marks) {
    run_to(mark);
    host_reached(mark.time);
  }
  check_failure(card);
}

void drain(int card, int64_t stream) {
  const Locked lock;
  run_to(here(card, stream));
  check_failure(card);
}

void run_all() {
  const Locked lock;
  // A task may order more, such as what spoils memory that it gave back.
  for (bool more = true; more;) {
    more = false;
    for (auto& [key, queue] : queues) {
      more = more || queue.begun < queue.ordered;
      run_to({key.first, key.second, queue.ordered});
    }
  }
}

void fail_kernel(int64_t index, int64_t nth) {
  TORCH_CHECK_VALUE(nth >= 1, "the next kernel is number 1, got ", nth);
  card(index);
  const Locked lock;
  failures[index].fail_in = nth;
}

void fail_if_due(int index) {
  const Locked lock;
  if (due(index)) failures[index].text = LAUNCH_FAILURE;
  check_failure(index);
}

void check_failure(int index) {
  const Locked lock;
  TORCH_CHECK(failures[index].text.empty(), failures[index].text);
}

void clear_streams() {
  const Locked lock;
  run_all();
  // Events may still name what was ordered by its number.
  for (auto& entry : queues) entry.second.time = 0;
  failures = {};
  waits.clear();
  waited = 0;
  clear_clock();
}

int64_t host_waits() {
  return waited;
}

std::vector<std::string> places_of_waits() {
  const Locked lock;
  return waits;
}

void tell_places_of_waits(bool wanted) {
  const Locked lock;
  tell_places = wanted;
}

} // namespace sim
