// Between planes and rows: the middle keeps channels dense ([L, C]), an nchw plane keeps its pixels dense. A tile holds
// one vector's worth of channels, [lanes][len], and is transposed on its way in and out.
#pragma once

#include "simd.h"

// Shared by all row widths' instantiations: inlining them into each costs a minute of compile time and gains nothing.
#define COORDATT_OUTLINE static __attribute__((noinline))

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// rows[l * ld + i] = tile[i * ldt + l] * scale for i < count, l < len.
template <class A>
COORDATT_OUTLINE void tile_to_rows(const A* tile, int64_t ldt, int64_t len, int64_t count, A scale, A* rows, int64_t ld) {
  constexpr int n = lanes<A>;
  Tail<A> tail(count);
  for (int64_t l0 = 0; l0 < len; l0 += n) {
    Vec<A> r[n];
    for (int i = 0; i < n; ++i) r[i] = load(tile + i * ldt + l0);
    transpose<A>(r);
    int64_t valid = min_of<int64_t>(n, len - l0);
    for (int l = 0; l < n; ++l)
      if (l < valid) {
        A* to = rows + (l0 + l) * ld;
        if (count == n) store(to, r[l] * scale); else store(to, r[l] * scale, tail);
      }
  }
}

// tile[i * ldt + l] = rows[l * ld + i] * scale; lanes beyond count and l beyond len (up to ldt) become zero.
template <class A>
COORDATT_OUTLINE void rows_to_tile(const A* rows, int64_t ld, int64_t len, int64_t count, A scale, A* tile, int64_t ldt) {
  constexpr int n = lanes<A>;
  Tail<A> tail(count);
  for (int64_t l0 = 0; l0 < len; l0 += n) {
    Vec<A> r[n];
    int64_t valid = min_of<int64_t>(n, len - l0);
    for (int l = 0; l < n; ++l) {
      const A* from = rows + (l0 + l) * ld;
      if (l >= valid) r[l] = Vec<A>{};
      else if (count == n) r[l] = load(from) * scale;
      else r[l] = load(from, tail) * scale;
    }
    transpose<A>(r);
    for (int i = 0; i < n; ++i) store(tile + i * ldt + l0, r[i]);
  }
}

// sums[h] = sum of the lanes of parts[h * lanes], for h < len; parts and sums are padded to whole vectors.
template <class A>
COORDATT_OUTLINE void sum_row_parts(const A* parts, int64_t len, A* sums) {
  constexpr int n = lanes<A>;
  for (int64_t h = 0; h < len; h += n) {
    Vec<A> r[n];
    for (int i = 0; i < n; ++i) r[i] = load(parts + (h + i) * n);
    store(sums + h, sum_each<A>(r));
  }
}

// Calls body(integral_constant NV) with NV = ceil(w / lanes) up to 8, or NV = 0 for wider rows.
template <class A, class F>
COORDATT_INLINE void with_row_vectors(int64_t w, F&& body) {
  switch ((w + lanes<A> - 1) / lanes<A>) {
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

template <class X, class V, class A>
COORDATT_INLINE V load_part(const X* p, int j, int last, const Tail<A>& tail) {
  return j == last ? load(p + j * lanes<A>, tail) : load(p + j * lanes<A>);
}

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
