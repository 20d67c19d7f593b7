// y = x W^T for one to many rows of x, from weights packed once into panels.
//
// A panel holds two vectors' worth of output columns: its weights lie in the order in which they are read, so that few rows
// stream them from memory and many rows find them in the cache. What is multiplied follows the format and the CPU:
//   float32   float32 x float32
//   bfloat16  pairs of weights; by pairs of bfloat16 inputs where the CPU multiplies those (AVX512-BF16, AMX), else as float32
//   int8      one float32 scale an output column; inputs int8, one scale for each 64 of a row. By VNNI or AMX, else as int16
// A row's result does not depend on the other rows, except that AMX, which takes over from a few rows on, sums bfloat16 in another order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define OCTAVO_VNNI 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define OCTAVO_BF16 1
#endif
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(OCTAVO_VNNI) && defined(OCTAVO_BF16)
#define OCTAVO_AMX 1
#endif

namespace octavo {

constexpr int COLUMNS = 2 * LANES;  // of a panel
constexpr int64_t GROUP = 64;       // inputs of a row that share a scale, in int8
constexpr int64_t ROW_BLOCK = 96;   // rows that are multiplied by one panel after another: they stay in the L2 cache
constexpr int64_t PIECE_BYTES = 64 << 10;
constexpr int64_t SLACK_ROWS = 32;  // past the last row of prepared inputs: tiles read whole

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// As ctypes sees it. gated: the first half of the rows are gates of the second half; a panel then has LANES of each.
struct Linear {
  const void* panels;
  const float* scales;  // int8: [padded n], in panel order
  const float* bias;    // [padded n] in panel order, or null
  int64_t n, k;
  Format format;
  int64_t gated;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline int64_t padded_inputs(Format format, int64_t k) {
  if (format == INT8) return round_up(k, GROUP);
  if (format == BFLOAT16) return round_up(k, 32);  // an AMX tile's
  return k;
}

inline int64_t num_panels(int64_t n, bool gated) { return gated ? round_up(n / 2, LANES) / LANES : round_up(n, COLUMNS) / COLUMNS; }

inline int64_t panel_bytes(Format format, int64_t k) {
  return padded_inputs(format, k) * COLUMNS * (format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1);
}

// The source row of column c of panel p, or -1 for padding.
inline int64_t source_row(int64_t n, bool gated, int64_t p, int64_t c) {
  int64_t row = gated ? p * LANES + c % LANES : p * COLUMNS + c;
  if (row >= (gated ? n / 2 : n)) return -1;
  return gated && c >= LANES ? row + n / 2 : row;
}

// Inputs per step of the packed order: a pair, or four for VNNI.
#ifdef OCTAVO_VNNI
constexpr int64_t INT8_STEP = 4;
#else
constexpr int64_t INT8_STEP = 2;
#endif

// Packs weights [n, k], float32 or bfloat16, into panels; scales: [padded n], written for int8.
template <class Source>
void pack(Team& team, Format format, const Source* weights, int64_t n, int64_t k, bool gated, void* panels, float* scales) {
  auto value = [](Source x) {
    if constexpr (sizeof(Source) == 2) return bf16_to_float(x);
    else return x;
  };
  const int64_t padded = padded_inputs(format, k), bytes = panel_bytes(format, k);
  auto pack_panel = [&](int64_t p) {
    char* panel = static_cast<char*>(panels) + p * bytes;
    for (int64_t c = 0; c < COLUMNS; c++) {
      const int64_t row = source_row(n, gated, p, c);
      const Source* from = row < 0 ? nullptr : weights + row * k;
      auto at = [&](int64_t i) { return from && i < k ? value(from[i]) : 0.0f; };
      if (format == FLOAT32) {
        for (int64_t i = 0; i < k; i++) reinterpret_cast<float*>(panel)[i * COLUMNS + c] = at(i);
      } else if (format == BFLOAT16) {
        for (int64_t i = 0; i < padded; i++)
          reinterpret_cast<uint16_t*>(panel)[(i / 2 * COLUMNS + c) * 2 + i % 2] = float_to_bf16(at(i));
      } else {
        float largest = 0.0f;
        for (int64_t i = 0; i < k; i++) {
          const float size = std::fabs(at(i));
          if (!(size <= largest) && !std::isnan(largest)) largest = size;  // the first NaN stays
        }
        const float scale = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        scales[p * COLUMNS + c] = scale;
        for (int64_t i = 0; i < padded; i++) {
          const long q = std::lrintf(at(i) * inverse);
          int8_t& to = reinterpret_cast<int8_t*>(panel)[(i / INT8_STEP * COLUMNS + c) * INT8_STEP + i % INT8_STEP];
#ifdef OCTAVO_VNNI
          to = int8_t(uint8_t(q + 128));  // VNNI multiplies unsigned by signed: the inputs stay signed
#else
          to = int8_t(q);
#endif
        }
      }
    }
  };
  team.run([&](int) { team.share(num_panels(n, gated), pack_panel); });
}

// Rows of inputs in the form that a format multiplies. rows: `stride` bytes apart. int8: scales [m, groups]; offsets [m, groups],
// what VNNI's unsigned weights have added to a group's sum, negative.
struct Inputs {
  char* rows;
  int64_t stride;
  float* scales;
  int32_t* offsets;
  int64_t groups;
};

inline bool takes_float32(Format format) {
#ifdef OCTAVO_BF16
  return format == FLOAT32;
#else
  return format != INT8;
#endif
}

inline int64_t input_bytes(Format format, int64_t k) {
  if (takes_float32(format)) return k * 4;
#ifdef OCTAVO_VNNI
  return padded_inputs(format, k) * (format == INT8 ? 1 : 2);
#else
  return padded_inputs(format, k) * 2;
#endif
}

// Memory for the inputs of m rows and any linear of up to k inputs.
inline int64_t inputs_bytes(int64_t m, int64_t k) {
  const int64_t groups = round_up(k, GROUP) / GROUP;
  return (m + SLACK_ROWS) * (round_up(k, GROUP) * 4 + groups * 8 + 128);
}

inline Inputs inputs_in(void* memory, Format format, int64_t m, int64_t k) {
  Inputs in;
  in.groups = round_up(k, GROUP) / GROUP;
  in.stride = input_bytes(format, k);
  in.rows = static_cast<char*>(memory);
  in.scales = reinterpret_cast<float*>(in.rows + round_up((m + SLACK_ROWS) * in.stride, 64));
  in.offsets = reinterpret_cast<int32_t*>(in.scales + (m + SLACK_ROWS) * in.groups);
  return in;
}

inline void prepare_int8_row(const Inputs& in, int64_t row, const float* x, int64_t k) {
  for (int64_t g = 0; g < in.groups; g++) {
    const int64_t start = g * GROUP, count = std::min(GROUP, k - start);
    alignas(64) float values[GROUP] = {};
    std::copy(x + start, x + start + count, values);
    // Compared by their bits, a NaN is above infinity and that above every number: a bad number makes the scale one. (max() drops a NaN.)
    IntVec most = int_zero();
    for (int64_t i = 0; i < GROUP; i += LANES) most = int_max(most, float_to_bits(absolute(load(values + i))));
    const int32_t bits = int_largest(most);
    float peak;
    std::memcpy(&peak, &bits, 4);
    const Vec inverse = all(peak > 0.0f ? 127.0f / peak : 0.0f);
    in.scales[row * in.groups + g] = peak / 127.0f;
#ifdef OCTAVO_VNNI
    int8_t* to = reinterpret_cast<int8_t*>(in.rows + row * in.stride) + start;
    IntVec total = int_zero();
    for (int64_t i = 0; i < GROUP; i += LANES) {
      const IntVec q = to_int(mul(load(values + i), inverse));
      total = int_add(total, q);
      store_low_bytes(to + i, q);
    }
    in.offsets[row * in.groups + g] = -128 * _mm512_reduce_add_epi32(total);
#else
    uint16_t* to = reinterpret_cast<uint16_t*>(in.rows + row * in.stride) + start;
    for (int64_t i = 0; i < GROUP; i += LANES) store_low_halves(to + i, to_int(mul(load(values + i), inverse)));
#endif
  }
}

// One row of x into the form that `format` multiplies.
inline void prepare_row(const Inputs& in, Format format, int64_t row, const float* x, int64_t k) {
  if (format == INT8) {
    prepare_int8_row(in, row, x, k);
    return;
  }
  if (takes_float32(format)) {
    std::copy(x, x + k, reinterpret_cast<float*>(in.rows + row * in.stride));
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(in.rows + row * in.stride);
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) store_bf16(to + i, load(x + i));
  for (; i < k; i++) to[i] = float_to_bf16(x[i]);
  std::fill(to + k, to + padded_inputs(format, k), uint16_t(0));
}

// A weight that comes from memory is asked for so far ahead: a core has more requests under way to its L2 cache than its own
// prefetcher makes of one stream.
constexpr int64_t AHEAD_BYTES = 4096;
template <int VECTORS>
inline void ask_ahead(const void* p) {
  for (int v = 0; v < VECTORS; v++) __builtin_prefetch(static_cast<const char*>(p) + AHEAD_BYTES + v * LANES * 4, 0, 2);
}

// --- A few rows by a few vectors of columns: acc += a b ---------------------------------------------------------------------
// a: ROWS rows, lda elements apart. b: k rows (or k / 2 rows of pairs) of `ldb` columns, VECTORS of which are taken.

template <int ROWS, int VECTORS>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, Vec (&acc)[ROWS][VECTORS]) {
  for (int64_t i = 0; i < k; i++, b += ldb) {
    ask_ahead<VECTORS>(b);
    Vec columns[VECTORS];
    for (int v = 0; v < VECTORS; v++) columns[v] = load(b + v * LANES);
    for (int r = 0; r < ROWS; r++) {
      const Vec x = all(a[r * lda + i]);
      for (int v = 0; v < VECTORS; v++) acc[r][v] = fma(x, columns[v], acc[r][v]);
    }
  }
}

template <int ROWS, int VECTORS>
inline void multiply(const float* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t k, Vec (&acc)[ROWS][VECTORS]) {
  const IntVec upper = int_all(int32_t(0xFFFF0000));
  for (int64_t i = 0; i < k; i += 2, b += 2 * ldb) {
    ask_ahead<VECTORS>(b);
    Vec columns[VECTORS];
    for (int v = 0; v < VECTORS; v++) columns[v] = bits_to_float(shift_left(load_int(b + 2 * v * LANES), 16));
    for (int r = 0; r < ROWS; r++) {
      const Vec x = all(a[r * lda + i]);
      for (int v = 0; v < VECTORS; v++) acc[r][v] = fma(x, columns[v], acc[r][v]);
    }
    for (int v = 0; v < VECTORS; v++) columns[v] = bits_to_float(bit_and(load_int(b + 2 * v * LANES), upper));
    for (int r = 0; r < ROWS; r++) {
      const Vec x = all(a[r * lda + i + 1]);
      for (int v = 0; v < VECTORS; v++) acc[r][v] = fma(x, columns[v], acc[r][v]);
    }
  }
}

template <int ROWS, int PAGES, int VECTORS>
inline void add_products(const float* a, int64_t lda, const Vec (&columns)[PAGES][VECTORS], Vec (&acc)[PAGES][ROWS][VECTORS]) {
  for (int r = 0; r < ROWS; r++) {
    const Vec x = all(a[r * lda]);
    for (int p = 0; p < PAGES; p++)
      for (int v = 0; v < VECTORS; v++) acc[p][r][v] = fma(x, columns[p][v], acc[p][r][v]);
  }
}

// The same with one row of columns from each of several places.
template <int ROWS, int PAGES, int VECTORS>
inline void multiply_pages(const float* a, int64_t lda, const float* const* b, int64_t ldb, int64_t k, Vec (&acc)[PAGES][ROWS][VECTORS]) {
  for (int64_t i = 0; i < k; i++) {
    Vec columns[PAGES][VECTORS];
    for (int p = 0; p < PAGES; p++)
      for (int v = 0; v < VECTORS; v++) columns[p][v] = load(b[p] + i * ldb + v * LANES);
    add_products<ROWS>(a + i, lda, columns, acc);
  }
}

template <int ROWS, int PAGES, int VECTORS>
inline void multiply_pages(const float* a, int64_t lda, const uint16_t* const* b, int64_t ldb, int64_t k, Vec (&acc)[PAGES][ROWS][VECTORS]) {
  const IntVec upper = int_all(int32_t(0xFFFF0000));
  for (int64_t i = 0; i < k; i += 2) {
    Vec columns[PAGES][VECTORS];
    for (int p = 0; p < PAGES; p++)
      for (int v = 0; v < VECTORS; v++) columns[p][v] = bits_to_float(shift_left(load_int(b[p] + i * ldb + 2 * v * LANES), 16));
    add_products<ROWS>(a + i, lda, columns, acc);
    for (int p = 0; p < PAGES; p++)
      for (int v = 0; v < VECTORS; v++) columns[p][v] = bits_to_float(bit_and(load_int(b[p] + i * ldb + 2 * v * LANES), upper));
    add_products<ROWS>(a + i + 1, lda, columns, acc);
  }
}

inline int32_t four_bytes(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

#ifdef OCTAVO_BF16
template <int ROWS, int VECTORS>
inline void multiply(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t k, Vec (&acc)[ROWS][VECTORS]) {
  for (int64_t i = 0; i < k; i += 2, b += 2 * ldb) {
    ask_ahead<VECTORS>(b);
    __m512bh columns[VECTORS];
    for (int v = 0; v < VECTORS; v++) columns[v] = reinterpret_cast<__m512bh>(load_int(b + 2 * v * LANES));
    for (int r = 0; r < ROWS; r++) {
      const __m512bh x = reinterpret_cast<__m512bh>(int_all(four_bytes(a + r * lda + i)));
      for (int v = 0; v < VECTORS; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, columns[v]);
    }
  }
}
#endif

// Row by row: with all rows' products at once GCC runs out of registers, and sums go by way of memory.
// (Loops over float32 it makes three times slower: they fit as they are.)
inline void keep_in_place(IntVec& left, IntVec& right) { asm volatile("" : "+v"(left), "+v"(right)); }

template <int ROWS>
inline void multiply_int8(const Inputs& in, int64_t row, const int8_t* b, Vec (&acc)[ROWS][2]) {
  for (int64_t g = 0; g < in.groups; g++) {
    IntVec sums[ROWS][2];
#ifdef OCTAVO_VNNI
    const int8_t* a = reinterpret_cast<const int8_t*>(in.rows + row * in.stride) + g * GROUP;
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = int_all(in.offsets[(row + r) * in.groups + g]);
    for (int64_t i = 0; i < GROUP; i += 4, b += 4 * COLUMNS) {
      ask_ahead<2>(b);
      const IntVec columns[2] = {load_int(b), load_int(b + 4 * LANES)};
      for (int r = 0; r < ROWS; r++) {
        const IntVec x = int_all(four_bytes(a + r * in.stride + i));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], columns[0], x);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], columns[1], x);
      }
    }
