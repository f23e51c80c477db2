// The module r1kernels._C_cuda: tensors arrive as device addresses, the stream as an integer.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

void* at(Address address) { return reinterpret_cast<void*>(address); }
cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check_dtype(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("unknown dtype code " + std::to_string(code));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.def("refusal", &r1k::refusal, py::arg("device"),
        "Why this build cannot run on the device, or an empty string.");
  m.def("row_shared_bytes", &r1k::row_shared_bytes, py::arg("vocab"), py::arg("dtype"),
        py::arg("cluster"), "Shared memory of a block of row_forward.");

  m.def(
      "head_gemm",
      [](Address hidden, int64_t hidden_stride, Address weight, int64_t weight_stride,
         Address targets, Address anchor, Address per_tau, Address bias, Address alpha,
         Address beta, Address centre, Address out, int64_t columns, Address partial, int C, int V,
         int D, float scale, float softcap, int mode, bool entropy, int cluster, int group,
         int device, Address stream) {
        r1k::head_gemm({at(hidden), at(weight), hidden_stride, weight_stride, at(targets),
                        at(anchor), at(per_tau), at(bias), at(alpha), at(beta), at(centre), at(out),
                        at(partial), C, V, D, columns, scale, softcap, mode, entropy, cluster,
                        group},
                       device, stream_of(stream));
      },
      py::arg("hidden"), py::arg("hidden_stride"), py::arg("weight"), py::arg("weight_stride"),
      py::arg("targets"), py::arg("anchor"), py::arg("per_tau"), py::arg("bias"), py::arg("alpha"),
      py::arg("beta"), py::arg("centre"), py::arg("out"), py::arg("columns"), py::arg("partial"),
      py::arg("C"), py::arg("V"), py::arg("D"), py::arg("scale"), py::arg("softcap"),
      py::arg("mode"), py::arg("entropy"), py::arg("cluster"), py::arg("group"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "row_forward",
      [](Address logits, Address out, int dtype, int64_t rows, int64_t vocab, int64_t stride,
         int64_t out_stride, Address targets, Address per_tau, float scale, float softcap,
         Address dlogp, Address dentropy, Address dlse, Address logp, Address entropy, Address lse,
         int cluster, int device, Address stream) {
        check_dtype(dtype);
        r1k::row_forward({at(logits), at(out), dtype, rows, vocab, stride, out_stride, at(targets),
                          at(per_tau), scale, softcap, entropy != 0, at(dlogp), at(dentropy),
                          at(dlse), at(logp), at(entropy), at(lse)},
                         cluster, device, stream_of(stream));
      },
      py::arg("logits"), py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("vocab"),
      py::arg("stride"), py::arg("out_stride"), py::arg("targets"), py::arg("per_tau"),
      py::arg("scale"), py::arg("softcap"), py::arg("dlogp"), py::arg("dentropy"), py::arg("dlse"),
      py::arg("logp"), py::arg("entropy"), py::arg("lse"), py::arg("cluster"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "row_backward",
      [](Address logits, Address out, int dtype, int64_t rows, int64_t vocab, int64_t stride,
         int64_t out_stride, Address targets, Address per_tau, float scale, float softcap,
         Address anchor, Address alpha, Address beta, Address at_target, int device,
         Address stream) {
        check_dtype(dtype);
        r1k::RowProblem problem{at(logits), at(out), dtype, rows, vocab, stride, out_stride,
                                at(targets), at(per_tau), scale, softcap};
        problem.anchor = at(anchor);
        problem.alpha = at(alpha);
        problem.beta = at(beta);
        problem.at_target = at(at_target);
        r1k::row_backward(problem, device, stream_of(stream));
      },
      py::arg("logits"), py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("vocab"),
      py::arg("stride"), py::arg("out_stride"), py::arg("targets"), py::arg("per_tau"),
      py::arg("scale"), py::arg("softcap"), py::arg("anchor"), py::arg("alpha"), py::arg("beta"),
      py::arg("at_target"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}
