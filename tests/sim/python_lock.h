// Waiting without Python's lock.
#pragma once

#include <Python.h>

namespace sim {

// Lets go of Python's lock where this thread holds it: torch takes it to drop a tensor that Python knows, and whoever is
// at work on a card may drop one.
class WithoutPython {
 public:
  WithoutPython() : state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutPython() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutPython(const WithoutPython&) = delete;
  WithoutPython& operator=(const WithoutPython&) = delete;

 private:
  PyThreadState* state_;
};

} // namespace sim
