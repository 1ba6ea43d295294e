// Included by loss_kernels.cpp once for each instruction set, behind loss_kernels_impl.h, whose vectors it uses.

using U32 = uint32_t __attribute__((vector_size(64)));

// The first `left` of 16 floats, zeros behind them.
ALTERREC_INLINE F32 load_some(const float* p, int64_t left) {
  if (left >= kLanes) return load(p);
  float x[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) x[i] = p[i];
  return load(x);
}

ALTERREC_INLINE void store_some(float* p, F32 x, int64_t left) {
  if (left >= kLanes) return store(p, x);
  for (int64_t i = 0; i < left; ++i) p[i] = x[i];
}

ALTERREC_INLINE F32 root(F32 x) {
  float y[kLanes];
  store(y, x);
  for (int64_t i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(y[i]);
  return load(y);
}

struct MeanAndScale {
  float mean, scale;  // scale: one over the standard deviation
};

ALTERREC_INLINE MeanAndScale mean_and_scale(const float* x, int64_t d, float eps) {
  F32 sum = {};
  for (int64_t c = 0; c < d; c += kLanes) sum += load_some(x + c, d - c);
  const float mean = total(sum) / d;
  F32 squares = {};
  for (int64_t c = 0; c < d; c += kLanes) {
    const F32 apart = kLane < (int32_t)(d - c) ? load_some(x + c, d - c) - mean : F32{};
    squares += apart * apart;
  }
  return {mean, 1.0f / __builtin_sqrtf(total(squares) / d + eps)};
}

void normalise(const float* x, int64_t d, const RowNorm& norm, float* out) {
  const auto [mean, scale] = mean_and_scale(x, d, norm.eps);
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    const F32 y = (load_some(x + c, left) - mean) * scale;
    store_some(out + c, y * load_some(norm.weight + c, left) + load_some(norm.bias + c, left), left);
  }
}

void normalise_backward(const float* x, int64_t d, const RowNorm& norm, float* g, float* weight_sum, float* bias_sum) {
  const auto [mean, scale] = mean_and_scale(x, d, norm.eps);
  F32 along_ones = {}, along_x = {};
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    const F32 grad = load_some(g + c, left), y = (load_some(x + c, left) - mean) * scale;
    store_some(weight_sum + c, load_some(weight_sum + c, left) + grad * y, left);
    store_some(bias_sum + c, load_some(bias_sum + c, left) + grad, left);
    const F32 weighted = grad * load_some(norm.weight + c, left);  // zero beyond d
    along_ones += weighted;
    along_x += weighted * y;
  }
  const float ones = total(along_ones) / d, own = total(along_x) / d;
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    const F32 y = (load_some(x + c, left) - mean) * scale;
    const F32 weighted = load_some(g + c, left) * load_some(norm.weight + c, left);
    store_some(g + c, (weighted - ones - y * own) * scale, left);
  }
}

void step(const Optimizer& o, int64_t d, const float* g, float* x, float* first, float* second) {
  const auto gradient = [&](int64_t c, F32 row) ALTERREC_INLINE_LAMBDA {
    F32 grad = load_some(g + c, d - c) * o.scale;
    grad = grad > o.clip ? splat(o.clip) : grad;
    grad = grad < -o.clip ? splat(-o.clip) : grad;
    return grad + o.weight_decay * row;
  };
  if (o.kind == Optimizer::Kind::kRowwiseAdagrad) {
    F32 squares = {};
    for (int64_t c = 0; c < d; c += kLanes) {
      const F32 grad = gradient(c, load_some(x + c, d - c));
      squares += grad * grad;  // zero beyond d
    }
    *first += total(squares) / d;
  }
  const float adagrad =
      o.kind == Optimizer::Kind::kRowwiseAdagrad ? o.step_size / (__builtin_sqrtf(*first) + o.eps) : 0;
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    F32 row = load_some(x + c, left);
    const F32 grad = gradient(c, row);
    if (o.kind == Optimizer::Kind::kSgd) {
      row -= o.step_size * grad;
    } else if (o.kind == Optimizer::Kind::kRowwiseAdagrad) {
      row -= adagrad * grad;
    } else {
      F32 m = load_some(first + c, left), v = load_some(second + c, left);
      m += (grad - m) * o.rest1;
      v = o.beta2 * v + o.rest2 * grad * grad;
      store_some(first + c, m, left);
      store_some(second + c, v, left);
      const F32 over = o.kind == Optimizer::Kind::kAdam ? root(v) / o.root_correction + o.eps : root(v) + o.eps;
      row -= o.step_size * m / over;
    }
    store_some(x + c, row, left);
  }
}

void round_at_random(const float* x, int64_t d, uint32_t key, uint16_t* out) {
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    U32 draw = key + ((U32)kLane + (uint32_t)c) * 0x9e3779b9u;
    draw = (draw ^ (draw >> 16)) * 0x7feb352du;
    draw = (draw ^ (draw >> 15)) * 0x846ca68bu;
    draw = (draw ^ (draw >> 16)) & 0xffffu;
    const F32 value = load_some(x + c, left);
    const U32 bits = (U32)value;
    const I32 finite = ((I32)bits & 0x7f800000) != 0x7f800000;
    const U32 rounded = (bits + draw) >> 16;
    const I32 result = finite ? (I32)rounded : round_bits(value);
    const U16 narrow = __builtin_convertvector(result, U16);
    for (int64_t i = 0; i < (left < kLanes ? left : kLanes); ++i) out[c + i] = narrow[i];
  }
}

const TableKernels for_tables = {normalise, normalise_backward, step, round_at_random};
