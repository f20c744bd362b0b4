// module.cc: torch_fl._C. Opens the chip once per process and binds the rest.
#include <dlfcn.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "csrc/python/bindings.h"
#include "csrc/runtime/platform.h"
#include "flagos.h"

namespace py = pybind11;

namespace flagos {

void register_operators();  // csrc/aten/register.h, whose templates this file does not need

namespace {

// The folder that holds libtorch_fl.so, '/' at the end.
std::string library_folder() {
  Dl_info info{};
  TORCH_CHECK(dladdr(reinterpret_cast<void*>(&has_platform), &info) != 0, "flagos: libtorch_fl.so has no path");
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

// CUDA's platform lives in a library of its own, because only a CUDA build of PyTorch can load it.
Platform* make_cuda_platform() {
  const std::string path = library_folder() + "libtorch_fl_cuda.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const std::string reason = dlerror();
    TORCH_CHECK(false, "flagos: the cuda chip was chosen, but ", reason,
                "; install a CUDA build of PyTorch and rebuild torch_fl, or set FLAGOS_ACCELERATOR=host");
  }
  auto* make = reinterpret_cast<MakePlatformFn>(dlsym(library, "flagos_make_cuda_platform"));
  TORCH_CHECK(make != nullptr, "flagos: ", path, " lacks flagos_make_cuda_platform; rebuild torch_fl");
  return make();
}

Platform* make_platform(const char* chip) {
  char name[64];
  flagos_status status = flagos_choose(chip, name, sizeof(name));
  TORCH_CHECK(status == FLAGOS_OK, "flagos: ", flagos_last_message());
  if (std::string(name) == "cuda") return make_cuda_platform();
  const flagos_hal* hal = nullptr;
  status = flagos_open(name, &hal);
  TORCH_CHECK(status == FLAGOS_OK, "flagos: ", flagos_last_message());
  return make_hal_platform(hal);
}

std::string init(const std::optional<std::string>& chip) {
  if (!has_platform()) {
    Platform* made = nullptr;
    {
      py::gil_scoped_release no_gil;
      made = make_platform(chip ? chip->c_str() : nullptr);
    }
    set_platform(made);
    register_operators();
  }
  TORCH_CHECK(!chip || *chip == platform().chip(), "flagos: the chip is already '", platform().chip(), "', not '",
              chip.value_or(""), "'; it is chosen once per process (FLAGOS_ACCELERATOR)");
  return platform().chip();
}

std::string chip_report(const std::optional<std::string>& chip) {
  py::gil_scoped_release no_gil;
  const char* name = chip ? chip->c_str() : nullptr;
  std::string text(flagos_chip_report(name, nullptr, 0) + 1, '\0');
  const size_t length = flagos_chip_report(name, text.data(), text.size());
  text.resize(std::min(length, text.size() - 1));
  return text;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("_init", &init, py::arg("chip") = py::none());
  m.def("_chip", []() -> std::optional<std::string> {
    if (!has_platform()) return std::nullopt;
    return platform().chip();
  });
  m.def("_chips", [] {
    std::vector<std::string> names;
    for (int32_t i = 0; i < flagos_chip_count(); i++) names.emplace_back(flagos_chip_name(i));
    return names;
  });
  m.def("_chip_report", &chip_report, py::arg("chip") = py::none());
  bind_device(m);
  bind_stream(m);
  bind_memory(m);
  bind_memory_history(m);
  bind_interop(m);
  bind_random(m);
  bind_routes(m);
  bind_python_kernels(m);
  bind_plans(m);
  bind_sim(m);
  bind_diagnostics(m);
}

}  // namespace flagos
