// Four floats in the vector type that gcc and clang offer for every processor; the interface is
// that of Lanes. Included inside a namespace.

struct F32 {
  using T = float;
  static constexpr int width = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  struct Mask {
    Ints v;
  };
  Floats v;

  static EM_INLINE F32 set(float x) { return {x - Floats{}}; }
  static EM_INLINE F32 load(const float* p) {
    F32 out;
    std::memcpy(&out.v, p, sizeof(out.v));
    return out;
  }
  static EM_INLINE F32 load(const bf16* p) {
    Halves half;
    std::memcpy(&half, p, sizeof(half));
    return {(Floats)(__builtin_convertvector(half, Words) << 16)};
  }
  static EM_INLINE F32 load(const f16* p) {
    float lane[width];
    for (int i = 0; i < width; ++i) lane[i] = to_float(p[i]);
    return load(lane);
  }
  EM_INLINE void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  EM_INLINE void store(bf16* p) const {
    const Words bits = (Words)v, nan = (Words)(v != v);
    const Words up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves half = __builtin_convertvector((up & ~nan) | (nan & 0x7fc0), Halves);
    std::memcpy(p, &half, sizeof(half));
  }
  EM_INLINE void store(f16* p) const {
    for (int i = 0; i < width; ++i) from_float(v[i], p + i);
  }

  friend EM_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
  friend EM_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
  friend EM_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
  friend EM_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
  friend EM_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
  friend EM_INLINE Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
  friend EM_INLINE Mask operator==(F32 a, F32 b) { return {a.v == b.v}; }
  friend EM_INLINE F32 select(Mask mask, F32 yes, F32 no) {
    return {(Floats)((mask.v & (Ints)yes.v) | (~mask.v & (Ints)no.v))};
  }
  friend EM_INLINE F32 max_or_b(F32 a, F32 b) { return select(b < a, a, b); }
  friend EM_INLINE F32 abs(F32 a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }
  static EM_INLINE bool any(Mask mask) {
    int32_t all = 0;
    for (int i = 0; i < width; ++i) all |= mask.v[i];
    return all != 0;
  }
  // d - n ln 2 without loss, ln 2 cut in two (Cody and Waite).
  friend EM_INLINE F32 minus_n_ln2(F32 d, F32 n) {
    return d - n * set(0.693359375f) + n * set(2.12194440e-4f);
  }
  friend EM_INLINE F32 exponent_of(F32 x) {
    return {__builtin_convertvector((Ints)x.v >> 23, Floats) - 127};
  }
  friend EM_INLINE F32 shift_to_exponent(F32 k) { return {(Floats)((Ints)k.v << 23)}; }
};
