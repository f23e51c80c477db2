// The module r1kernels._C: tensors arrive as addresses, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

std::vector<const r1k::Kernels*> supported() {
  std::vector<const r1k::Kernels*> found = {&r1k::kGeneric};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found.push_back(&r1k::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(&r1k::kAvx512);
  }
#endif
  return found;
}

const r1k::Kernels* active = supported().back();

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const auto* k : supported()) names.emplace_back(k->isa);
  return names;
}

void use_isa(const std::string& name) {
  for (const auto* k : supported()) {
    if (name == k->isa) {
      active = k;
      return;
    }
  }
  throw std::invalid_argument("this machine does not run '" + name + "'");
}

r1k::Dtype dtype_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<r1k::Dtype>(code);
}

r1k::Activation activation_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("unknown activation code " + std::to_string(code));
  return static_cast<r1k::Activation>(code);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isas", &isas, "Instruction sets this machine runs, slowest first.");
  m.def("isa", [] { return std::string(active->isa); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, py::arg("name"),
        "Selects the instruction set for the whole process (tests compare them).");

  m.def(
      "exp_tile",
      [](Address tile, int64_t rows, int64_t cols, int64_t ld, int64_t first_column, Address bias,
         Address targets, float logit_scale, float softcap, Address temperature, int store,
         bool entropy, Address anchor, Address sum, Address weighted, int threads) {
        if (store < 0 || store > 2)
          throw std::invalid_argument("unknown store code " + std::to_string(store));
        active->exp_tile({at<float>(tile),
                          rows,
                          cols,
                          ld,
                          first_column,
                          at<const float>(bias),
                          at<const int64_t>(targets),
                          {logit_scale, softcap, at<const float>(temperature)},
                          static_cast<r1k::Store>(store),
                          entropy,
                          at<float>(anchor),
                          at<double>(sum),
                          at<double>(weighted)},
                         threads);
      },
      py::arg("tile"), py::arg("rows"), py::arg("cols"), py::arg("ld"), py::arg("first_column"),
      py::arg("bias"), py::arg("targets"), py::arg("logit_scale"), py::arg("softcap"),
      py::arg("temperature"), py::arg("store"), py::arg("entropy"), py::arg("anchor"),
      py::arg("sum"), py::arg("weighted"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "grad_tile",
      [](Address tile, int64_t rows, int64_t cols, int64_t ld, int64_t first_column, Address bias,
         Address targets, float logit_scale, float softcap, Address temperature, bool transformed,
         Address anchor, Address shift, Address logp_grad, Address ent_grad, Address centre,
         Address target_grad, int threads) {
        active->grad_tile({at<float>(tile),
                           rows,
                           cols,
                           ld,
                           first_column,
                           at<const float>(bias),
                           at<const int64_t>(targets),
                           {logit_scale, softcap, at<const float>(temperature)},
                           transformed,
                           at<const float>(anchor),
                           at<const float>(shift),
                           at<const float>(logp_grad),
                           at<const float>(ent_grad),
                           at<const float>(centre),
                           at<const float>(target_grad)},
                          threads);
      },
      py::arg("tile"), py::arg("rows"), py::arg("cols"), py::arg("ld"), py::arg("first_column"),
      py::arg("bias"), py::arg("targets"), py::arg("logit_scale"), py::arg("softcap"),
      py::arg("temperature"), py::arg("transformed"), py::arg("anchor"), py::arg("shift"),
      py::arg("logp_grad"), py::arg("ent_grad"), py::arg("centre"), py::arg("target_grad"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "rescale_tile",
      [](Address tile, int64_t rows, int64_t cols, int64_t ld, Address factor, int threads) {
        active->rescale_tile(at<float>(tile), rows, cols, ld, at<const float>(factor), threads);
      },
      py::arg("tile"), py::arg("rows"), py::arg("cols"), py::arg("ld"), py::arg("factor"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "token_forward",
      [](Address logits, int dtype, int64_t rows, int64_t vocab, int64_t ld, Address targets,
         float logit_scale, float softcap, Address temperature, bool entropy, Address logp,
         Address entropy_out, Address lse, int threads) {
        active->token_forward({at<const void>(logits),
                               dtype_of(dtype),
                               rows,
                               vocab,
                               ld,
                               at<const int64_t>(targets),
                               {logit_scale, softcap, at<const float>(temperature)},
                               entropy,
                               at<double>(logp),
                               at<double>(entropy_out),
                               at<double>(lse)},
                              threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("vocab"), py::arg("ld"),
      py::arg("targets"), py::arg("logit_scale"), py::arg("softcap"), py::arg("temperature"),
      py::arg("entropy"), py::arg("logp"), py::arg("entropy_out"), py::arg("lse"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "token_backward",
      [](Address logits, Address grad, int dtype, int64_t rows, int64_t vocab, int64_t ld,
         int64_t grad_ld, Address targets, float logit_scale, float softcap, Address temperature,
         Address anchor, Address shift, Address logp_grad, Address ent_grad, Address centre,
         Address target_grad, int threads) {
        active->token_backward({at<const void>(logits),
                                at<void>(grad),
                                dtype_of(dtype),
                                rows,
                                vocab,
                                ld,
                                grad_ld,
                                at<const int64_t>(targets),
                                {logit_scale, softcap, at<const float>(temperature)},
                                at<const float>(anchor),
                                at<const float>(shift),
                                at<const float>(logp_grad),
                                at<const float>(ent_grad),
                                at<const float>(centre),
                                at<const float>(target_grad)},
                               threads);
      },
      py::arg("logits"), py::arg("grad"), py::arg("dtype"), py::arg("rows"), py::arg("vocab"),
      py::arg("ld"), py::arg("grad_ld"), py::arg("targets"), py::arg("logit_scale"),
      py::arg("softcap"), py::arg("temperature"), py::arg("anchor"), py::arg("shift"),
      py::arg("logp_grad"), py::arg("ent_grad"), py::arg("centre"), py::arg("target_grad"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "kept_forward",
      [](Address hidden, Address weight, int dtype, int64_t rows, int64_t width, int64_t hidden_ld,
         int64_t weight_ld, Address ids, Address offsets, Address targets, Address bias,
         float logit_scale, float softcap, Address temperature, bool entropy, Address logits,
         Address logp, Address entropy_out, Address lse, int threads) {
        active->kept_forward({{at<const void>(hidden), at<const void>(weight), dtype_of(dtype),
                               rows, width, hidden_ld, weight_ld, at<const int32_t>(ids),
                               at<const int64_t>(offsets), at<const int64_t>(targets)},
                              at<const float>(bias),
                              {logit_scale, softcap, at<const float>(temperature)},
                              entropy,
                              at<float>(logits),
                              at<double>(logp),
                              at<double>(entropy_out),
                              at<double>(lse)},
                             threads);
      },
      py::arg("hidden"), py::arg("weight"), py::arg("dtype"), py::arg("rows"), py::arg("width"),
      py::arg("hidden_ld"), py::arg("weight_ld"), py::arg("ids"), py::arg("offsets"),
      py::arg("targets"), py::arg("bias"), py::arg("logit_scale"), py::arg("softcap"),
      py::arg("temperature"), py::arg("entropy"), py::arg("logits"), py::arg("logp"),
      py::arg("entropy_out"), py::arg("lse"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "kept_backward",
      [](Address hidden, Address weight, int dtype, int64_t rows, int64_t width, int64_t hidden_ld,
         int64_t weight_ld, Address ids, Address offsets, Address targets, float logit_scale,
         float softcap, Address temperature, Address logits, Address anchor, Address shift,
         Address logp_grad, Address ent_grad, Address centre, Address target_grad, Address dlogits,
         Address dhidden, int threads) {
        active->kept_backward({{at<const void>(hidden), at<const void>(weight), dtype_of(dtype),
                                rows, width, hidden_ld, weight_ld, at<const int32_t>(ids),
                                at<const int64_t>(offsets), at<const int64_t>(targets)},
                               {logit_scale, softcap, at<const float>(temperature)},
                               at<const float>(logits),
                               at<const float>(anchor),
                               at<const float>(shift),
                               at<const float>(logp_grad),
                               at<const float>(ent_grad),
                               at<const float>(centre),
                               at<const float>(target_grad),
                               at<float>(dlogits),
                               at<void>(dhidden)},
                              threads);
      },
      py::arg("hidden"), py::arg("weight"), py::arg("dtype"), py::arg("rows"), py::arg("width"),
      py::arg("hidden_ld"), py::arg("weight_ld"), py::arg("ids"), py::arg("offsets"),
      py::arg("targets"), py::arg("logit_scale"), py::arg("softcap"), py::arg("temperature"),
      py::arg("logits"), py::arg("anchor"), py::arg("shift"), py::arg("logp_grad"),
      py::arg("ent_grad"), py::arg("centre"), py::arg("target_grad"), py::arg("dlogits"),
      py::arg("dhidden"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "kept_weight",
      [](Address hidden, int dtype, int64_t segments, int64_t width, int64_t hidden_ld,
         Address starts, Address order, Address rows, Address ids, Address dlogits, Address dweight,
         int weight_dtype, Address dbias, int threads) {
        active->kept_weight(
            {at<const void>(hidden), dtype_of(dtype), segments, width, hidden_ld,
             at<const int64_t>(starts), at<const int64_t>(order), at<const int64_t>(rows),
             at<const int32_t>(ids), at<const float>(dlogits), at<void>(dweight),
             dtype_of(weight_dtype), at<float>(dbias)},
            threads);
      },
      py::arg("hidden"), py::arg("dtype"), py::arg("segments"), py::arg("width"),
      py::arg("hidden_ld"), py::arg("starts"), py::arg("order"), py::arg("rows"), py::arg("ids"),
      py::arg("dlogits"), py::arg("dweight"), py::arg("weight_dtype"), py::arg("dbias"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "glu_forward",
      [](Address gate, Address up, int dtype, int64_t count, int activation, int threads) {
        active->glu_forward({nullptr, at<void>(gate), at<void>(up), dtype_of(dtype), count,
                             activation_of(activation)},
                            threads);
      },
      py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("count"), py::arg("activation"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "glu_backward",
      [](Address dh, Address gate, Address up, int dtype, int64_t count, int activation,
         int threads) {
        active->glu_backward({at<void>(dh), at<void>(gate), at<void>(up), dtype_of(dtype), count,
                              activation_of(activation)},
                             threads);
      },
      py::arg("dh"), py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("count"),
      py::arg("activation"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