#else
    const int16_t* a = reinterpret_cast<const int16_t*>(in.rows + row * in.stride) + g * GROUP;
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = int_zero();
    for (int64_t i = 0; i < GROUP; i += 2, b += 2 * COLUMNS) {
      if (i % 4 == 0) ask_ahead<2>(b);
      const IntVec columns[2] = {widen_int8(b), widen_int8(b + 2 * LANES)};
      for (int r = 0; r < ROWS; r++) {
        const IntVec x = int_all(four_bytes(reinterpret_cast<const char*>(a + i) + r * in.stride));
        sums[r][0] = add_pairs(sums[r][0], columns[0], x);
        sums[r][1] = add_pairs(sums[r][1], columns[1], x);
        keep_in_place(sums[r][0], sums[r][1]);
      }
    }
#endif
    for (int r = 0; r < ROWS; r++) {
      const Vec scale = all(in.scales[(row + r) * in.groups + g]);
      acc[r][0] = fma(to_float(sums[r][0]), scale, acc[r][0]);
      acc[r][1] = fma(to_float(sums[r][1]), scale, acc[r][1]);
    }
  }
}

// --- A panel by all its rows ------------------------------------------------------------------------------------------------

// Rows of a tile: as many as leave registers for the sums and the operands.
template <Format FORMAT>
constexpr int tile_rows() {
#ifdef __AVX512F__
  return FORMAT == INT8 ? 6 : 12;
#else
  return FORMAT == INT8 ? 4 : 6;
#endif
}

