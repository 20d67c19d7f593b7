// Rows by one panel with AMX tiles: 32 rows (or up to 16, with half of the tiles) by 32 columns. Included by linear.h.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

namespace octavo {

// Fewest rows for which tiles are quicker, measured on two cores of an Emerald Rapids: a tile multiplies 16 rows whatever it holds.
constexpr int64_t AMX_ROWS_BFLOAT16 = 5, AMX_ROWS_INT8 = 12;

// The kernel gives a process the tiles' registers when asked.
inline bool ask_for_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
inline const bool amx_usable = ask_for_tiles();

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles() {
  thread_local bool configured = false;
  if (configured) return;
  static const TileShapes shapes;
  _tile_loadconfig(&shapes);
  configured = true;
}

// Sums: tiles 0 and 1 are the first 16 rows, 2 and 3 the others. Inputs: 4 and 5. A panel's columns: 6 and 7.
template <bool WHOLE>
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (WHOLE) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <Format FORMAT, bool WHOLE>
inline void multiply_tiles(const char* a, int64_t stride, const char* b) {
  _tile_loadd(4, a, stride);
  _tile_loadd(6, b, COLUMNS * 4);
  _tile_loadd(7, b + 64, COLUMNS * 4);
  if constexpr (WHOLE) _tile_loadd(5, a + 16 * stride, stride);
  if constexpr (FORMAT == BFLOAT16) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (WHOLE) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if constexpr (WHOLE) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
}

template <bool WHOLE>
inline void store_sums(int32_t (*block)[COLUMNS]) {
  _tile_stored(0, block[0], COLUMNS * 4);
  _tile_stored(1, block[0] + LANES, COLUMNS * 4);
  if constexpr (WHOLE) {
    _tile_stored(2, block[16], COLUMNS * 4);
    _tile_stored(3, block[16] + LANES, COLUMNS * 4);
  }
}

// Up to 32 rows; those past `count` are computed from what lies there, and dropped.
template <Format FORMAT, bool WHOLE, class Emit>
inline void multiply_block(const Inputs& in, int64_t row, int64_t count, int64_t k, const char* panel, const Emit& emit) {
  alignas(64) static thread_local int32_t block[32][COLUMNS];
  alignas(64) static thread_local float sums[32][COLUMNS];
  const char* a = in.rows + row * in.stride;
  const int64_t tile_bytes = 16 * COLUMNS * 4;
  if constexpr (FORMAT == BFLOAT16) {
    clear_sums<WHOLE>();
    for (int64_t i = 0; i < padded_inputs(BFLOAT16, k) * 2; i += 64, panel += tile_bytes)
      multiply_tiles<FORMAT, WHOLE>(a + i, in.stride, panel);
    store_sums<WHOLE>(block);
    for (int64_t r = 0; r < count; r++)
      emit(row + r, bits_to_float(load_int(block[r])), bits_to_float(load_int(block[r] + LANES)));
    return;
  }
  for (int64_t g = 0; g < in.groups; g++, panel += tile_bytes) {
    clear_sums<WHOLE>();
    multiply_tiles<FORMAT, WHOLE>(a + g * GROUP, in.stride, panel);
    store_sums<WHOLE>(block);
    for (int64_t r = 0; r < count; r++) {
      const IntVec offset = int_all(in.offsets[(row + r) * in.groups + g]);
      const Vec scale = all(in.scales[(row + r) * in.groups + g]);
      for (int v = 0; v < 2; v++) {
        const Vec part = to_float(int_add(load_int(block[r] + v * LANES), offset));
        float* sum = sums[r] + v * LANES;
        store(sum, g == 0 ? mul(part, scale) : fma(part, scale, load(sum)));
      }
    }
  }
  for (int64_t r = 0; r < count; r++) emit(row + r, load(sums[r]), load(sums[r] + LANES));
}

template <Format FORMAT, class Emit>
inline void multiply_by_tiles(const Inputs& in, int64_t row, int64_t end, int64_t k, const char* panel, const Emit& emit) {
  configure_tiles();
  for (; row < end; row += 32) {
    const int64_t count = std::min<int64_t>(32, end - row);
    if (count > 16) multiply_block<FORMAT, true>(in, row, count, k, panel, emit);
    else multiply_block<FORMAT, false>(in, row, count, k, panel, emit);
  }
}

}  // namespace octavo
