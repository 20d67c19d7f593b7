// A whole decoder for one step: every layer's norms, linears, rotary embedding and attention, as phases of one team.
#pragma once

#include <chrono>

#include "attention.h"

namespace octavo {

// As ctypes sees it. Absent norms have a null weight. An RMSNorm multiplies by offset + weight.
struct Norm {
  const float* weight;
  float eps, offset;
};

enum Activation : int64_t { SILU = 0, GELU_TANH = 1 };

// One layer, as ctypes sees it. cos, sin: [positions, rotary_half]. post_attention, post_mlp: Gemma's norms of what is added to the
// residual; query_norm, key_norm: of every head.
struct Layer {
  Linear qkv, output, gate_up, down;
  Norm input_norm, mlp_norm, post_attention_norm, post_mlp_norm, query_norm, key_norm;
  const float* cos;
  const float* sin;
  int64_t rotary_half;
  Activation activation;
  const AttentionLayer* attention;
};

inline void norm_row(const Norm& norm, const float* x, int64_t n, float* y) {
  Vec squares = zero();
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / float(n) + norm.eps);
  for (i = 0; i + LANES <= n; i += LANES)
    store(y + i, mul(mul(load(x + i), all(scale)), add(load(norm.weight + i), all(norm.offset))));
  for (; i < n; i++) y[i] = x[i] * scale * (norm.weight[i] + norm.offset);
}

inline void add_row(float* to, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += x[i];
}

inline void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

inline Vec activate(Activation activation, Vec x) {
  if (activation == SILU) return mul(x, sigmoid(x));
  const Vec inner = mul(all(0.7978845608f), fma(mul(mul(x, x), x), all(0.044715f), x));
  return mul(mul(all(0.5f), x), add(all(1.0f), tanh(inner)));
}

// Memory that a team's steps share; it grows to the largest.
struct Scratch {
  std::vector<float> qkv, attended, gated, added;
  std::vector<char> inputs;
  void make_room(const Layer& layer, int64_t tokens) {
    const int64_t heads_out = layer.output.k, hidden = layer.output.n, widest = std::max({layer.qkv.k, heads_out, layer.down.k});
    grow(qkv, tokens * layer.qkv.n);
    grow(attended, tokens * heads_out);
    grow(gated, tokens * layer.down.k);
    grow(added, tokens * hidden);
    grow(inputs, inputs_bytes(tokens, widest));
  }
  template <class T>
  static void grow(std::vector<T>& memory, int64_t size) {
    if (int64_t(memory.size()) < size) memory.resize(size_t(size));
  }
};

// A few rows a piece, so that a step of decodes is shared and a prompt is not cut into crumbs.
template <class Body>
void share_rows(Team& team, int64_t rows, const Body& body) {
  const int64_t together = std::clamp<int64_t>(rows / (4 * team.size()), 1, 16);
  team.share((rows + together - 1) / together, [&](int64_t piece) {
    for (int64_t row = piece * together; row < std::min(rows, (piece + 1) * together); row++) body(row);
  });
}

// x [m, k], contiguous, as a linear multiplies it: itself, or prepared in memory by one phase of the team.
inline Inputs inputs_of(Team& team, const Linear& w, float* x, int64_t m, void* memory) {
  Inputs in = inputs_in(memory, w.format, m, w.k);
  if (takes_float32(w.format)) {
    in.rows = reinterpret_cast<char*>(x);
    return in;
  }
  share_rows(team, m, [&](int64_t row) { prepare_row(in, w.format, row, x + row * w.k, w.k); });
  return in;
}

// residual += what a product gives, by way of a norm where there is one.
inline void add_product(Team& team, const Linear& w, const Inputs& in, int64_t m, const Norm& post, float* residual, float* memory) {
  if (!post.weight) {
    multiply_into(team, w, in, m, residual, w.n, true);
    return;
  }
  multiply_into(team, w, in, m, memory, w.n, false);
  share_rows(team, m, [&](int64_t row) {
    norm_row(post, memory + row * w.n, w.n, memory + row * w.n);
    add_row(residual + row * w.n, memory + row * w.n, w.n);
  });
}

