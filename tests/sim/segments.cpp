#include "segments.h"

#include <cstdlib>
#include <cstring>

namespace sim {
namespace {

constexpr int64_t SMALLEST = 512;
constexpr int64_t SMALL = 1 << 20; // up to here pieces come from small segments
constexpr int64_t SMALL_SEGMENT = 2 << 20;
constexpr int64_t LARGE_SEGMENT = 20 << 20; // for pieces under MIDDLING
constexpr int64_t MIDDLING = 10 << 20;

int64_t up(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

} // namespace

Segments::~Segments() {
  // Whoever has memory of it keeps it alive, so all of it is free and whole.
  release();
}

int64_t Segments::rounded(int64_t bytes) {
  return std::max(SMALLEST, up(bytes, SMALLEST));
}

int64_t Segments::segment_size(int64_t bytes) {
  const int64_t size = rounded(bytes);
  return size <= SMALL ? SMALL_SEGMENT : size < MIDDLING ? LARGE_SEGMENT : up(size, SMALL_SEGMENT);
}

int64_t Segments::segment_of(const Piece* piece) const {
  return std::prev(segments_.upper_bound(piece->data))->second;
}

Segments::Pool& Segments::pool(int64_t stream, int64_t segment_bytes) {
  return free_[{stream, segment_bytes == SMALL_SEGMENT}];
}

Piece* Segments::reuse(int64_t stream, int64_t bytes) {
  const int64_t size = rounded(bytes);
  Pool& of_stream = pool(stream, segment_size(bytes));
  Piece wanted{nullptr, size, stream};
  const auto found = of_stream.lower_bound(&wanted);
  if (found == of_stream.end()) return nullptr;
  Piece* piece = *found;
  of_stream.erase(found);
  return split(piece, size);
}

Piece* Segments::extend(int64_t stream, int64_t bytes) {
  const int64_t size = segment_size(bytes);
  auto* data = static_cast<char*>(std::aligned_alloc(SMALLEST, size));
  std::memset(data, 0xFF, size);
  segments_[data] = size;
  reserved_ += size;
  return split(new Piece{data, size, stream}, rounded(bytes));
}

// The rest stays free: of small segments any, of large ones only more than a mebibyte.
Piece* Segments::split(Piece* piece, int64_t size) {
  const int64_t segment = segment_of(piece), rest = piece->size - size;
  if (rest >= (segment == SMALL_SEGMENT ? SMALLEST : SMALL + 1)) {
    auto* free = new Piece{piece->data + size, rest, piece->stream, false, piece, piece->after};
    if (free->after != nullptr) free->after->before = free;
    piece->after = free;
    piece->size = size;
    pool(piece->stream, segment).insert(free);
  }
  piece->used = true;
  return piece;
}

void Segments::give_back(Piece* piece) {
  Pool& of_stream = pool(piece->stream, segment_of(piece));
  piece->used = false;
  if (piece->before != nullptr && !piece->before->used) {
    Piece* before = piece->before;
    of_stream.erase(before);
    before->size += piece->size;
    before->after = piece->after;
    if (before->after != nullptr) before->after->before = before;
    delete piece;
    piece = before;
  }
  if (piece->after != nullptr && !piece->after->used) {
    Piece* after = piece->after;
    of_stream.erase(after);
    piece->size += after->size;
    piece->after = after->after;
    if (piece->after != nullptr) piece->after->before = piece;
    delete after;
  }
  of_stream.insert(piece);
}

bool Segments::has_free_segment() const {
  for (const auto& entry : free_) {
    for (const Piece* piece : entry.second) {
      if (piece->before == nullptr && piece->after == nullptr) return true;
    }
  }
  return false;
}

int64_t Segments::release() {
  int64_t released = 0;
  for (auto& entry : free_) {
    for (auto it = entry.second.begin(); it != entry.second.end();) {
      Piece* piece = *it;
      if (piece->before != nullptr || piece->after != nullptr) {
        ++it;
        continue;
      }
      it = entry.second.erase(it);
      released += piece->size;
      segments_.erase(piece->data);
      std::free(piece->data);
      delete piece;
    }
  }
  reserved_ -= released;
  return released;
}

} // namespace sim
