// How pool, gate and their backward passes go over a map: which map takes which walk, the scratch memory, and what a walk
// reads. The walks are apply.h and sums.h; what is computed at each element is a functor of pool.cpp or gate.cpp.
//
//   walk      a vector holds                 maps
//   run       elements of two planes         apply; nchw, AVX-512, H + W <= 16, H * W >= 16, planes back to back
//   flat      elements of one plane          apply; nchw, AVX2 and wider, H and W <= lanes (AVX-512: 2 * lanes)
//   pairs     elements of two rows           sums; nchw, AVX-512, W <= 16, short planes
//   plane     elements of one row            any other nchw
//   channels  channels of one pixel          sums; nhwc: one group of channels at a time, over all pixels
//   pixels    channels of one pixel          nhwc: one pixel at a time, all its channels (sums: of large maps only)
//
// run, flat and pairs fill vectors that rows of 7 or 14 would leave half empty; none of them exists in float64.
#pragma once

#include "tile.h"
#include "tuning.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

enum class Walk { run, flat, pairs, plane, channels, pixels };

constexpr bool has_runs = COORDATT_VBYTES == 64, has_pairs = has_runs;
constexpr int flat_limit = COORDATT_VBYTES == 64 ? 32 : COORDATT_VBYTES == 32 ? 8 : 0;  // the longest axis one table reaches

// back_to_back: whether channels lie H * W elements apart in all maps of the pass.
template <bool NHWC, bool READS, bool RUNS, class A> COORDATT_INLINE Walk apply_walk(const PlaneArgs& a, bool back_to_back) {
  if (NHWC) return Walk::pixels;
  if (sizeof(A) == 8) return Walk::plane;
  if (has_runs && RUNS && a.h + a.w <= 16 && a.h * a.w >= 16 && back_to_back) return Walk::run;
  if (READS && a.h <= flat_limit && a.w <= flat_limit) return Walk::flat;  // else no faster: 64 x 28 x 28 3.6 us, 3.7 flat
  return Walk::plane;
}

template <bool NHWC, class X> COORDATT_INLINE Walk sums_walk(const PlaneArgs& a) {
  if (NHWC) {
    const bool one_group = a.c1 - a.c0 <= narrow_pixel;
    return !one_group && a.h * a.w * a.x_step * (int64_t)sizeof(X) > large_map ? Walk::pixels : Walk::channels;
  }
  if (has_pairs && sizeof(Acc<X>) == 4 && a.w <= 16 && a.h <= short_plane) return Walk::pairs;
  return Walk::plane;
}

// The scratch memory of every walk. A tile holds one vector's worth of channels, [lanes][H] or [lanes][W].
template <class A> struct PlaneScratch {
  A *h[2], *w[2];         // nchw: tiles of what the lines say, or are summed to; a run's table k lies across h[k] and w[k]
  A* parts;               // nchw, sums: row sums, still over the lanes, of one plane or of a group of short ones
  int32_t *row, *column;  // flat: of each element of a plane
  A* rows;                // nhwc, sums: of some rows together, [rows][channels]
  int64_t size;           // bytes

  COORDATT_MEMBER PlaneScratch(void* base, int64_t height, int64_t width, int64_t channels) {
    constexpr int64_t n = lanes<A>;
    const int64_t hp = padded(height), wp = padded(width);
    int64_t at = 0;
    auto take = [&](int64_t bytes) __attribute__((always_inline)) {
      at += bytes;
      return (void*)((uintptr_t)base + (uintptr_t)(at - bytes));
    };
    for (int k = 0; k < 2; ++k) {
      h[k] = (A*)take(n * hp * sizeof(A));
      w[k] = (A*)take(n * wp * sizeof(A));
    }
    parts = (A*)take((height <= short_plane ? n * n * padded(height) : n * hp) * (int64_t)sizeof(A));
    row = (int32_t*)take(flat_limit * flat_limit * 4);
    column = (int32_t*)take(flat_limit * flat_limit * 4);
    rows = (A*)base;
    const int64_t lines = most_rows_together * padded(channels) * (int64_t)sizeof(A);
    size = at > lines ? at : lines;
  }
};

template <class X> int64_t plane_scratch(int64_t h, int64_t w, int64_t c) {
  return PlaneScratch<Acc<X>>(nullptr, h, w, c).size;
}

