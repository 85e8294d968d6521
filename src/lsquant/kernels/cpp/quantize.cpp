// The staircase and its gradients: one read and one write forward; backward reads input and upstream gradient once and
// writes the input's gradient once.  docs/mathematics.md, (M2) to (M6) and (M10).
//
// The sums of the step gradient have an order that depends on the shape alone: LANES float32 chains of at most CHAIN
// additions make a block, lanes and blocks are added in float64.  So the bits are the same for any number of threads.
#include "common.h"

namespace lsquant {
namespace {

constexpr int64_t LANES = 16, CHAIN = 256, BLOCK = LANES * CHAIN;
constexpr int64_t GRAIN = 8;  // blocks that make a thread worth while

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
constexpr int64_t PARTS = LANES / WIDTH;

typedef float Vec __attribute__((vector_size(4 * WIDTH)));  // one register
typedef int32_t Mask __attribute__((vector_size(4 * WIDTH)));
struct Chains {  // LANES sums of each kind
  Vec terms[PARTS], outs[PARTS];
};

template <class T>
inline Vec load_vec(const T* from) {
  Vec v;
  for (int64_t l = 0; l < WIDTH; ++l) v[l] = load(from[l]);
  return v;
}
template <>
inline Vec load_vec(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline void store_vec(T* to, const Vec& v) {
  for (int64_t l = 0; l < WIDTH; ++l) store(to + l, v[l]);
}
template <>
inline void store_vec(float* to, const Vec& v) { std::memcpy(to, &v, sizeof v); }

inline Vec rounded_vec(const Vec& v) {
  Vec r;
  for (int64_t l = 0; l < WIDTH; ++l) r[l] = rounded(v[l]);
  return r;
}

struct Here {  // the quantizer at LANES elements
  Vec step[PARTS], zero[PARTS];
  float q_min, q_max;
};

inline Vec staircase(const Vec& v, const Vec& step, const Vec& zero, const Here& q) {
  const Vec nan = Vec{} + __builtin_nanf(""), low = Vec{} + q.q_min, high = Vec{} + q.q_max;
  Vec code = rounded_vec(v / step) + zero;
  code = code < low ? low : code;
  code = code > high ? high : code;
  return v - v == 0.0f ? (code - zero) * step : nan;  // v - v is NaN for infinities, too
}

// the input's gradient; the terms of the step's and of the offset's
inline Vec slopes(const Vec& v, const Vec& up, const Vec& step, const Vec& zero, const Here& q, bool learned, Vec* terms,
                  Vec* outs) {
  const Vec nan = Vec{} + __builtin_nanf(""), none = Vec{};
  const Vec low = q.q_min - zero, high = q.q_max - zero;
  const Vec vs = v - v == 0.0f ? v / step : nan;
  const Mask in = (vs > low) & (vs < high);
  const Vec out_low = learned ? none + q.q_min : low, out_high = learned ? none + q.q_max : high;
  const Vec outer = vs <= low ? out_low : out_high;
  *terms += ((in | (vs != vs)) ? rounded_vec(vs) - vs : outer) * up;
  *outs += in ? none : up;
  return in ? up : none;
}

Here at(const Grid& g, int64_t i) {
  Here h;
  std::fill_n(h.step, PARTS, Vec{} + g.step[i]);
  std::fill_n(h.zero, PARTS, Vec{} + g.zero[i]);
  h.q_min = g.q_min, h.q_max = g.q_max;
  return h;
}

template <class T>
inline void forward_lanes(const T* x, T* y, const Here& q) {
  for (int64_t p = 0; p < PARTS; ++p)
    store_vec(y + p * WIDTH, staircase(load_vec(x + p * WIDTH), q.step[p], q.zero[p], q));
}

template <class G, class T, class O>
inline void backward_lanes(const G* up, const T* x, O* grad, const Here& q, bool learned, Chains* sums) {
  for (int64_t p = 0; p < PARTS; ++p)
    store_vec(grad + p * WIDTH, slopes(load_vec(x + p * WIDTH), load_vec(up + p * WIDTH), q.step[p], q.zero[p], q, learned,
                                       sums->terms + p, sums->outs + p));
}

template <class T>
void forward_run(const T* x, T* y, int64_t n, const Here& q) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) forward_lanes(x + i, y + i, q);
  if (i == n) return;
  T last[LANES] = {};
  std::copy(x + i, x + n, last);
  forward_lanes(last, last, q);
  std::copy_n(last, n - i, y + i);
}

// the last lanes are filled with zeros; an upstream zero adds nothing to a sum
template <class G, class T, class O>
void backward_run(const G* up, const T* x, O* grad, int64_t n, const Here& q, bool learned, Chains* sums) {
  Chains s = *sums;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) backward_lanes(up + i, x + i, grad + i, q, learned, &s);
  if (i < n) {
    T last[LANES] = {};
    G last_up[LANES] = {};
    O last_grad[LANES];
    std::copy(x + i, x + n, last);
    std::copy(up + i, up + n, last_up);
    backward_lanes(last_up, last, last_grad, q, learned, &s);
    std::copy_n(last_grad, n - i, grad + i);
  }
  *sums = s;
}

