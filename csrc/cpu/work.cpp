#include "work.h"

#include <stdlib.h>
#include <string.h>

#include <new>

#include "environment.h"
#include "tuning.h"

namespace coordatt {
namespace {

struct Buffer {
  char* data = nullptr;
  int64_t size = 0, used = 0, wanted = 0;
  ~Buffer() { free(data); }
};
thread_local Buffer buffer;

void* aligned(int64_t size) {
  void* p = aligned_alloc(64, (size_t)Scratch::round(size));
  if (!p) throw std::bad_alloc();
  return p;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : size_(round(bytes)) {
  if (buffer.wanted < buffer.used + size_) buffer.wanted = buffer.used + size_;
  if (buffer.used == 0 && buffer.size < buffer.wanted && size_ <= kept_scratch) {
    free(buffer.data);
    buffer.data = nullptr;
    buffer.size = 0;
    int64_t size = buffer.wanted < kept_scratch ? buffer.wanted : kept_scratch;
    buffer.data = (char*)aligned(size);
    buffer.size = size;
  }
  kept_ = buffer.used + size_ <= buffer.size;
  base_ = kept_ ? buffer.data + buffer.used : (char*)aligned(size_);
  if (kept_) buffer.used += size_;
  at_ = base_;
  if (environment().poison) memset(base_, 0xff, (size_t)size_);  // all ones is a NaN in every type used
}

Scratch::~Scratch() {
  if (kept_) buffer.used -= size_;
  else free(base_);
}

Pieces::Pieces(const Call& call, int threads, Along along)
    : along_(along), images_(call.shape.n), groups_(1), length_(along == rows ? call.shape.h : call.shape.c),
      other_(along == rows ? call.shape.c : call.shape.h) {
  width_ = length_;
  int64_t n = images_;
  if (threads <= 1 || n % threads == 0 || n >= 8 * threads || n == 0) return;
  // Vectors run along channels in nhwc, along rows in nchw, where any cut will do.
  int64_t least = along == rows ? 1 : call.nhwc ? max_lanes : 4;
  // A thread that walks some channels of each pixel reads them in shorter runs the more pieces there are.
  int64_t want = call.nhwc && along == channels ? threads : 2 * threads, most = (length_ + least - 1) / least;
  groups_ = want < most ? want : most;
  width_ = (length_ + groups_ - 1) / groups_;
  width_ = (width_ + least - 1) / least * least;
  groups_ = (length_ + width_ - 1) / width_;
}

bool whole_pixels_pay(const Call& call) {
  return call.nhwc && call.shape.c * call.shape.h * call.shape.w * bytes_of(call.dtype) > whole_pixels_from;
}

double work_ns(const Call& call) {
  const Shape& s = call.shape;
  return 0.2 * (double)(s.n * s.c * s.h * s.w) + (double)(s.rows() * s.c) * (1.5 + 0.1 * (double)s.m);
}

Threads worth(const Threads& threads, double nanoseconds) {
  Threads t = threads;
  if (nanoseconds < worth_waking) t.count = 1;
  return t;
}

AxisRows rows_of(const Piece& p, void* base, const Shape& s, int64_t width, int64_t bytes) {
  AxisRows r;
  r.h = at(base, (p.image * s.h + p.h0) * width, bytes);
  r.w = at(base, (s.n * s.h + p.image * s.w) * width, bytes);
  r.ld = width;
  return r;
}

void* start_of(const Piece& p, const Call& call, const Map& m) {
  return at(m.data, p.image * m.image + p.h0 * call.shape.w * m.step, bytes_of(call.dtype));
}

PlaneArgs plane_args(const Call& call, const Piece& p, Scratch& scratch) {
  PlaneArgs a{};
  a.h = p.h1 - p.h0;
  a.full_h = call.shape.h;
  a.w = call.shape.w;
  a.c0 = p.c0;
  a.c1 = p.c1;
  a.skip = call.skip;
  a.scratch = scratch.bytes(0);
  return a;
}

}  // namespace coordatt
