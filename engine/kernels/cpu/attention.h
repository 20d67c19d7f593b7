// Attention over pages, read where they lie. A page of one head is a panel as in linear.h, so that scores and sums are the same
// products as the linears': keys with the head's channels as rows and the page's tokens as columns, values the other way round.
//   keys    float32 [D, S]    bfloat16 [D / 2, S, 2]       S tokens of a page, D channels of a head
//   values  float32 [S, D]    bfloat16 [S / 2, D, 2]
// Queries and results are float32. A tile of queries of one key/value head goes over the keys in blocks, with a running maximum and sum
// (FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 1).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "linear.h"

namespace octavo {

constexpr int64_t KEY_BLOCK = 64;    // keys whose scores exist at once
constexpr int64_t TILE_QUERIES = 48;  // rows of a tile: tokens times query heads of the key/value head
constexpr int64_t SPLIT_KEYS = 512;  // one token's keys beyond this are worked on in parts

// One layer's pages and how it attends, as ctypes sees it. window: tokens that a query sees, itself included, 0 for all; softcap:
// 0 for none; sinks: [num_heads] or null.
struct AttentionLayer {
  void* keys;
  void* values;
  const float* sinks;
  int64_t num_heads, num_kv_heads, head_dim, block_size, group, window;
  int64_t is_bf16;
  float scaling, softcap;
};

// A step's rows, as ctypes sees them. Row r has tokens query_starts[r] .. query_starts[r + 1] of the step, the first of them at
// position context_lens[r]. tables[g]: [R, table_width], the rows' page ids in group g.
struct Rows {
  int64_t num_rows, num_tokens, table_width;
  const int64_t* query_starts;
  const int64_t* context_lens;
  const int32_t* const* tables;
};

// Tokens [first, first + count) of row `row` against keys [from, to); part: index among the row's parts, or -1 when there is one.
struct Tile {
  int64_t row, first, count, from, to, part;
};

template <class Element>
struct Page {
  static Element* of(void* pages, const AttentionLayer& layer, int64_t block, int64_t head) {
    return static_cast<Element*>(pages) + (block * layer.num_kv_heads + head) * layer.block_size * layer.head_dim;
  }
};

inline void write_token(float* key_page, float* value_page, int64_t slot, const AttentionLayer& layer, const float* k, const float* v, bool) {
  for (int64_t d = 0; d < layer.head_dim; d++) key_page[d * layer.block_size + slot] = k[d];
  std::copy(v, v + layer.head_dim, value_page + slot * layer.head_dim);
}

// is_last: the row's last token. Its neighbour in a pair of values is multiplied by zero before it is written: it must be a number.
inline void write_token(uint16_t* key_page, uint16_t* value_page, int64_t slot, const AttentionLayer& layer, const float* k, const float* v,
                        bool is_last) {
  uint16_t rounded[16];
  for (int64_t d = 0; d < layer.head_dim; d += 16) {
    for (int i = 0; i < 16; i += LANES) store_bf16(rounded + i, load(k + d + i));
    for (int i = 0; i < 16; i += 2) std::memcpy(key_page + ((d + i) / 2 * layer.block_size + slot) * 2, rounded + i, 4);
  }
  uint16_t* pair = value_page + slot / 2 * layer.head_dim * 2 + slot % 2;
  for (int64_t d = 0; d < layer.head_dim; d += 16) {
    for (int i = 0; i < 16; i += LANES) store_bf16(rounded + i, load(v + d + i));
    for (int i = 0; i < 16; i++) pair[2 * (d + i)] = rounded[i];
  }
  if (is_last && slot % 2 == 0)
    for (int64_t d = 0; d < layer.head_dim; d++) pair[2 * d + 1] = 0;
}

// k, v: [num_kv_heads, D] of token t, which is in row r.
template <class Element>
inline void write_kv(const AttentionLayer& layer, const Rows& rows, int64_t r, int64_t t, const float* k, const float* v) {
  const int64_t position = rows.context_lens[r] + t - rows.query_starts[r];
  const int64_t block = rows.tables[layer.group][r * rows.table_width + position / layer.block_size];
  for (int64_t h = 0; h < layer.num_kv_heads; h++) {
    write_token(Page<Element>::of(layer.keys, layer, block, h), Page<Element>::of(layer.values, layer, block, h),
                position % layer.block_size, layer, k + h * layer.head_dim, v + h * layer.head_dim, t + 1 == rows.query_starts[r + 1]);
  }
}

inline int64_t row_of_token(const Rows& rows, int64_t t) {
  return std::upper_bound(rows.query_starts, rows.query_starts + rows.num_rows + 1, t) - rows.query_starts - 1;
}

// The step's tiles for layers of such shape. Long chunks first: the last to finish should be short.
inline std::vector<Tile> plan_tiles(const AttentionLayer& layer, const Rows& rows) {
  const int64_t heads = layer.num_heads / layer.num_kv_heads, most = std::max<int64_t>(1, TILE_QUERIES / heads);
  std::vector<Tile> tiles;
  for (int64_t r = 0; r < rows.num_rows; r++) {
    const int64_t first = rows.query_starts[r], count = rows.query_starts[r + 1] - first, context = rows.context_lens[r];
    for (int64_t done = 0; done < count; done += most) {
      const int64_t tokens = std::min(most, count - done), to = context + done + tokens;
      int64_t from = layer.window ? std::max<int64_t>(0, context + done + 1 - layer.window) : 0;
      from -= from % layer.block_size;
      if (count > 1 || to - from <= SPLIT_KEYS) {
        tiles.push_back({r, first + done, tokens, from, to, -1});
        continue;
      }
      for (int64_t part = 0; from < to; from += SPLIT_KEYS, part++) tiles.push_back({r, first, 1, from, std::min(to, from + SPLIT_KEYS), part});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.count * (a.to - a.from) > b.count * (b.to - b.from); });
  return tiles;
}

// What a part of a row's keys leaves to be put together: per query head the maximum, the sum, and D values not yet divided.
struct Parts {
  std::vector<float> memory;
  int64_t heads = 0, dim = 0, per_row = 0;
  void make_room(int64_t rows, int64_t parts, int64_t num_heads, int64_t head_dim) {
    heads = num_heads;
    dim = head_dim;
    per_row = parts;
    memory.resize(size_t(rows * parts * heads * (dim + 2)));
  }
  float* at(int64_t row, int64_t part, int64_t head) { return memory.data() + ((row * per_row + part) * heads + head) * (dim + 2); }
};

// Scores of ROWS queries with PAGES times 16 keys, each 16 at one of `keys`: several at a time, so that enough sums are under way.
template <class Element, int ROWS, int PAGES>
inline void scores_of_tile(const float* q, const AttentionLayer& layer, const Element* const* keys, float* scores) {
  constexpr int VECTORS = 16 / LANES;
  Vec acc[PAGES][ROWS][VECTORS];
  for (auto& page : acc)
    for (auto& row : page)
      for (Vec& x : row) x = zero();
  multiply_pages<ROWS, PAGES, VECTORS>(q, layer.head_dim, keys, layer.block_size, layer.head_dim, acc);
  for (int p = 0; p < PAGES; p++)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) store(scores + r * KEY_BLOCK + p * 16 + v * LANES, acc[p][r][v]);
}

