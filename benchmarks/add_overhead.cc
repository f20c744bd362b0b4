// add_overhead.cc: a 1-element addition on two devices, batch by batch in turn, called from C++ so that no interpreter
// time is in the figure. Compiled by add_overhead.py.
#include <ATen/ATen.h>
#include <torch/extension.h>

#include <chrono>
#include <string>
#include <vector>

// Nanoseconds per call: first, second, first, second, ...; `rounds` of each, `calls` in a batch.
std::vector<double> alternate(const std::string& first, const std::string& second, int rounds, int calls) {
  at::NoGradGuard no_grad;
  at::Tensor a[2], b[2];
  int k = 0;
  for (const auto& device : {first, second}) {
    const auto options = at::TensorOptions().device(c10::Device(device));
    a[k] = at::ones({1}, options);
    b[k++] = at::ones({1}, options);
  }
  std::vector<double> times;
  for (int round = 0; round < 2 * rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) at::add(a[round % 2], b[round % 2]);
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    times.push_back(time.count() / calls);
  }
  return times;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("alternate", &alternate); }