inline Inputs normed_inputs(Team& team, const Norm& norm, const Linear& w, const float* residual, int64_t m, void* memory) {
  const Inputs in = inputs_in(memory, w.format, m, w.k);
  share_rows(team, m, [&](int64_t row) {
    static thread_local std::vector<float> normed;
    normed.resize(size_t(w.k));
    norm_row(norm, residual + row * w.k, w.k, normed.data());
    prepare_row(in, w.format, row, normed.data(), w.k);
  });
  return in;
}

// Head norms and rotary embedding in place; keys and values to their pages.
inline void rotate_and_write(Team& team, const Layer& layer, const Rows& rows, float* qkv) {
  const AttentionLayer& attention = *layer.attention;
  const int64_t dim = attention.head_dim, heads = attention.num_heads, kv_heads = attention.num_kv_heads;
  share_rows(team, rows.num_tokens, [&](int64_t t) {
    const int64_t row = row_of_token(rows, t), position = rows.context_lens[row] + t - rows.query_starts[row];
    float* token = qkv + t * (heads + 2 * kv_heads) * dim;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
      const Norm& norm = h < heads ? layer.query_norm : layer.key_norm;
      if (norm.weight) norm_row(norm, token + h * dim, dim, token + h * dim);
      rotate_head(token + h * dim, layer.cos + position * layer.rotary_half, layer.sin + position * layer.rotary_half, layer.rotary_half);
    }
    const float* k = token + heads * dim;
    if (attention.is_bf16) write_kv<uint16_t>(attention, rows, row, t, k, k + kv_heads * dim);
    else write_kv<float>(attention, rows, row, t, k, k + kv_heads * dim);
  });
}

// The parts of a layer, in their order. A norm also prepares the input of the product behind it; the activation is in GATE_UP.
enum Part { INPUT_NORM, QKV, ROTARY, ATTENTION, OUTPUT, MLP_NORM, GATE_UP, DOWN, PARTS };

// Adds to each part the time since the part before it ended; one member of the team has it, and only where somebody asked.
struct Stopwatch {
  using Clock = std::chrono::steady_clock;
  double* seconds;  // [PARTS + 1], the last for what follows the layers; null where nobody asked
  Clock::time_point last = Clock::now();
  void ended(int64_t part) {
    if (!seconds) return;
    const auto now = Clock::now();
    seconds[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

inline void run_layer(Team& team, const Layer& layer, const Rows& rows, AttentionPlan& plan, float* residual, Scratch& scratch, Stopwatch& watch) {
  const int64_t m = rows.num_tokens, qkv_size = layer.qkv.n;
  void* memory = scratch.inputs.data();
  Inputs in = normed_inputs(team, layer.input_norm, layer.qkv, residual, m, memory);
  watch.ended(INPUT_NORM);
  multiply_into(team, layer.qkv, in, m, scratch.qkv.data(), qkv_size, false);
  watch.ended(QKV);
  rotate_and_write(team, layer, rows, scratch.qkv.data());
  watch.ended(ROTARY);
  attend(team, *layer.attention, rows, plan, scratch.qkv.data(), qkv_size, scratch.attended.data(), layer.output.k);
  watch.ended(ATTENTION);
  in = inputs_of(team, layer.output, scratch.attended.data(), m, memory);
  add_product(team, layer.output, in, m, layer.post_attention_norm, residual, scratch.added.data());
  watch.ended(OUTPUT);

  in = normed_inputs(team, layer.mlp_norm, layer.gate_up, residual, m, memory);
  watch.ended(MLP_NORM);
  float* gated = scratch.gated.data();
  const int64_t width = layer.down.k;
  product(team, layer.gate_up, in, m, [&](int64_t row, int64_t panel, Vec gate, Vec value) {
    store_part(gated + row * width + panel * LANES, width - panel * LANES, mul(activate(layer.activation, gate), value));
  });
  watch.ended(GATE_UP);
  in = inputs_of(team, layer.down, gated, m, memory);
  add_product(team, layer.down, in, m, layer.post_mlp_norm, residual, scratch.added.data());
  watch.ended(DOWN);
}

}  // namespace octavo
