// The C interface of the CPU kernels: what engine/kernels/cpu_ops.py calls. Shapes are checked there.
#include <cstdlib>
#include <memory>
#include <string>

#include "decoder.h"

using namespace octavo;

namespace {

struct Context {
  explicit Context(int threads) : team(threads) {}
  Team team;
  Scratch scratch;
};

std::string describe() {
  std::string isa = LANES == 16 ? "AVX-512" : "AVX2";
#ifdef OCTAVO_VNNI
  isa += ", VNNI";
#endif
#ifdef OCTAVO_BF16
  isa += ", BF16";
#endif
#ifdef OCTAVO_AMX
  if (amx_usable) isa += ", AMX";
#endif
  return isa;
}

}  // namespace

extern "C" {

const char* octavo_isa() {
  static const std::string isa = describe();
  return isa.c_str();
}

void* octavo_open(int64_t threads) { return new Context(int(threads)); }

void octavo_close(void* context) { delete static_cast<Context*>(context); }

int64_t octavo_packed_bytes(int64_t format, int64_t n, int64_t k, int64_t gated) {
  return num_panels(n, gated != 0) * panel_bytes(Format(format), k);
}

int64_t octavo_padded_columns(int64_t n, int64_t gated) { return num_panels(n, gated != 0) * COLUMNS; }

// The source row of every packed column, -1 for padding: [padded columns].
void octavo_column_order(int64_t n, int64_t gated, int64_t* rows) {
  for (int64_t p = 0; p < num_panels(n, gated != 0); p++)
    for (int64_t c = 0; c < COLUMNS; c++) rows[p * COLUMNS + c] = source_row(n, gated != 0, p, c);
}

void octavo_pack(void* context, int64_t format, const void* weights, int64_t is_bf16, int64_t n, int64_t k, int64_t gated, void* panels, float* scales) {
  Team& team = static_cast<Context*>(context)->team;
  if (is_bf16) pack(team, Format(format), static_cast<const uint16_t*>(weights), n, k, gated != 0, panels, scales);
  else pack(team, Format(format), static_cast<const float*>(weights), n, k, gated != 0, panels, scales);
}

// y [m, n] = x [m, k] W^T + b, float32.
void octavo_linear(void* context, const Linear* w, float* x, int64_t m, float* y) {
  auto* self = static_cast<Context*>(context);
  Scratch::grow(self->scratch.inputs, inputs_bytes(m, w->k));
  self->team.run([&](int) {
    const Inputs in = inputs_of(self->team, *w, x, m, self->scratch.inputs.data());
    multiply_into(self->team, *w, in, m, y, w->n, false);
  });
}

// Writes k and v [T, num_kv_heads, D] to their pages, then attends: q, out [T, num_heads, D]. All float32, contiguous.
void octavo_attention(void* context, const AttentionLayer* layer, const Rows* rows, const float* q, const float* k, const float* v, float* out) {
  auto* self = static_cast<Context*>(context);
  AttentionPlan plan(*layer, *rows);
  const int64_t kv_size = layer->num_kv_heads * layer->head_dim, size = layer->num_heads * layer->head_dim;
  self->team.run([&](int) {
    share_rows(self->team, rows->num_tokens, [&](int64_t t) {
      const int64_t row = row_of_token(*rows, t);
      if (layer->is_bf16) write_kv<uint16_t>(*layer, *rows, row, t, k + t * kv_size, v + t * kv_size);
      else write_kv<float>(*layer, *rows, row, t, k + t * kv_size, v + t * kv_size);
    });
    attend(self->team, *layer, *rows, plan, q, size, out, size);
  });
}

// All layers over residual [T, hidden], in place; then the final norm of it into hidden [T, hidden]. kinds[i]: which of the
// `num_kinds` tile plans layer i uses, made from the first layer of each kind. seconds: null, or [PARTS + 1], to which the time
// of each part of all layers, and of the final norm, is added.
void octavo_decode(void* context, const Layer* layers, int64_t num_layers, const int64_t* kinds, int64_t num_kinds, const Norm* norm,
                   const Rows* rows, float* residual, float* hidden, double* seconds) {
  auto* self = static_cast<Context*>(context);
  std::vector<std::unique_ptr<AttentionPlan>> plans{size_t(num_kinds)};
  for (int64_t i = 0; i < num_layers; i++) {
    if (!plans[size_t(kinds[i])]) plans[size_t(kinds[i])] = std::make_unique<AttentionPlan>(*layers[i].attention, *rows);
    self->scratch.make_room(layers[i], rows->num_tokens);
  }
  const int64_t size = layers[0].qkv.k;
  self->team.run([&](int member) {
    Stopwatch watch{member == 0 ? seconds : nullptr};
    for (int64_t i = 0; i < num_layers; i++)
      run_layer(self->team, layers[i], *rows, *plans[size_t(kinds[i])], residual, self->scratch, watch);
    if (norm) share_rows(self->team, rows->num_tokens, [&](int64_t t) { norm_row(*norm, residual + t * size, size, hidden + t * size); });
    watch.ended(PARTS);
  });
}

}  // extern "C"
