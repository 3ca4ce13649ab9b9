// Between planes and rows: the middle keeps channels dense ([L, C]), an nchw plane keeps its pixels dense. A tile holds
// one vector's worth of channels, [lanes][len], and is transposed on its way in and out.
#pragma once

#include "simd.h"

// Shared by all row widths' instantiations: inlining them into each costs a minute of compile time and gains nothing.
#define COORDATT_OUTLINE static __attribute__((noinline))

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// rows[l * ld + i] = result(tile[i * ldt + l], l) for i < count, l < len.
template <class A, class F>
COORDATT_OUTLINE void tile_to_rows(const A* tile, int64_t ldt, int64_t len, int64_t count, const F result, A* rows,
                                   int64_t ld) {
  constexpr int n = lanes<A>;
  Tail<A> tail(count);
  for (int64_t l0 = 0; l0 < len; l0 += n) {
    Vec<A> r[n];
    const A* from[n];
    for (int i = 0; i < n; ++i) from[i] = tile + i * ldt + l0;
    transpose_rows<A>(from, r);
    int64_t valid = min_of<int64_t>(n, len - l0);
    for (int l = 0; l < n; ++l)
      if (l < valid) store(rows + (l0 + l) * ld, result(r[l], l0 + l, tail), tail);
  }
}

// tile[i * ldt + l] = from[l][i] * scale (or scale[l]) for i < count (zero beyond) and l < lanes.
template <class A, class S>
COORDATT_INLINE void pointers_to_tile(const A** from, int64_t count, S scale, A* tile, int64_t ldt) {
  constexpr int n = lanes<A>;
  A edge[n * n];
  if (count < n) {
    Tail<A> tail(count);
    for (int l = 0; l < n; ++l) {
      store(edge + l * n, load(from[l], tail));
      from[l] = edge + l * n;
    }
  }
  Vec<A> r[n];
  transpose_rows<A>(from, r);
  for (int i = 0; i < n; ++i) store(tile + i * ldt, r[i] * scale);
}

// tile[i * ldt + l] = rows[l * ld + i] * scale for i < count, l < len. What lies beyond (up to whole vectors) is a copy
// of row values, or zero beyond count: never a number that the rows do not hold.
template <class A>
COORDATT_OUTLINE void rows_to_tile(const A* rows, int64_t ld, int64_t len, int64_t count, A scale, A* tile, int64_t ldt) {
  constexpr int n = lanes<A>;
  for (int64_t l0 = 0; l0 < len; l0 += n) {
    const A* from[n];
    for (int l = 0; l < n; ++l) from[l] = rows + min_of(l0 + l, len - 1) * ld;
    pointers_to_tile<A>(from, count, scale, tile + l0, ldt);
  }
}

// Row sums leave a plane as one vector of partial sums a row, to be summed over its lanes. A tall plane's rows are summed
// among themselves: sums[h] = sum of the lanes of parts[h * lanes]; parts and sums are padded to whole vectors.
template <class A>
COORDATT_OUTLINE void sum_row_parts(const A* parts, int64_t len, A* sums) {
  constexpr int n = lanes<A>;
  for (int64_t h = 0; h < len; h += n) {
    Vec<A> r[n];
    for (int i = 0; i < n; ++i) r[i] = load(parts + (h + i) * n);
    store(sums + h, sum_each<A>(r));
  }
}

// Short planes' rows are summed over a group of channels at once, which leaves the sums where the middle wants them:
// rows[h * ld + i] = result(sum of the lanes of parts[h][i], h).
template <class A, class F>
COORDATT_OUTLINE void parts_to_rows(const A* parts, int64_t len, int64_t count, const F result, A* rows, int64_t ld) {
  constexpr int n = lanes<A>;
  Tail<A> tail(count);
  for (int64_t h = 0; h < len; ++h) {
    Vec<A> r[n];
    for (int i = 0; i < n; ++i) r[i] = load(parts + (h * n + i) * n);
    store(rows + h * ld, result(sum_each<A>(r), h, tail), tail);
  }
}

// Calls body(integral_constant NV) with NV = ceil(w / lanes) up to MOST (8 or 2), or NV = 0 for wider rows.
template <class A, int MOST, class F>
COORDATT_INLINE void with_row_vectors(int64_t w, F&& body) {
  const int64_t vectors = (w + lanes<A> - 1) / lanes<A>;
  if constexpr (MOST == 2) {
    if (vectors == 1) return body(std::integral_constant<int, 1>());
    if (vectors == 2) return body(std::integral_constant<int, 2>());
    return body(std::integral_constant<int, 0>());
  } else switch (vectors) {
    case 1: body(std::integral_constant<int, 1>()); break;
    case 2: body(std::integral_constant<int, 2>()); break;
    case 3: body(std::integral_constant<int, 3>()); break;
    case 4: body(std::integral_constant<int, 4>()); break;
    case 5: body(std::integral_constant<int, 5>()); break;
    case 6: body(std::integral_constant<int, 6>()); break;
    case 7: body(std::integral_constant<int, 7>()); break;
    case 8: body(std::integral_constant<int, 8>()); break;
    default: body(std::integral_constant<int, 0>()); break;
  }
}

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