// Into tile [ROWS, COLUMNS]. Never inlined: what is done with the results must not take registers from the loop that makes them.
template <Format FORMAT, int ROWS>
[[gnu::noinline]] void multiply_tile(const Inputs& in, int64_t row, int64_t k, const char* panel, float* tile) {
  Vec acc[ROWS][2];
  for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = zero();
  const char* a = in.rows + row * in.stride;
  if constexpr (FORMAT == INT8) {
    multiply_int8<ROWS>(in, row, reinterpret_cast<const int8_t*>(panel), acc);
  } else if constexpr (FORMAT == FLOAT32) {
    multiply<ROWS, 2>(reinterpret_cast<const float*>(a), in.stride / 4, reinterpret_cast<const float*>(panel), COLUMNS, k, acc);
  } else {
#ifdef OCTAVO_BF16
    using Element = uint16_t;
#else
    using Element = float;
#endif
    multiply<ROWS, 2>(reinterpret_cast<const Element*>(a), in.stride / int64_t(sizeof(Element)),
                      reinterpret_cast<const uint16_t*>(panel), COLUMNS, k, acc);
  }
  for (int r = 0; r < ROWS; r++) {
    store(tile + r * COLUMNS, acc[r][0]);
    store(tile + r * COLUMNS + LANES, acc[r][1]);
  }
}

