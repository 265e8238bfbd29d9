// e^d with a power of 2 from a register. Included inside the namespace of a level.

// As vexp of math.h, but in parts of an octave: e^d = 2^(k / parts) e^f, k = round(d parts log2 e),
// |f| <= ln 2 / (2 parts). ln 2 is taken off in one step: where e < 1e-9 a second gains nothing.
// `part_power` has 2^(k / parts) from the bits of k; the polynomial is 1 + f + square f^2 + cube f^3.
template <class V>
EM_INLINE V vexp_in_parts(V d, float square, float cube) {
  const float parts = V::exp_parts;
  const V magic = V::set(12582912.0f + 127 * parts);
  const V k = fma(d, V::set(1.44269504f * parts), magic);
  const V f = fma(k - magic, V::set(-0.693147182f / parts), d);
  const V scale = part_power(k);
  V p = fma(V::set(cube), f, V::set(square));
  p = fma(p, f, V::set(1.0f));
  return fma(scale * f, p, scale);
}
