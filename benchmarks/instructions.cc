// instructions.cc: calls operators while callgrind counts instructions, for instructions.py. From C++, so that no
// interpreter is in the figures. And marks for Python: what every thread did between two of them.
#include <ATen/ATen.h>
#include <torch/library.h>
#include <valgrind/callgrind.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using Call = std::function<void()>;

std::vector<std::pair<std::string, Call>> calls_on(const std::string& device) {
  const auto options = at::TensorOptions().device(c10::Device(device));
  const auto index = at::zeros({4}, options.dtype(at::kLong));
  at::Tensor x = at::ones({64, 64}, options), y = at::ones({64, 64}, options), out = at::ones({64, 64}, options);
  std::vector<at::Tensor> list;
  for (int i = 0; i < 5; ++i) list.push_back(at::ones({4, 4}, options));
  return {
      {"empty", [=] { at::empty({64, 64}, options); }},
      {"neg", [=] { at::neg(x); }},
      {"add", [=] { at::add(x, y); }},
      {"softmax", [=] { at::softmax(x, 1); }},
      {"index_select", [=] { at::index_select(x, 0, index); }},
      {"cat (list)", [=] { at::cat({x, y}); }},
      {"foreach_add", [=] { at::_foreach_add(list, 1.0); }},
      {"foreach_mul_", [=] { at::_foreach_mul_(list, 1.0); }},
      {"fill_", [=] { out.fill_(1.0); }},
      {"add_", [=] { out.add_(y); }},
      {"add out=", [=]() mutable { at::add_out(out, x, y); }},
      {"copy_", [=] { out.copy_(x); }},
      {"transpose", [=] { x.t(); }},
  };
}

void count_instructions(std::string device, int64_t calls) {
  at::NoGradGuard no_grad;
  for (auto& [name, call] : calls_on(device)) {
    const auto title = device + "/" + name;  // the macro reads it in a statement of its own
    for (int i = 0; i < 30; ++i) call();     // warm
    CALLGRIND_ZERO_STATS;
    CALLGRIND_TOGGLE_COLLECT;
    for (int64_t i = 0; i < calls; ++i) call();
    CALLGRIND_TOGGLE_COLLECT;
    CALLGRIND_DUMP_STATS_AT(title.c_str());
  }
}

void start_counting() {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void counted(std::string title) { CALLGRIND_DUMP_STATS_AT(title.c_str()); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(flagos_bench, m) {
  m.def("count_instructions(str device, int calls) -> ()", TORCH_FN(count_instructions));
  m.def("start_counting() -> ()", TORCH_FN(start_counting));
  m.def("counted(str title) -> ()", TORCH_FN(counted));
}
