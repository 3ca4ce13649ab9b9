// How a call is cut into tasks and where its scratch memory comes from.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace coordatt {

// Scratch memory from a buffer the thread keeps (a fresh one would be paid for in page faults), stacked where calls
// nest. Pieces are 64-byte aligned and live until the Scratch goes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* bytes(int64_t count) {
    void* p = at_;
    at_ += round(count);
    return p;
  }
  static int64_t round(int64_t count) { return (count + 63) / 64 * 64; }

 private:
  char* base_;
  char* at_;
  int64_t size_;
  bool kept_;
};

// A part of one image: channels [c0, c1) of rows [h0, h1).
struct Piece {
  int64_t image, c0, c1, h0, h1;
};

// Cuts the map into images, and images into pieces where there are fewer images than threads can share evenly: into groups
// of channels, or (nhwc only) of rows.
class Pieces {
 public:
  enum Along { channels, rows };
  Pieces(const Call& call, int threads, Along along = channels);
  int64_t count() const { return images_ * groups_; }
  bool cut() const { return groups_ > 1; }
  Piece operator[](int64_t i) const {
    int64_t g = i % groups_, begin = g * width_, end = begin + width_ < length_ ? begin + width_ : length_;
    if (along_ == rows) return {i / groups_, 0, other_, begin, end};
    return {i / groups_, begin, end, 0, other_};
  }

 private:
  Along along_;
  int64_t images_, groups_, width_, length_, other_;
};

// Whether a pass without sums should share an image among threads by rows, not by channels. The middle, which is always
// shared by channels, then takes a parallel loop of its own.
bool whole_pixels_pay(const Call&);

template <class F>
void run(const Threads& threads, int64_t count, const F& body) {
  if (count <= 0) return;
  if (threads.count <= 1 || count == 1) return body(int64_t(0), count);
  threads.run(count, [](void* f, int64_t begin, int64_t end) { (*(const F*)f)(begin, end); }, (void*)&body);
}

inline const MixKernels& mix_of(const Kernels& k, DType t) { return k.mix[t == DType::f64 ? 1 : 0]; }
inline char* at(void* base, int64_t elements, int64_t bytes) { return (char*)base + elements * bytes; }

// A rough estimate of a pass over the map and its middle on one thread.
double work_ns(const Call&);

// Fewer threads for a call too small to repay waking them.
Threads worth(const Threads& threads, double nanoseconds);

// A piece's rows in a buffer of all rows (in the order of coordatt.h's Saved), `width` elements a row.
AxisRows rows_of(const Piece&, void* base, const Shape& s, int64_t width, int64_t bytes);

// Where a piece's rows begin in its image of a map.
void* start_of(const Piece&, const Call&, const Map&);

// What every kernel over planes takes, with the rest of the scratch memory for its own.
PlaneArgs plane_args(const Call&, const Piece&, Scratch&);

}  // namespace coordatt