// steps and zeros repeated so that a row of steps x inner elements has its own at every place
struct Rows {
  Buffer<float> step, zero;
  int64_t length;
  Rows(const Grid& g, const Layout& l)
      : step(l.steps * l.inner + LANES), zero(l.steps * l.inner + LANES), length(l.steps * l.inner) {
    for (int64_t i = 0; i < length + LANES; ++i) {
      step.data[i] = i < length ? g.step[i / l.inner] : 1.0f;
      zero.data[i] = i < length ? g.zero[i / l.inner] : 0.0f;
    }
  }
  Here at(const Grid& g, int64_t i) const {
    Here h;
    std::memcpy(h.step, step.data + i, sizeof h.step);
    std::memcpy(h.zero, zero.data + i, sizeof h.zero);
    h.q_min = g.q_min, h.q_max = g.q_max;
    return h;
  }
};

bool in_runs(const Layout& l) { return l.steps == 1 || l.inner >= 4 * LANES; }

template <class T>
void forward(const T* x, T* y, const Layout& l, const Grid& g) {
  if (l.outer * l.steps * l.inner == 0) return;
  if (in_runs(l)) {
    const int64_t runs = l.outer * l.steps, parts = (l.inner + BLOCK - 1) / BLOCK;
    parallel(runs * parts, std::max<int64_t>(1, GRAIN * BLOCK / std::min(l.inner, BLOCK)), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t run = i / parts, start = i % parts * BLOCK;
        const int64_t from = run * l.inner + start;
        forward_run(x + from, y + from, std::min(BLOCK, l.inner - start), at(g, run % l.steps));
      }
    });
    return;
  }
  const Rows rows(g, l);
  parallel(l.outer, std::max<int64_t>(1, GRAIN * BLOCK / rows.length), [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; ++r)
      for (int64_t i = 0; i < rows.length; i += LANES) {
        const int64_t from = r * rows.length + i;
        forward_run(x + from, y + from, std::min(LANES, rows.length - i), rows.at(g, i));
      }
  });
}

template <class G, class T, class O>
void backward(const G* up, const T* x, O* grad, const Layout& l, const Grid& g, double* by_step, double* by_offset) {
  std::fill_n(by_step, l.steps, 0.0);
  std::fill_n(by_offset, l.steps, 0.0);
  if (l.outer * l.steps * l.inner == 0) return;
  if (in_runs(l)) {
    const int64_t runs = l.outer * l.steps, parts = (l.inner + BLOCK - 1) / BLOCK;
    std::vector<double> sums(2 * runs * parts, 0.0);
    parallel(runs * parts, std::max<int64_t>(1, GRAIN * BLOCK / std::min(l.inner, BLOCK)), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t run = i / parts, start = i % parts * BLOCK, from = run * l.inner + start;
        Chains chains = {};
        backward_run(up + from, x + from, grad + from, std::min(BLOCK, l.inner - start), at(g, run % l.steps),
                     g.learned_offset, &chains);
        for (int64_t k = 0; k < LANES; ++k) {
          sums[2 * i] += chains.terms[k / WIDTH][k % WIDTH];
          sums[2 * i + 1] += chains.outs[k / WIDTH][k % WIDTH];
        }
      }
    });
    for (int64_t i = 0; i < runs * parts; ++i) {
      by_step[i / parts % l.steps] += sums[2 * i];
      by_offset[i / parts % l.steps] += sums[2 * i + 1];
    }
    return;
  }
  // short runs: one float32 chain of at most CHAIN rows at every place of a row
  const Rows rows(g, l);
  const int64_t n = rows.length, chunks = (l.outer + CHAIN - 1) / CHAIN, vecs = (n + LANES - 1) / LANES;
  std::vector<float> sums(2 * chunks * n);
  parallel(chunks, 1, [&](int64_t b, int64_t e) {
    Buffer<Chains> chains(vecs);
    for (int64_t chunk = b; chunk < e; ++chunk) {
      std::fill_n(chains.data, vecs, Chains{});
      for (int64_t r = chunk * CHAIN; r < std::min(l.outer, (chunk + 1) * CHAIN); ++r)
        for (int64_t k = 0; k < vecs; ++k) {
          const int64_t from = r * n + k * LANES;
          backward_run(up + from, x + from, grad + from, std::min(LANES, n - k * LANES), rows.at(g, k * LANES),
                       g.learned_offset, chains.data + k);
        }
      for (int64_t i = 0; i < n; ++i) {
        const Chains& c = chains.data[i / LANES];
        sums[2 * (chunk * n + i)] = c.terms[i % LANES / WIDTH][i % WIDTH];
        sums[2 * (chunk * n + i) + 1] = c.outs[i % LANES / WIDTH][i % WIDTH];
      }
    }
  });
  for (int64_t i = 0; i < chunks * n; ++i) {
    by_step[i % n / l.inner] += sums[2 * i];
    by_offset[i % n / l.inner] += sums[2 * i + 1];
  }
}

template <class F>
void with_type(Type t, const F& f) {
  if (t == Type::f32) f(float{});
  else if (t == Type::bf16) f(bf16{});
  else f(f16{});
}

}  // namespace

void quantize(Type type, const void* x, void* y, const Layout& l, const Grid& g) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(x), static_cast<T*>(y), l, g);
  });
}

void quantize_backward(Type grad_type, const void* grad, Type type, const void* x, Type out_type, void* grad_x,
                       const Layout& l, const Grid& g, double* grad_step, double* grad_offset) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto* v = static_cast<const T*>(x);
    if (grad_type == type) return backward(static_cast<const T*>(grad), v, static_cast<T*>(grad_x), l, g, grad_step, grad_offset);
    const auto* up = static_cast<const float*>(grad);  // what the layers' matrix products give
    if (out_type == Type::f32) return backward(up, v, static_cast<float*>(grad_x), l, g, grad_step, grad_offset);
    backward(up, v, static_cast<T*>(grad_x), l, g, grad_step, grad_offset);
  });
}

}  // namespace lsquant