// Of rows [row, end) with `count` sixteens of keys.
template <class Element, int ROWS, int PAGES>
inline void scores_of_rows(const float* q, int64_t row, int64_t end, const AttentionLayer& layer, const Element* const* keys, int64_t count,
                           float* scores) {
  for (; row + ROWS <= end; row += ROWS) {
    int64_t p = 0;
    for (; p + PAGES <= count; p += PAGES)
      scores_of_tile<Element, ROWS, PAGES>(q + row * layer.head_dim, layer, keys + p, scores + row * KEY_BLOCK + p * 16);
    for (; p < count; p++) scores_of_tile<Element, ROWS, 1>(q + row * layer.head_dim, layer, keys + p, scores + row * KEY_BLOCK + p * 16);
  }
  if constexpr (ROWS > 1) {
    constexpr int MORE = LANES == 16 ? 4 : ROWS - 1 <= 3 ? 2 : 1;
    if (row < end) scores_of_rows<Element, ROWS - 1, MORE>(q, row, end, layer, keys, count, scores);
  }
}

template <class Element, int ROWS, int VECTORS>
inline void add_values(const float* p, const Element* values, int64_t num_keys, int64_t dim, float* out) {
  Vec acc[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) acc[r][v] = load(out + r * dim + v * LANES);
  multiply<ROWS, VECTORS>(p, KEY_BLOCK, values, dim, num_keys, acc);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(out + r * dim + v * LANES, acc[r][v]);
}

