// Shared by the arithmetic files: types, torch's thread pool, conversions.  No torch headers are needed for arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace lsquant {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// bfloat16 and float16 to float32 exactly, and back rounded half to even; branchless, so that loops vectorise
static inline float load(float v) { return v; }
static inline float load(bf16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline float load(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &rest, 4);
  magnitude *= 0x1p112f;  // the exponent's bias, 127 - 15; also makes denormals right
  uint32_t u;
  std::memcpy(&u, &magnitude, 4);
  u = (v.bits & 0x7c00) == 0x7c00 ? (rest | 0x7f800000) : u;
  u |= sign;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline void store(float* to, float v) { *to = v; }
static inline void store(bf16* to, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to->bits = uint16_t(v != v ? 0x7fc0 : rounded);
}
static inline void store(f16* to, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  // normal: rebias and round; below 2^-14: let a float addition round at the denormals' last bit
  const uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  float magnitude;
  std::memcpy(&magnitude, &a, 4);
  const float shifted = magnitude + 0.5f;
  uint32_t s;
  std::memcpy(&s, &shifted, 4);
  uint32_t h = a < 0x38800000 ? s - 0x3f000000 : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;
  h = a > 0x7f800000 ? 0x7e00 : h;
  to->bits = uint16_t(h | sign);
}

// round half to even; -fno-math-errno makes it one instruction
static inline float rounded(float v) { return __builtin_rintf(v); }

// ---- torch's own threads ----

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* ctx);

template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  const auto share = [](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); };
  if (torch_parallel_for(0, count, grain, share, const_cast<void*>(static_cast<const void*>(&f))))
    throw std::runtime_error("lsquant: a thread of the C++ engine failed, probably for lack of memory");
}

// memory for one call, aligned for vectors
template <class T>
struct Buffer {
  std::unique_ptr<char[]> memory;
  T* data;
  explicit Buffer(int64_t count) : memory(new char[count * sizeof(T) + 64]) {
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
  }
};

// ---- quantize.cpp ----

// elements in storage order: outer x steps x inner, the step of an element is its middle index
struct Layout { int64_t outer, steps, inner; };

struct Grid {  // one quantizer; z is added to round(v / s)
  const float* step;
  const float* zero;  // one per step
  float q_min, q_max;
  bool learned_offset;
};

void quantize(Type type, const void* x, void* y, const Layout&, const Grid&);
void scale_shift(Type type, const void* x, void* y, const Layout&, const float* alpha, const float* beta);
void quantize_backward(Type grad_type, const void* grad, Type type, const void* x, Type out_type, void* grad_x,
                       const Layout&, const Grid&, double* grad_step, double* grad_offset);

}  // namespace lsquant