// Calls emit(row, left, right) with the two vectors of every row in [row, end).
template <Format FORMAT, int ROWS, class Emit>
inline void multiply_rows(const Inputs& in, int64_t row, int64_t end, int64_t k, const char* panel, const Emit& emit) {
  alignas(64) float tile[ROWS * COLUMNS];
  for (; row + ROWS <= end; row += ROWS) {
    multiply_tile<FORMAT, ROWS>(in, row, k, panel, tile);
    for (int r = 0; r < ROWS; r++) emit(row + r, load(tile + r * COLUMNS), load(tile + r * COLUMNS + LANES));
  }
  if constexpr (ROWS > 1) {
    if (row < end) multiply_rows<FORMAT, ROWS - 1>(in, row, end, k, panel, emit);
  }
}

}  // namespace octavo

#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo {

#ifndef OCTAVO_BF16
constexpr int64_t UNPACK_ROWS = 24;  // from so many on, a panel becomes float32 once instead of for every few rows

inline const char* unpack_panel(const char* panel, int64_t k) {
  static thread_local std::vector<float> unpacked;
  unpacked.resize(size_t(round_up(k, 2) * COLUMNS));
  const IntVec upper = int_all(int32_t(0xFFFF0000));
  for (int64_t i = 0; i < round_up(k, 2) * COLUMNS; i += 2 * COLUMNS) {
    for (int64_t c = 0; c < COLUMNS; c += LANES) {
      const IntVec pairs = load_int(panel + 2 * i + 4 * c);
      store(&unpacked[size_t(i + c)], bits_to_float(shift_left(pairs, 16)));
      store(&unpacked[size_t(i + COLUMNS + c)], bits_to_float(bit_and(pairs, upper)));
    }
  }
  return reinterpret_cast<const char*>(unpacked.data());
}
#endif

