#include "product.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace em_kernels::cpu {
namespace {

using at::Tensor;

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;

// Whether torch's block product takes T to float32 here (it needs oneDNN, which the user may switch
// off and on, and AVX-512 for bfloat16, AVX-512 FP16 for float16).
template <class T>
bool has_brgemm() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool works = [] {
    const T a[2] = {1, 2}, b[2] = {3, 4};
    float c[1] = {0};
    try {
      brgemm(1, 1, 2, 2, 1, 1, false, a, b, c);
      brgemm_release();
    } catch (const c10::Error&) {
      return false;
    }
    return c[0] == 11;
  }();
  return works;
}

constexpr int64_t kProductRows = 64, kProductColumns = 128;

// x (rows, width) in the layout the block product reads its second operand in: panels of
// kProductColumns columns, pairs of rows interleaved, an odd last row paired with zeros.
Tensor pack_pairs(const Tensor& x) {
  const int64_t rows = x.size(0), width = x.size(1), even = (rows + 1) / 2 * 2;
  Tensor packed = at::zeros({even * width}, x.options());
  const auto* from = x.const_data_ptr<at::BFloat16>();
  auto* to = packed.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, at::divup(width, kProductColumns), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t first = begin * kProductColumns;
      const int64_t columns = std::min(kProductColumns, width - first);
      for (int64_t r = 0; r < rows; ++r) {
        const auto* row = from + r * x.stride(0) + first;
        auto* pairs = to + first * even + r / 2 * columns * 2 + r % 2;
        for (int64_t c = 0; c < columns; ++c) pairs[c * 2] = row[c];
      }
    }
  });
  return packed;
}

// total[v, :] = (total[v, :] if add) + sum_r g[r, v] x[r, :] for v in [first, last), through a
// transposed copy of g.
void add_product_rows(
    const Tensor& total, const Tensor& g, const at::BFloat16* packed, bool add, int64_t first,
    int64_t last) {
  const int64_t rows = g.size(0), width = total.size(1), even = (rows + 1) / 2 * 2;
  const auto* from = g.const_data_ptr<at::BFloat16>();
  float* to = total.mutable_data_ptr<float>();
  std::vector<at::BFloat16> transposed(kProductRows * even);
  for (; first < last; first += kProductRows) {
    const int64_t count = std::min(kProductRows, last - first);
    for (int64_t r0 = 0; r0 < rows; r0 += 32)
      for (int64_t v = 0; v < count; ++v)
        for (int64_t r = r0; r < std::min(rows, r0 + 32); ++r)
          transposed[v * even + r] = from[r * g.stride(0) + first + v];
    for (int64_t c = 0; c < width; c += kProductColumns) {
      const int64_t columns = std::min(kProductColumns, width - c);
      brgemm(
          count, columns, even, even, columns, total.stride(0), add, transposed.data(),
          packed + c * even, to + first * total.stride(0) + c);
    }
  }
  brgemm_release();
}

// The transpose of w (columns, width) in that layout, all of it one panel; width is even.
template <class T>
void pack_transposed(const T* w, int64_t stride, int64_t columns, int64_t width, T* packed) {
  constexpr int64_t line = 32;  // of w, that are read together
  for (int64_t begin = 0; begin < width; begin += line)
    for (int64_t d = begin; d < std::min(begin + line, width); d += 2)
      for (int64_t v = 0; v < columns; ++v)
        std::memcpy(packed + (d / 2 * columns + v) * 2, w + v * stride + d, 2 * sizeof(T));
}

// out[:, v] = x w[v]^T for v in [first, last).
template <class T>
void multiply_columns(
    const Tensor& out, const Tensor& x, const Tensor& w, int64_t first, int64_t last) {
  const int64_t rows = x.size(0), width = x.size(1);
  const T *own = x.const_data_ptr<T>(), *weight = w.const_data_ptr<T>();
  float* to = out.mutable_data_ptr<float>();
  std::vector<T> packed(kProductColumns * width);
  for (; first < last; first += kProductColumns) {
    const int64_t columns = std::min(kProductColumns, last - first);
    pack_transposed(weight + first * w.stride(0), w.stride(0), columns, width, packed.data());
    for (int64_t r = 0; r < rows; r += kProductRows) {
      const int64_t count = std::min(kProductRows, rows - r);
      brgemm(
          count, columns, width, x.stride(0), columns, out.stride(0), false, own + r * x.stride(0),
          packed.data(), to + r * out.stride(0) + first);
    }
  }
  brgemm_release();
}

template <class T>
bool multiply_wide(const Tensor& out, const Tensor& x, const Tensor& w) {
  if (!has_brgemm<T>()) return false;
  const int64_t vocab = w.size(0), tiles = at::divup(vocab, kProductColumns);
  at::parallel_for(0, tiles, at::divup(tiles, at::get_num_threads()), [&](int64_t a, int64_t b) {
    multiply_columns<T>(
        out, x, w, a * kProductColumns, std::min(b * kProductColumns, vocab));
  });
  return true;
}
#endif

}  // namespace

bool add_product(const Tensor& total, const Tensor& g, const Tensor& x, bool add) {
#if !defined(CPUBLAS_BRGEMM_BF16BF16F32)
  return false;
#else
  const bool bf16 = g.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16;
  if (!bf16 || total.scalar_type() != at::kFloat || !has_brgemm<at::BFloat16>()) return false;
  TORCH_CHECK_VALUE(
      g.dim() == 2 && x.dim() == 2 && g.size(0) == x.size(0) && total.dim() == 2 &&
          total.size(0) == g.size(1) && total.size(1) == x.size(1),
      "add_product: total ", total.sizes(), ", g ", g.sizes(), ", x ", x.sizes(), " do not fit");
  if (g.stride(1) != 1 || x.stride(1) != 1 || total.stride(1) != 1) return false;
  const Tensor packed = pack_pairs(x);
  const int64_t vocab = g.size(1);
  at::parallel_for(0, at::divup(vocab, kProductRows), 8, [&](int64_t begin, int64_t end) {
    add_product_rows(
        total, g, packed.const_data_ptr<at::BFloat16>(), add, begin * kProductRows,
        std::min(end * kProductRows, vocab));
  });
  return true;
#endif
}

bool product(const Tensor& out, const Tensor& x, const Tensor& w) {
  if (out.scalar_type() != at::kFloat || x.scalar_type() != w.scalar_type()) return false;
  TORCH_CHECK_VALUE(
      x.dim() == 2 && w.dim() == 2 && out.dim() == 2 && x.size(1) == w.size(1) &&
          out.size(0) == x.size(0) && out.size(1) == w.size(0),
      "product: out ", out.sizes(), ", x ", x.sizes(), ", w ", w.sizes(), " do not fit");
  const bool lies = x.stride(1) == 1 && w.stride(1) == 1 && out.stride(1) == 1;
  if (!lies || x.size(1) % 2 || out.numel() == 0 || x.size(1) == 0) return false;
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (x.scalar_type() == at::kBFloat16) return multiply_wide<at::BFloat16>(out, x, w);
#endif
#if defined(CPUBLAS_BRGEMM_F16F16F32)
  if (x.scalar_type() == at::kHalf) return multiply_wide<at::Half>(out, x, w);
#endif
  return false;
}

}  // namespace em_kernels::cpu