template <class Element, int ROWS>
inline void values_of_rows(const float* p, int64_t row, int64_t end, const AttentionLayer& layer, const Element* values, int64_t num_keys, float* out) {
  constexpr int VECTORS = LANES == 16 ? 4 : 2;
  constexpr int64_t per_column = sizeof(Element) == 2 ? 2 : 1;
  const int64_t dim = layer.head_dim;
  for (; row + ROWS <= end; row += ROWS) {
    int64_t d = 0;
    for (; d + VECTORS * LANES <= dim; d += VECTORS * LANES)
      add_values<Element, ROWS, VECTORS>(p + row * KEY_BLOCK, values + d * per_column, num_keys, dim, out + row * dim + d);
    for (; d < dim; d += LANES) add_values<Element, ROWS, 1>(p + row * KEY_BLOCK, values + d * per_column, num_keys, dim, out + row * dim + d);
  }
  if constexpr (ROWS > 1) {
    if (row < end) values_of_rows<Element, ROWS - 1>(p, row, end, layer, values, num_keys, out);
  }
}

// A row's scores [count] become probabilities relative to the new maximum; returns the factor by which what was summed before shrinks.
inline float soften(float* scores, int64_t count, float& maximum, float& total) {
  Vec most = all(maximum);
  for (int64_t i = 0; i < count; i += LANES) most = max(most, load(scores + i));
  const float now = largest(most);
  if (now == -std::numeric_limits<float>::infinity()) {
    std::fill(scores, scores + count, 0.0f);
    return 1.0f;
  }
  Vec added = zero();
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec p = exp(sub(load(scores + i), all(now)));
    store(scores + i, p);
    added = add(added, p);
  }
  const float shrink = maximum == now ? 1.0f : std::exp(maximum - now);
  maximum = now;
  total = total * shrink + sum(added);
  return shrink;
}

struct TileMemory {
  alignas(64) float scores[TILE_QUERIES * KEY_BLOCK];
  float maximum[TILE_QUERIES], total[TILE_QUERIES];
  std::vector<float> queries, out;
};

// One tile of one key/value head. q: [T, num_heads, D] with rows ldq apart; out likewise, or parts.
template <class Element>
void attend_tile(const AttentionLayer& layer, const Rows& rows, const Tile& tile, int64_t kv_head, const float* q, int64_t ldq, float* out,
                 int64_t ldo, Parts& parts) {
  static thread_local TileMemory memory;
  const int64_t dim = layer.head_dim, heads = layer.num_heads / layer.num_kv_heads, size = layer.block_size;
  const int64_t num = tile.count * heads;
  const float infinity = std::numeric_limits<float>::infinity();
  memory.queries.resize(size_t(std::max(num, TILE_QUERIES) * dim));
  memory.out.assign(size_t(num * dim), 0.0f);
  for (int64_t i = 0; i < num; i++) {
    const float* from = q + (tile.first + i / heads) * ldq + (kv_head * heads + i % heads) * dim;
    for (int64_t d = 0; d < dim; d += LANES) store(&memory.queries[size_t(i * dim + d)], mul(load(from + d), all(layer.scaling)));
    const bool has_sink = layer.sinks && tile.part <= 0;
    memory.maximum[i] = has_sink ? layer.sinks[kv_head * heads + i % heads] : -infinity;
    memory.total[i] = has_sink ? 1.0f : 0.0f;
  }
  const int32_t* table = rows.tables[layer.group] + tile.row * rows.table_width;
  const int64_t start = rows.context_lens[tile.row] + tile.first - rows.query_starts[tile.row];  // the first query's position
  for (int64_t from = tile.from; from < tile.to; from += KEY_BLOCK) {
    const int64_t count = std::min(KEY_BLOCK, tile.to - from);
    const Element* keys[KEY_BLOCK / 16];
    const int64_t sixteens = round_up(count, 16) / 16;
    for (int64_t i = 0; i < sixteens; i++) {
      const int64_t key = from + 16 * i;
      keys[i] = Page<Element>::of(layer.keys, layer, table[key / size], kv_head) + key % size * (sizeof(Element) == 2 ? 2 : 1);
    }
    scores_of_rows<Element, 6, LANES == 16 ? 4 : 1>(memory.queries.data(), 0, num, layer, keys, sixteens, memory.scores);
    const int64_t padded = round_up(count, LANES);
    for (int64_t i = 0; i < num; i++) {
      float* scores = memory.scores + i * KEY_BLOCK;
      if (layer.softcap > 0.0f)
        for (int64_t c = 0; c < padded; c += LANES) store(scores + c, mul(all(layer.softcap), tanh(mul(load(scores + c), all(1.0f / layer.softcap)))));
      const int64_t position = start + i / heads;
      const int64_t seen = std::clamp<int64_t>(position + 1 - from, 0, count);
      std::fill(scores + seen, scores + round_up(count, 16), -infinity);
      if (layer.window) std::fill(scores, scores + std::clamp<int64_t>(position + 1 - layer.window - from, 0, count), -infinity);
      const float shrink = soften(scores, padded, memory.maximum[i], memory.total[i]);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < dim; d += LANES) store(&memory.out[size_t(i * dim + d)], mul(load(&memory.out[size_t(i * dim + d)]), all(shrink)));
    }
    for (int64_t page = 0; page < count; page += size) {
      const Element* values = Page<Element>::of(layer.values, layer, table[(from + page) / size], kv_head);
      const int64_t num_keys = std::min(size, count - page);
      values_of_rows<Element, 6>(memory.scores + page, 0, num, layer, values, sizeof(Element) == 2 ? round_up(num_keys, 2) : num_keys, memory.out.data());
    }
  }
  for (int64_t i = 0; i < num; i++) {
    const int64_t head = kv_head * heads + i % heads;
    const float* from = &memory.out[size_t(i * dim)];
    if (tile.part < 0) {
      float* to = out + (tile.first + i / heads) * ldo + head * dim;
      const Vec inverse = all(1.0f / memory.total[i]);
      for (int64_t d = 0; d < dim; d += LANES) store(to + d, mul(load(from + d), inverse));
    } else {
      float* to = parts.at(tile.row, tile.part, head);
      to[0] = memory.maximum[i];
      to[1] = memory.total[i];
      std::copy(from, from + dim, to + 2);
    }
  }
}