template <class Emit>
inline void multiply_panel(const Linear& w, const Inputs& in, int64_t row, int64_t end, const char* panel, const Emit& emit) {
#ifdef OCTAVO_AMX
  if (amx_usable && w.format == BFLOAT16 && end - row >= AMX_ROWS_BFLOAT16) {
    multiply_by_tiles<BFLOAT16>(in, row, end, w.k, panel, emit);
    return;
  }
  if (amx_usable && w.format == INT8 && end - row >= AMX_ROWS_INT8) {
    multiply_by_tiles<INT8>(in, row, end, w.k, panel, emit);
    return;
  }
#endif
  switch (w.format) {
    case FLOAT32: multiply_rows<FLOAT32, tile_rows<FLOAT32>()>(in, row, end, w.k, panel, emit); break;
    case BFLOAT16:
#ifndef OCTAVO_BF16
      if (end - row >= UNPACK_ROWS) {
        multiply_rows<FLOAT32, tile_rows<FLOAT32>()>(in, row, end, w.k, unpack_panel(panel, w.k), emit);
        break;
      }
#endif
      multiply_rows<BFLOAT16, tile_rows<BFLOAT16>()>(in, row, end, w.k, panel, emit);
      break;
    case INT8: multiply_rows<INT8, tile_rows<INT8>()>(in, row, end, w.k, panel, emit); break;
  }
}

