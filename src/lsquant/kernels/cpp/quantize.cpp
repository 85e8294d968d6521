// The staircase and its gradients: one read and one write forward; backward reads input and upstream gradient once and
// writes the input's gradient once.  docs/mathematics.md, (M2) to (M6) and (M10).  BatchNorm in eval mode goes the same way.
//
// The sums of the step gradient have an order that depends on the shape alone: LANES float32 chains of at most CHAIN
// additions make a block, lanes and blocks are added in float64.  So the bits are the same for any number of threads.
#include "common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
struct Chains {  // LANES sums of each kind
  Vec terms[PARTS], outs[PARTS];
};

template <class V, class T>
inline V raw(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Vec load_vec(const float* from) { return raw<Vec>(from); }
inline void store_vec(float* to, const Vec& v) { std::memcpy(to, &v, sizeof v); }

// bfloat16, float16, and the larger and the smaller of two: the second one where one is NaN
#if defined(__AVX512F__)
inline Bits wide(__m256i halves) { return (Bits)_mm512_cvtepu16_epi32(halves); }
inline __m256i narrow(const Bits& words) { return _mm512_cvtepi32_epi16((__m512i)words); }
inline Vec load_vec(const f16* from) { return (Vec)_mm512_cvtph_ps(raw<__m256i>(from)); }
inline __m256i halves(const Vec& v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline Vec larger(const Vec& a, const Vec& b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec smaller(const Vec& a, const Vec& b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
using Halves = __m256i;
#elif defined(__AVX2__) && defined(__F16C__)
inline Bits wide(__m128i halves) { return (Bits)_mm256_cvtepu16_epi32(halves); }
inline __m128i narrow(const Bits& words) {
  return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
}
inline Vec load_vec(const f16* from) { return (Vec)_mm256_cvtph_ps(raw<__m128i>(from)); }
inline __m128i halves(const Vec& v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
inline Vec larger(const Vec& a, const Vec& b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec smaller(const Vec& a, const Vec& b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
using Halves = __m128i;
#else
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
inline Bits wide(const Halves& h) { return __builtin_convertvector(h, Bits); }
inline Halves narrow(const Bits& words) { return __builtin_convertvector(words, Halves); }
inline Vec load_vec(const f16* from) {
  Vec v;
  for (int64_t l = 0; l < WIDTH; ++l) v[l] = load(from[l]);
  return v;
}
inline Halves halves(const Vec& v) {
  f16 to[WIDTH];
  for (int64_t l = 0; l < WIDTH; ++l) store(to + l, v[l]);
  return raw<Halves>(to);
}
inline Vec larger(const Vec& a, const Vec& b) { return a > b ? a : b; }
inline Vec smaller(const Vec& a, const Vec& b) { return a < b ? a : b; }
#endif
inline Vec load_vec(const bf16* from) { return (Vec)(wide(raw<Halves>(from)) << 16); }
inline void store_vec(bf16* to, const Vec& v) {
  const Bits u = (Bits)v, nan = Bits{} + 0x7fc0;
  const Halves h = narrow(v != v ? nan : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  std::memcpy(to, &h, sizeof h);
}
inline void store_vec(f16* to, const Vec& v) {
  const Halves h = halves(v);
  std::memcpy(to, &h, sizeof h);
}

inline Vec rounded_vec(const Vec& v) {
  Vec r;
  for (int64_t l = 0; l < WIDTH; ++l) r[l] = rounded(v[l]);
  return r;
}
inline Vec where(const Mask& m, const Vec& v) { return (Vec)(m & (Mask)v); }  // else 0

struct Here {  // the quantizer at LANES elements
  Vec step[PARTS], zero[PARTS];
  Vec q_min, q_max;
};

// v - v is 0, and NaN where v is NaN or infinite; taking 0 off keeps the sign of a zero
inline Vec staircase(const Vec& v, const Vec& step, const Vec& zero, const Here& q) {
  const Vec code = smaller(q.q_max, larger(q.q_min, rounded_vec(v / step) + zero));
  return (code - zero) * step - (v - v);
}

// the input's gradient; the terms of the step's and, where the offset is learned, of the offset's
template <bool learned>
inline Vec slopes(const Vec& v, const Vec& up, const Vec& step, const Vec& zero, const Here& q, Vec* terms, Vec* outs) {
  const Vec low = q.q_min - zero, high = q.q_max - zero, vs = v / step - (v - v);
  const Mask in = (vs > low) & (vs < high);
  Vec term = rounded_vec(smaller(high, larger(low, vs))) - where(in, vs);  // round(v/s) - v/s, or the bound outside
  if (learned) {
    term += where(~in, zero);
    *outs += where(~in, up);
  }
  *terms += term * up;
  return where(in, up);
}

Here at(const Grid& g, int64_t i) {
  Here h;
  std::fill_n(h.step, PARTS, Vec{} + g.step[i]);
  std::fill_n(h.zero, PARTS, Vec{} + g.zero[i]);
  h.q_min = Vec{} + g.q_min, h.q_max = Vec{} + g.q_max;
  return h;
}

// affine: x * step + zero, two roundings, instead of the staircase
template <bool affine, class T>
inline void forward_lanes(const T* x, T* y, const Here& q) {
#pragma GCC unroll 4
  for (int64_t p = 0; p < PARTS; ++p) {
    const Vec v = load_vec(x + p * WIDTH);
    store_vec(y + p * WIDTH, affine ? v * q.step[p] + q.zero[p] : staircase(v, q.step[p], q.zero[p], q));
  }
}

template <bool learned, class G, class T, class O>
inline void backward_lanes(const G* up, const T* x, O* grad, const Here& q, Chains* sums) {
#pragma GCC unroll 4
  for (int64_t p = 0; p < PARTS; ++p)
    store_vec(grad + p * WIDTH, slopes<learned>(load_vec(x + p * WIDTH), load_vec(up + p * WIDTH), q.step[p], q.zero[p], q,
                                                sums->terms + p, sums->outs + p));
}

// `rows` times n elements, `stride` apart, of which n is at most LANES if there are several; all with the same Here
template <bool affine, class T>
void forward_run(const T* x, T* y, int64_t n, const Here& q, int64_t rows = 1, int64_t stride = 0) {
  for (int64_t r = 0; r < rows; ++r, x += stride, y += stride) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) forward_lanes<affine>(x + i, y + i, q);
    if (i == n) continue;
    T last[LANES] = {};
    std::copy(x + i, x + n, last);
    forward_lanes<affine>(last, last, q);
    std::copy_n(last, n - i, y + i);
  }
}

// the last lanes are filled with zeros; an upstream zero adds nothing to a sum
template <bool learned, class G, class T, class O>
void backward_run(const G* up, const T* x, O* grad, int64_t n, const Here& q, Chains* sums, int64_t rows = 1, int64_t stride = 0) {
  Chains s = *sums;
  for (int64_t r = 0; r < rows; ++r, up += stride, x += stride, grad += stride) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) backward_lanes<learned>(up + i, x + i, grad + i, q, &s);
    if (i == n) continue;
    T last[LANES] = {};
    G last_up[LANES] = {};
    O last_grad[LANES];
    std::copy(x + i, x + n, last);
    std::copy(up + i, up + n, last_up);
    backward_lanes<learned>(last_up, last, last_grad, q, &s);
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
    h.q_min = Vec{} + g.q_min, h.q_max = Vec{} + g.q_max;
    return h;
  }
};

// rows that are gone through at once, so that they stay in the cache
int64_t rows_at_once(const Rows& rows) { return std::clamp<int64_t>(1024 / std::max<int64_t>(1, rows.length), 1, CHAIN); }

bool in_runs(const Layout& l) { return l.steps == 1 || l.inner >= 4 * LANES; }

template <bool affine, class T>
void forward(const T* x, T* y, const Layout& l, const Grid& g) {
  if (l.outer * l.steps * l.inner == 0) return;
  if (in_runs(l)) {
    const int64_t runs = l.outer * l.steps, parts = (l.inner + BLOCK - 1) / BLOCK;
    parallel(runs * parts, std::max<int64_t>(1, GRAIN * BLOCK / std::min(l.inner, BLOCK)), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t run = i / parts, start = i % parts * BLOCK;
        const int64_t from = run * l.inner + start;
        forward_run<affine>(x + from, y + from, std::min(BLOCK, l.inner - start), at(g, run % l.steps));
      }
    });
    return;
  }
  const Rows rows(g, l);
  const int64_t n = rows.length, step = rows_at_once(rows);
  parallel(l.outer, std::max<int64_t>(1, GRAIN * BLOCK / n), [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; r += step)
      for (int64_t i = 0; i < n; i += LANES)
        forward_run<affine>(x + r * n + i, y + r * n + i, std::min(LANES, n - i), rows.at(g, i), std::min(step, e - r), n);
  });
}

template <bool learned, class G, class T, class O>
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
        backward_run<learned>(up + from, x + from, grad + from, std::min(BLOCK, l.inner - start), at(g, run % l.steps), &chains);
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
  const int64_t n = rows.length, chunks = (l.outer + CHAIN - 1) / CHAIN, vecs = (n + LANES - 1) / LANES, step = rows_at_once(rows);
  std::vector<float> sums(2 * chunks * n);
  parallel(chunks, 1, [&](int64_t b, int64_t e) {
    Buffer<Chains> chains(vecs);
    for (int64_t chunk = b; chunk < e; ++chunk) {
      std::fill_n(chains.data, vecs, Chains{});
      const int64_t end = std::min(l.outer, (chunk + 1) * CHAIN);
      for (int64_t r = chunk * CHAIN; r < end; r += step)
        for (int64_t k = 0; k < vecs; ++k) {
          const int64_t from = r * n + k * LANES;
          backward_run<learned>(up + from, x + from, grad + from, std::min(LANES, n - k * LANES), rows.at(g, k * LANES),
                                chains.data + k, std::min(step, end - r), n);
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
    forward<false>(static_cast<const T*>(x), static_cast<T*>(y), l, g);
  });
}

void scale_shift(Type type, const void* x, void* y, const Layout& l, const float* alpha, const float* beta) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    forward<true>(static_cast<const T*>(x), static_cast<T*>(y), l, {alpha, beta, 0.0f, 0.0f, false});
  });
}

void quantize_backward(Type grad_type, const void* grad, Type type, const void* x, Type out_type, void* grad_x,
                       const Layout& l, const Grid& g, double* grad_step, double* grad_offset) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    auto go = [&](const auto* up, auto* to) {
      (g.learned_offset ? backward<true, std::remove_cvref_t<decltype(*up)>, T, std::remove_cvref_t<decltype(*to)>>
                        : backward<false, std::remove_cvref_t<decltype(*up)>, T, std::remove_cvref_t<decltype(*to)>>)(
          up, static_cast<const T*>(x), to, l, g, grad_step, grad_offset);
    };
    if (grad_type == type) go(static_cast<const T*>(grad), static_cast<T*>(grad_x));  // else float32, of the layers' products
    else if (out_type == Type::f32) go(static_cast<const float*>(grad), static_cast<float*>(grad_x));
    else go(static_cast<const float*>(grad), static_cast<T*>(grad_x));
  });
}

}  // namespace lsquant