// What becomes of a loaded vector before anything is computed with it: nothing. A functor that takes AsIs' place (before.h)
// has its three members: of one channel (a plane's elements), of the channels from c on (a pixel's), and of channel
// c + planes[l] in lane l (a run's); each returns, with that channel's constants in vectors, a function of the loaded vector.
// Where a cut is given, lanes beyond it must come out zero, for sums run over them; cut is a Tail, or the lanes of a pair of
// rows as a mask. row_vectors: how wide rows have a walk of their own (with_row_vectors).
struct AsIs {
  static constexpr int row_vectors = 8;
  AsIs() = default;
  explicit COORDATT_MEMBER AsIs(const BeforeArgs&) {}
  struct Of {
    template <class V, class... Cut> COORDATT_MEMBER V operator()(V v, Cut...) const { return v; }
  };
  COORDATT_MEMBER Of channel(int64_t) const { return {}; }
  template <class... Cut> COORDATT_MEMBER Of channels(int64_t, Cut...) const { return {}; }
  COORDATT_MEMBER Of channels_of(int64_t, vint) const { return {}; }
};

// One map as walks read it: by the plane and by the pixel. at: one vector; ahead: into the cache; next: to the next row.
template <class X, class R = AsIs> struct Elements {
  static constexpr bool reads = true, has_runs = true;
  static constexpr int row_vectors = R::row_vectors;
  const X* data;
  int64_t step;  // as Map::step
  R read = {};

  struct Plane {
    const X* p;
    typename std::decay<decltype(std::declval<R>().channel(0))>::type of;
    template <class... Cut> COORDATT_MEMBER auto at(int64_t i, Cut... cut) const { return of(load(p + i, cut...), cut...); }
    // from: what loads a vector, given the plane.
    template <class F, class... Cut> COORDATT_MEMBER auto by(const F& from, Cut... cut) const { return of(from(p), cut...); }
    COORDATT_MEMBER void ahead(int64_t i) const { prefetch(p + i + prefetch_bytes / sizeof(X)); }
    COORDATT_MEMBER void next(int64_t elements) { p += elements; }
  };
  struct Pixel {
    const X* p;
    const R& read;
    template <class... Cut> COORDATT_MEMBER auto at(int64_t c, Cut... cut) const {
      return read.channels(c, cut...)(load(p + c, cut...), cut...);
    }
    COORDATT_MEMBER void ahead(int64_t c) const { prefetch(p + c + prefetch_bytes / sizeof(X)); }
  };
  struct Run {
    const X* p;
    int64_t c;
    const R& read;
    template <class... Cut> COORDATT_MEMBER auto at(int64_t i, vint planes, Cut... cut) const {
      return read.channels_of(c, planes)(load(p + i, cut...), cut...);
    }
    COORDATT_MEMBER void ahead(int64_t i) const { prefetch(p + i + prefetch_bytes / sizeof(X)); }
  };
  COORDATT_MEMBER Plane plane(int64_t c) const { return {data + c * step, read.channel(c)}; }
  COORDATT_MEMBER Pixel pixel(int64_t i) const { return {data + i * step, read}; }
  COORDATT_MEMBER Run run(int64_t c) const { return {data + c * step, c, read}; }
  COORDATT_MEMBER bool back_to_back(int64_t size) const { return step == size; }
};

struct Times {
  template <class V> COORDATT_MEMBER V operator()(V v, V w) const { return v * w; }
};

// Two maps read together; F makes one value of both: their product, unless it is another.
template <class P, class Q, class F = Times> struct Both {
  static constexpr bool reads = true, has_runs = false;
  static constexpr int row_vectors = P::row_vectors < Q::row_vectors ? P::row_vectors : Q::row_vectors;
  P p;
  Q q;
  template <class... I> COORDATT_MEMBER auto at(I... i) const { return F()(p.at(i...), q.at(i...)); }
  template <class G, class... Cut> COORDATT_MEMBER auto by(const G& from, Cut... cut) const {
    return F()(p.by(from, cut...), q.by(from, cut...));
  }
  COORDATT_MEMBER void ahead(int64_t i) const {
    p.ahead(i);
    q.ahead(i);
  }
  COORDATT_MEMBER void next(int64_t elements) {
    p.next(elements);
    q.next(elements);
  }
  COORDATT_MEMBER auto plane(int64_t c) const { return both(p.plane(c), q.plane(c)); }
  COORDATT_MEMBER auto pixel(int64_t i) const { return both(p.pixel(i), q.pixel(i)); }
  COORDATT_MEMBER bool back_to_back(int64_t) const { return false; }
  template <class R, class T> static COORDATT_MEMBER Both<R, T, F> both(R r, T t) { return {r, t}; }
};
template <class P, class Q> COORDATT_INLINE Both<P, Q> product(P p, Q q) { return {p, q}; }

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