inline void store_part(float* to, int64_t count, Vec x) {
  if (count >= LANES) {
    store(to, x);
  } else if (count > 0) {
    alignas(64) float values[LANES];
    store(values, x);
    std::copy(values, values + count, to);
  }
}

// One phase of the team: calls write(row, column, vector) for every row of m and every LANES columns, with scale and bias applied; for
// a gated linear, write(row, column, gate, value) instead.
template <class Write>
void product(Team& team, const Linear& w, const Inputs& in, int64_t m, const Write& write) {
  const int64_t panels = num_panels(w.n, w.gated), bytes = panel_bytes(w.format, w.k);
  const int64_t blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t fewest = std::max<int64_t>(1, panels / (4 * team.size()));
  const int64_t together = std::clamp<int64_t>(PIECE_BYTES / bytes, 1, fewest);
  const int64_t pieces = (panels + together - 1) / together;
  team.share(pieces * blocks, [&](int64_t piece) {
    const int64_t row = piece / pieces * ROW_BLOCK, end = std::min(m, row + ROW_BLOCK);
    const int64_t first = piece % pieces * together, last = std::min(panels, first + together);
    for (int64_t p = first; p < last; p++) {
      const char* panel = static_cast<const char*>(w.panels) + p * bytes;
      const float* scales = w.scales ? w.scales + p * COLUMNS : nullptr;
      const float* bias = w.bias ? w.bias + p * COLUMNS : nullptr;
      multiply_panel(w, in, row, end, panel, [&](int64_t r, Vec left, Vec right) {
        if (scales) {
          left = mul(left, load(scales));
          right = mul(right, load(scales + LANES));
        }
        if (bias) {
          left = add(left, load(bias));
          right = add(right, load(bias + LANES));
        }
        write(r, p, left, right);
      });
    }
  });
}

// y [m, n] (ldy apart) = or += the product.
inline void multiply_into(Team& team, const Linear& w, const Inputs& in, int64_t m, float* y, int64_t ldy, bool accumulate) {
  product(team, w, in, m, [&](int64_t row, int64_t panel, Vec left, Vec right) {
    float* to = y + row * ldy + panel * COLUMNS;
    const int64_t count = w.n - panel * COLUMNS;
    if (accumulate && count >= COLUMNS) {
      left = add(left, load(to));
      right = add(right, load(to + LANES));
    } else if (accumulate) {
      alignas(64) float before[COLUMNS] = {};
      std::copy(to, to + count, before);
      left = add(left, load(before));
      right = add(right, load(before + LANES));
    }
    store_part(to, count, left);
    store_part(to + LANES, count - LANES, right);
  });
}

}  // namespace octavo
