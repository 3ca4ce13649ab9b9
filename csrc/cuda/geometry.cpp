// The choice of groups, pieces and stages.
#include "geometry.h"

#include <math.h>

#include <initializer_list>

namespace coordatt {
namespace cuda {
namespace {

int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t stage_target = 16384;  // bytes: 48 to 64 KB on their way to each SM keep a GPU's memory busy

// Channels whose planes are together a multiple of 16 bytes, so that groups start aligned where the map does.
int64_t unit_of(const Call& call) {
  int64_t bytes = call.shape.h * call.shape.w * bytes_of(call.dtype), unit = 1;
  while (unit < 16 && bytes * unit % 16) unit *= 2;
  return unit;
}

int vector_of(const Call& call) { return 16 / bytes_of(call.dtype); }

Cut cut_of(const Call& call) {
  const Shape& s = call.shape;
  Cut cut;
  Geometry& g = cut.geometry;
  g.n = (int)s.n, g.c = (int)s.c, g.h = (int)s.h, g.w = (int)s.w, g.m = (int)s.m, g.l = (int)s.length();
  return cut;
}

// Sizes that follow from the group and the pieces.
void finish(Geometry& g, const Call& call, bool aligned) {
  const Shape& s = call.shape;
  int v = vector_of(call);
  g.groups = (int)ceil_div(s.c, g.group);
  if (call.nhwc) {
    g.vectors = s.c % v == 0 && g.group % v == 0;
    g.copies = aligned && g.vectors ? g.group / v : 0;
    g.pitch = (int)(g.vectors ? round_up(g.group, 4) : g.group);
    g.column = 0;
  } else {
    // In narrow maps the lanes of a warp find their gates in different banks; only wide ones gain from vectors of gates.
    g.vectors = s.w % v == 0 && s.w > 32;
    g.copies = 0;
    g.column = (int)(g.vectors ? round_up(s.h, 4) : s.h);
    g.pitch = (int)(g.vectors ? g.column + s.w : s.length() | 1);
    if (g.vectors && g.pitch % 8 == 0) g.pitch += 4;
  }
  g.down = (int)ceil_div(s.h, g.piece_rows);
  g.lane_bits = 0;
  while (g.lane_bits < 5 && s.w % (2ll << g.lane_bits) == 0) ++g.lane_bits;
  g.by_l = Divider(g.l);
  g.by_w = Divider(g.w);
  g.by_rows = Divider(g.piece_rows);
  g.by_group = Divider(g.group);
  g.by_copies = Divider(g.copies > 0 ? g.copies : 1);
  g.by_vectors = Divider(g.group / v > 0 ? g.group / v : 1);
  g.by_down = Divider(g.down);
}

Room room_of(const Geometry& g, const Call& call, int middles) {
  int64_t acc = acc_bytes_of(call.dtype);
  Room r;
  r.barriers = (int)round_up(8 * g.stages, 128);
  r.lines = (int)round_up((call.nhwc ? (int64_t)g.l * g.pitch : (int64_t)g.group * g.pitch) * acc, 128);
  r.chunk = (int)round_up((middles ? (int64_t)middles * g.m * g.l : (int64_t)g.m * g.chunk) * acc, 128);
  if (r.chunk < 34 * 8) r.chunk = 384;  // also the scratch of sums over the block
  r.ring = g.stages * g.stage_bytes;
  return r;
}

// Pieces of about target bytes.
void set_pieces(Geometry& g, const Call& call, int64_t target) {
  const Shape& s = call.shape;
  int64_t bytes = bytes_of(call.dtype), unit = unit_of(call);
  if (call.nhwc) {
    int64_t row = s.w * g.group * bytes;
    g.piece_channels = g.group;
    g.piece_rows = (int)clamp(target / row, 1, s.h);
    g.stage_bytes = (int)round_up(g.piece_rows * row, 128);
    return;
  }
  int64_t plane = s.h * s.w * bytes;
  int64_t channels = clamp(target / plane, 1, g.group);
  if (channels > unit) channels = channels / unit * unit;
  g.piece_channels = (int)channels;
  g.piece_rows = (int)(plane <= target ? s.h : clamp(target / (s.w * bytes), 1, s.h));
  g.stage_bytes = (int)round_up(channels * g.piece_rows * s.w * bytes + 32, 128);  // the window around an unaligned run
}

// Lines of the middle at a time, of about target bytes.
int chunk_of(const Call& call, int64_t target) {
  return (int)clamp(target / (call.shape.m * acc_bytes_of(call.dtype)) / 4 * 4, 4, round_up(call.shape.length(), 4));
}

int pieces_of(const Geometry& g, bool nhwc) {
  return (int)(nhwc ? g.down : g.down * ceil_div(g.group, g.piece_channels));
}

void set_stages(Geometry& g, int stages) {
  g.stages = stages;
  g.by_stages = Divider(stages);
}

}  // namespace

Cut stream_cut(const Call& call, bool aligned, const Device& device, int arrays, int sources, bool every_block_adds) {
  const Shape& s = call.shape;
  int64_t bytes = bytes_of(call.dtype), acc = acc_bytes_of(call.dtype), unit = call.nhwc ? vector_of(call) : unit_of(call);
  // More groups keep more SMs busy, but each brings a part [M, L] of its image's middle. Where every block of the gate adds up
  // all parts, least balances its time for that against its share of the map (64 bytes a cycle from the L2, 20 from memory);
  // where a pass between adds them up once, a part is at most a quarter of a share. Estimates, both.
  double parts = (double)(s.m * s.length() * acc) / (double)(s.h * s.w * bytes);
  int64_t least = (int64_t)(every_block_adds ? sqrt(20.0 / 64 * (double)s.c * parts) : 4 * parts);
  int64_t slots = blocks_per_processor * (int64_t)device.processors;
  int64_t groups = slots / s.n > 1 ? slots / s.n : 1, group = ceil_div(s.c, groups);
  if (group < least) group = least;
  if (call.nhwc && group < 128 / bytes) group = 128 / bytes;  // whole cache lines of a pixel's channels
  group = clamp(round_up(group, unit), 1, s.c);
  Cut cut = cut_of(call);
  Geometry& g = cut.geometry;
  auto fits = [&](int64_t target, int budget, bool one_stage) {
    g.chunk = chunk_of(call, target);
    set_pieces(g, call, target / sources);
    finish(g, call, aligned);
    int pieces = pieces_of(g, call.nhwc);
    for (int stages = pieces < 4 ? pieces : 4; stages >= 1; --stages) {
      if (stages == 1 && pieces > 1 && !one_stage) break;
      set_stages(g, stages);
      cut.room = room_of(g, call, 0);
      cut.shared = cut.room.total(arrays, sources);
      if (cut.shared <= budget) return true;
    }
    cut.shared = 0;
    return false;
  };
  auto half = [&](int64_t from) { return from > 2 * unit ? round_up(from / 2, unit) : from / 2; };
  // Given up in turn: three blocks to an SM with as large a group; the group's size; the pieces' size.
  int shared_budget = device.shared_per_processor / blocks_per_processor - 1024;
  for (g.group = (int)group; g.group * 4 >= group && g.group >= 1; g.group = (int)half(g.group))
    if (fits(stage_target, shared_budget, false)) return cut;
  for (int64_t target = stage_target; target >= 1024; target /= 4)
    for (g.group = (int)group; g.group >= 1; g.group = (int)half(g.group))
      if (fits(target, device.shared_memory, target < stage_target || g.group == 1)) return cut;
  return cut;
}

Cut resident_cut(const Call& call, bool aligned, const Device& device, int blocks, int middles) {
  const Shape& s = call.shape;
  int64_t unit = call.nhwc ? vector_of(call) : unit_of(call), group = ceil_div(s.c, blocks);
  if (round_up(group, unit) * (blocks - 1) < s.c) group = round_up(group, unit);
  Cut cut = cut_of(call);
  if (blocks > s.c) return cut;
  // What it takes at least, before any of it is counted in 32 bits.
  int64_t lines = (group + middles * s.m) * s.length() * acc_bytes_of(call.dtype);
  if (lines + group * s.h * s.w * bytes_of(call.dtype) > device.shared_memory) return cut;
  Geometry& g = cut.geometry;
  g.group = (int)group;
  g.chunk = middles ? (int)s.length() : chunk_of(call, stage_target);
  set_pieces(g, call, stage_target);
  if (!call.nhwc && g.piece_rows < s.h) {  // whole planes
    g.piece_rows = (int)s.h;
    g.stage_bytes = (int)round_up(s.h * s.w * bytes_of(call.dtype) + 32, 128);
  }
  finish(g, call, aligned);
  set_stages(g, pieces_of(g, call.nhwc));
  cut.room = room_of(g, call, middles);
  int64_t total = cut.room.barriers + cut.room.lines + cut.room.chunk + (int64_t)g.stages * g.stage_bytes;
  if (total > device.shared_memory) return cut;
  if (middles) g.groups = blocks;  // a cluster's blocks, even where the last have no channels left
  cut.shared = (int)total;
  return cut;
}

}  // namespace cuda
}  // namespace coordatt