// Puts together the parts of one row's head, in order.
inline void join_parts(const AttentionLayer& layer, int64_t row, int64_t head, int64_t num_parts, float* out, Parts& parts) {
  float maximum = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t part = 0; part < num_parts; part++) maximum = std::max(maximum, parts.at(row, part, head)[0]);
  std::fill(out, out + layer.head_dim, 0.0f);
  for (int64_t part = 0; part < num_parts; part++) {
    const float* from = parts.at(row, part, head);
    const float weight = std::exp(from[0] - maximum);
    total += from[1] * weight;
    for (int64_t d = 0; d < layer.head_dim; d++) out[d] += from[2 + d] * weight;
  }
  for (int64_t d = 0; d < layer.head_dim; d++) out[d] /= total;
}

// A step's tiles for the layers of one kind, made by one thread before the team starts.
struct AttentionPlan {
  std::vector<Tile> tiles;
  std::vector<std::pair<int64_t, int64_t>> joined;  // rows in parts, and their number of parts
  Parts parts;

  AttentionPlan(const AttentionLayer& layer, const Rows& rows) : tiles(plan_tiles(layer, rows)) {
    int64_t most = 0;
    for (const Tile& tile : tiles) {
      if (tile.part < 0) continue;
      most = std::max(most, tile.part + 1);
      auto found = std::find_if(joined.begin(), joined.end(), [&](const auto& entry) { return entry.first == tile.row; });
      if (found == joined.end()) joined.emplace_back(tile.row, tile.part + 1);
      else found->second = std::max(found->second, tile.part + 1);
    }
    if (most) parts.make_room(rows.num_rows, most, layer.num_heads, layer.head_dim);
  }
};

// Phases of the team: attention of all rows, their keys and values written before. q, out: [T, num_heads, D], ldq and ldo apart.
inline void attend(Team& team, const AttentionLayer& layer, const Rows& rows, AttentionPlan& plan, const float* q, int64_t ldq, float* out, int64_t ldo) {
  team.share(int64_t(plan.tiles.size()) * layer.num_kv_heads, [&](int64_t i) {
    const Tile& tile = plan.tiles[size_t(i / layer.num_kv_heads)];
    if (layer.is_bf16) attend_tile<uint16_t>(layer, rows, tile, i % layer.num_kv_heads, q, ldq, out, ldo, plan.parts);
    else attend_tile<float>(layer, rows, tile, i % layer.num_kv_heads, q, ldq, out, ldo, plan.parts);
  });
  if (plan.joined.empty()) return;
  team.share(int64_t(plan.joined.size()) * layer.num_heads, [&](int64_t i) {
    const auto [row, num_parts] = plan.joined[size_t(i / layer.num_heads)];
    const int64_t head = i % layer.num_heads;
    join_parts(layer, row, head, num_parts, out + rows.query_starts[row] * ldo + head * layer.head_dim, plan.parts);
  });
}

}  // namespace octavo
