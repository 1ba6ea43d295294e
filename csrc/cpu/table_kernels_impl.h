// Included by loss_kernels.cpp once for each instruction set, behind loss_kernels_impl.h, whose vectors it uses.

using U32 = uint32_t __attribute__((vector_size(64)));

// The sum of f(x[i]) over n numbers; loops over elements the compiler vectorises by itself, sums it must not reorder.
template <class Function>
ALTERREC_INLINE float sum_of(const float* x, int64_t n, Function f) {
  F32 sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] += f(load(x + i), i);
    sums[1] += f(load(x + i + kLanes), i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] += f(load(x + i), i);
  float rest = 0;
  for (; i < n; ++i) rest += f(splat(x[i]), i)[0];
  return total(sums[0] + sums[1]) + rest;
}

struct MeanAndScale {
  float mean, scale;  // scale: one over the standard deviation
};

ALTERREC_INLINE MeanAndScale mean_and_scale(const float* x, int64_t d, float eps) {
  const float mean = sum_of(x, d, [](F32 value, int64_t) ALTERREC_INLINE_LAMBDA { return value; }) / d;
  const float squares = sum_of(x, d, [mean](F32 value, int64_t) ALTERREC_INLINE_LAMBDA {
    const F32 apart = value - mean;
    return apart * apart;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / d + eps)};
}

void normalise(const float* x, int64_t d, const RowNorm& norm, float* out) {
  const MeanAndScale of = mean_and_scale(x, d, norm.eps);
  const float mean = of.mean, scale = of.scale;
  const float* __restrict weight = norm.weight, * __restrict bias = norm.bias;
  for (int64_t c = 0; c < d; ++c) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

void normalise_backward(const float* __restrict x, int64_t d, const RowNorm& norm, float* __restrict g,
                        float* __restrict weight_sum, float* __restrict bias_sum) {
  const MeanAndScale of = mean_and_scale(x, d, norm.eps);
  const float mean = of.mean, scale = of.scale;
  const float* __restrict weight = norm.weight;
  for (int64_t c = 0; c < d; ++c) {
    weight_sum[c] += g[c] * ((x[c] - mean) * scale);
    bias_sum[c] += g[c];
    g[c] *= weight[c];
  }
  const float ones = sum_of(g, d, [](F32 grad, int64_t) ALTERREC_INLINE_LAMBDA { return grad; }) / d;
  float own = 0;
  F32 along = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) along += load(g + c) * ((load(x + c) - mean) * scale);
  for (; c < d; ++c) own += g[c] * ((x[c] - mean) * scale);
  own = (own + total(along)) / d;
  for (c = 0; c < d; ++c) g[c] = (g[c] - ones - (x[c] - mean) * scale * own) * scale;
}

void step(const Optimizer& optimizer, int64_t d, const float* __restrict g, float* __restrict x,
          float* __restrict first, float* __restrict second) {
  const Optimizer o = optimizer;
  const auto gradient = [&o](float grad, float row) ALTERREC_INLINE_LAMBDA {
    grad *= o.scale;
    grad = grad > o.clip ? o.clip : grad;
    grad = grad < -o.clip ? -o.clip : grad;
    return grad + o.weight_decay * row;
  };
  if (o.kind == Optimizer::Kind::kSgd) {
    for (int64_t c = 0; c < d; ++c) x[c] -= o.step_size * gradient(g[c], x[c]);
  } else if (o.kind == Optimizer::Kind::kRowwiseAdagrad) {
    float squares[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const float grad = gradient(g[c + i], x[c + i]);
        squares[i] += grad * grad;
      }
    }
    float sum = total(load(squares));
    for (; c < d; ++c) sum += gradient(g[c], x[c]) * gradient(g[c], x[c]);
    *first += sum / d;
    const float rate = o.step_size / (__builtin_sqrtf(*first) + o.eps);
    for (c = 0; c < d; ++c) x[c] -= rate * gradient(g[c], x[c]);
  } else {
    const float root_correction = o.kind == Optimizer::Kind::kAdam ? o.root_correction : 1.0f;
    for (int64_t c = 0; c < d; ++c) {
      const float grad = gradient(g[c], x[c]);
      const float m = first[c] + (grad - first[c]) * o.rest1, v = o.beta2 * second[c] + o.rest2 * grad * grad;
      first[c] = m;
      second[c] = v;
      x[c] -= o.step_size * m / (__builtin_sqrtf(v) / root_correction + o.eps);
    }
  }
}

void round_at_random(const float* x, int64_t d, uint32_t key, uint16_t* out) {
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t left = d - c;
    U32 draw = key + ((U32)kLane + (uint32_t)c) * 0x9e3779b9u;
    draw = (draw ^ (draw >> 16)) * 0x7feb352du;
    draw = (draw ^ (draw >> 15)) * 0x846ca68bu;
    draw = (draw ^ (draw >> 16)) & 0xffffu;
    float some[kLanes] = {};
    for (int64_t i = 0; i < (left < kLanes ? left : kLanes); ++i) some[i] = x[c + i];
    const F32 value = load(some);
    const U32 bits = (U32)value;
    const I32 finite = ((I32)bits & 0x7f800000) != 0x7f800000;
    const U32 rounded = (bits + draw) >> 16;
    const I32 result = finite ? (I32)rounded : round_bits(value);
    const U16 narrow = __builtin_convertvector(result, U16);
    for (int64_t i = 0; i < (left < kLanes ? left : kLanes); ++i) out[c + i] = narrow[i];
  }
}

const TableKernels for_tables = {normalise, normalise_backward, step, round_at_random};
