// Memory that shows what a kernel does beyond its own. It starts as NaN, ends (or begins) at a page that nobody may touch,
// and has a margin at the other end that must stay as it was. ON_HEAP: on the heap, where AddressSanitizer watches.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <memory>

#include "numbers.h"

namespace native {

class Memory {
 public:
  // at_end: the last element ends where the guard begins, else the first begins where it ends. skew: elements of margin
  // between (so that no vector is aligned), unless the guard is to be met exactly.
  Memory(int64_t count, DType type, bool at_end, int64_t skew = 0) : type_(type), count_(count) {
    const int64_t bytes = count * bytes_of(type), offset = skew * bytes_of(type);
#if defined(ON_HEAP)
    size_ = bytes + offset;
    base_ = (char*)malloc((size_t)(size_ ? size_ : 1));
    data_ = base_ + offset;
    low_ = base_;
    high_ = base_ + size_;
    (void)at_end;
#else
    constexpr int64_t page = 1 << 16;  // as large as any aarch64 has
    size_ = (bytes + offset + margin + page - 1) / page * page;
    mapped_ = size_ + 2 * page;
    whole_ = (char*)mmap(nullptr, (size_t)mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole_ == MAP_FAILED) abort();
    base_ = whole_ + page;
    if (mprotect(base_, (size_t)size_, PROT_READ | PROT_WRITE)) abort();
    data_ = at_end ? base_ + size_ - bytes - offset : base_ + offset;
    // Only the margins beside the data are filled and checked.
    low_ = data_ - base_ > margin ? data_ - margin : base_;
    high_ = base_ + size_ - data_ - bytes > margin ? data_ + bytes + margin : base_ + size_;
#endif
    memset(low_, 0xff, (size_t)(high_ - low_));
  }
  ~Memory() {
#if defined(ON_HEAP)
    free(base_);
#else
    munmap(whole_, (size_t)mapped_);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }
  DType type() const { return type_; }
  int64_t count() const { return count_; }
  Number operator[](int64_t i) const { return get(data_, type_, i); }
  void set(int64_t i, Number v) { put(data_, type_, i, v); }

  // Whether the margins are as they were.
  bool intact() const {
    for (const char* p = low_; p < data_; ++p)
      if (*p != (char)0xff) return false;
    for (const char* p = data_ + count_ * bytes_of(type_); p < high_; ++p)
      if (*p != (char)0xff) return false;
    return true;
  }
  // Whether element i is as it started.
  bool untouched(int64_t i) const {
    const char* p = data_ + i * bytes_of(type_);
    for (int64_t b = 0; b < bytes_of(type_); ++b)
      if (p[b] != (char)0xff) return false;
    return true;
  }

 private:
  static constexpr int64_t margin = 512;
  DType type_;
  int64_t count_, size_ = 0, mapped_ = 0;
  char *whole_ = nullptr, *base_ = nullptr, *data_ = nullptr, *low_ = nullptr, *high_ = nullptr;
};

}  // namespace native
