// Memory as CUDA's caching allocator deals it out: in segments, which belong to a stream and are kept.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <set>

namespace sim {

// A part of a segment: in use, or free between others.
struct Piece {
  char* data;
  int64_t size;
  int64_t stream;
  bool used = false;
  Piece* before = nullptr; // in the same segment
  Piece* after = nullptr;
};

// Sizes, pools and splitting are those of c10/cuda/CUDACachingAllocator.cpp of torch 2.13, without expandable segments.
class Segments {
 public:
  Segments() = default;
  ~Segments();
  Segments(const Segments&) = delete;
  // A free piece of at least so many bytes, as small as there is, of those of this stream; null if there is none.
  Piece* reuse(int64_t stream, int64_t bytes);
  // A piece of a new segment.
  Piece* extend(int64_t stream, int64_t bytes);
  void give_back(Piece* piece);
  bool has_free_segment() const;
  int64_t release(); // lets go of segments that are free as a whole; how many bytes those are
  int64_t reserved() const { return reserved_; }
  static int64_t rounded(int64_t bytes); // what a piece of so many bytes takes
  static int64_t segment_size(int64_t bytes); // and a segment that is made for it

 private:
  struct Smaller {
    bool operator()(const Piece* a, const Piece* b) const {
      return a->size != b->size ? a->size < b->size : a->data < b->data;
    }
  };
  using Pool = std::set<Piece*, Smaller>;

  Pool& pool(int64_t stream, int64_t segment_bytes);
  Piece* split(Piece* piece, int64_t bytes);

  std::map<std::pair<int64_t, bool>, Pool> free_; // by stream, and whether segments are small
  std::map<char*, int64_t> segments_; // bytes of each
  std::atomic<int64_t> reserved_{0};
  int64_t segment_of(const Piece* piece) const;
};

} // namespace sim
