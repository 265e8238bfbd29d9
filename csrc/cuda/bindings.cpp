// The Python module of the CUDA kernels. Pointers and the stream travel as integers: no torch here,
// and no driver is needed to import it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if !defined(EM_MODULE_NAME)
#define EM_MODULE_NAME _cuda
#endif

namespace {

namespace py = pybind11;
using namespace em_kernels;
using namespace em_kernels::cuda;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// The order of em_kernels.backends.cuda.DTYPES.
DType dtype(int number) {
  if (number < 0 || number > int(DType::f64))
    throw std::invalid_argument("dtype must be in [0, 3], got " + std::to_string(number));
  return DType(number);
}

Problem make_problem(
    int number, uintptr_t logits, int64_t rows, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t vocab, int64_t valid_vocab, uintptr_t bias, uintptr_t target,
    uintptr_t mask, uintptr_t temperature_rows, double temperature, double softcap,
    double logit_scale) {
  return {
      dtype(number), pointer(logits), rows, inner, outer_stride, inner_stride, vocab, valid_vocab,
      pointer(bias), static_cast<const int64_t*>(pointer(target)),
      static_cast<const bool*>(pointer(mask)), pointer(temperature_rows), temperature, softcap,
      logit_scale};
}

// Addresses in the order of Output; 0 where not asked for.
Results make_results(const std::vector<uintptr_t>& columns) {
  Results results;
  if (columns.size() > kOutputs)
    throw std::invalid_argument(
        "columns must be at most " + std::to_string(int(kOutputs)) + ", got " +
        std::to_string(columns.size()));
  for (size_t i = 0; i < columns.size(); ++i) results.column[i] = pointer(columns[i]);
  return results;
}

Gradient make_gradient(
    uintptr_t max, uintptr_t log1p_r, uintptr_t mean_d, uintptr_t g_logprob, uintptr_t g_entropy,
    uintptr_t g_lse, uintptr_t out, int64_t outer_stride, int64_t inner_stride, int out_dtype) {
  return {pointer(max),       pointer(log1p_r), pointer(mean_d), pointer(g_logprob),
          pointer(g_entropy), pointer(g_lse),   pointer(out),    outer_stride,
          inner_stride,       dtype(out_dtype)};
}

}  // namespace

PYBIND11_MODULE(EM_MODULE_NAME, m) {
  m.doc() = "The CUDA kernels of em_kernels; em_kernels.backends.cuda is their interface.";
  py::enum_<Operation>(m, "Operation")
      .value("statistics", Operation::statistics)
      .value("gradient", Operation::gradient)
      .value("loss", Operation::loss);
  py::class_<Problem>(m, "Problem")
      .def(
          py::init(&make_problem), py::kw_only(), py::arg("dtype"), py::arg("logits"),
          py::arg("rows"), py::arg("inner"), py::arg("outer_stride"), py::arg("inner_stride"),
          py::arg("vocab"), py::arg("valid_vocab"), py::arg("bias") = 0, py::arg("target") = 0,
          py::arg("mask") = 0, py::arg("temperature_rows") = 0, py::arg("temperature") = 1.0,
          py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0);
  py::class_<Results>(m, "Results").def(py::init(&make_results), py::arg("columns"));
  py::class_<Gradient>(m, "Gradient")
      .def(py::init<>())
      .def(
          py::init(&make_gradient), py::kw_only(), py::arg("max") = 0, py::arg("log1p_r") = 0,
          py::arg("mean_d") = 0, py::arg("g_logprob") = 0, py::arg("g_entropy") = 0,
          py::arg("g_lse") = 0, py::arg("out"), py::arg("outer_stride"), py::arg("inner_stride"),
          py::arg("out_dtype"));
  py::class_<Device>(m, "Device")
      .def(
          py::init<int, int, int, int, int>(), py::kw_only(), py::arg("compute_capability"),
          py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"),
          py::arg("largest_cluster"), py::arg("multiprocessors"))
      .def_readonly("compute_capability", &Device::compute_capability)
      .def_readonly("shared_per_block", &Device::shared_per_block)
      .def_readonly("shared_per_multiprocessor", &Device::shared_per_multiprocessor)
      .def_readonly("largest_cluster", &Device::largest_cluster)
      .def_readonly("multiprocessors", &Device::multiprocessors);
  py::class_<Plan>(m, "Plan")
      .def_readonly("plain", &Plan::plain)
      .def_readonly("aligned_logits", &Plan::aligned_logits)
      .def_readonly("aligned_gradient", &Plan::aligned_gradient)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("row_blocks", &Plan::row_blocks)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("slice", &Plan::slice)
      .def_readonly("shared_bytes", &Plan::shared_bytes);
  m.def("device", &device, py::arg("index"));
  m.def("plan", &plan, "operation, problem, results, gradient, device -> Plan");
  m.def(
      "run",
      [](Operation operation, const Problem& problem, const Results& results,
         const Gradient& gradient, const Device& device, uintptr_t stream) {
        run(operation, problem, results, gradient, device, pointer(stream));
      },
      "operation, problem, results, gradient, device, stream",
      py::call_guard<py::gil_scoped_release>());
  m.def("runtime_version", &runtime_version);
  m.def("why_no_driver", &why_no_driver);
#if defined(EM_NVCC)  // what the build says of itself
  m.attr("nvcc") = EM_NVCC;
  m.attr("architectures") = EM_CUDA_ARCHITECTURES;
#endif
}
