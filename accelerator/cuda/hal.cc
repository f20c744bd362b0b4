// hal.cc: NVIDIA GPUs through libcudart, opened at run time. All behaviour is in accelerator/cudart; here is what is
// NVIDIA's own: where the library is and how to see, without touching the driver, that a GPU may be there. (In a
// process with a CUDA build of torch, torch_fl uses torch's own CUDA runtime and allocator; this chip serves everything
// else, and its conformance run judges the suite.)
#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>

#include "../cudart/cudart.h"
#include "env.h"

namespace flagos {
namespace {

// cuInit would be a surer test, but a process that has called it can no longer fork children that use CUDA.
std::string absent() {
  if (!env_text("FLAGOS_CUDART").empty()) return "";
  if (flagos_env("CUDA_VISIBLE_DEVICES")) {
    std::string visible = env_text("CUDA_VISIBLE_DEVICES");
    if (visible.empty() || visible.rfind("-1", 0) == 0) return "CUDA_VISIBLE_DEVICES hides every GPU";
  }
  glob_t nodes = {};
  bool found = glob("/dev/nvidia[0-9]*", 0, nullptr, &nodes) == 0 || access("/dev/dxg", F_OK) == 0;
  globfree(&nodes);
  if (!found) return "no device node /dev/nvidia0 (or /dev/dxg): no NVIDIA GPU, or its driver is not loaded";
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver) return "a GPU's device node is there but libcuda.so.1, the driver's library, does not open";
  dlclose(driver);
  return "";
}

// The folder that holds site-packages/torch_fl/libflagos.so's neighbours: pip installs libcudart beside them.
std::string site_packages() {
  Dl_info info = {};
  if (!dladdr(reinterpret_cast<void*>(&site_packages), &info) || !info.dli_fname) return "";
  std::string path = info.dli_fname;
  for (int up = 0; up < 2 && !path.empty(); ++up) path = path.substr(0, path.find_last_of('/'));
  return path;
}

std::vector<CudartNames> names() {
  CudartNames cuda{"cuda", {}, {}};
  std::string given = env_text("FLAGOS_CUDART");
  if (!given.empty()) {
    cuda.candidates = {{given, false}};
    return {cuda};
  }
  const char* sonames[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"};
  for (const char* soname : sonames) cuda.candidates.push_back({soname, true});
  for (const char* soname : sonames) cuda.candidates.push_back({soname, false});
  cuda.candidates.push_back({"libcudart.so", false});
  std::string packages = site_packages();
  if (!packages.empty()) {
    cuda.candidates.push_back({packages + "/nvidia/cu13/lib/libcudart.so.13", false});
    cuda.candidates.push_back({packages + "/nvidia/cuda_runtime/lib/libcudart.so.12", false});
  }
  std::string home = env_text("CUDA_HOME");
  cuda.candidates.push_back({(home.empty() ? "/usr/local/cuda" : home) + "/lib64/libcudart.so", false});
  return {cuda};
}

const CudartChip kChip = {"cuda", "NVIDIA", "sm_%d%d", absent, names, "libcuda.so.1", "cuDevicePrimaryCtxGetState"};

Cudart& instance() {
  static Cudart* cudart = new Cudart(kChip);
  return *cudart;
}

}  // namespace
}  // namespace flagos

const flagos_hal* flagos_hal_get(uint32_t abi_major) {
  using namespace flagos;
  // A library that somebody names may be a stand-in: such a chip is never picked by probing.
  static const char* vendor = env_text("FLAGOS_CUDART").empty() ? kChip.vendor : "library of FLAGOS_CUDART (simulated)";
  static const flagos_hal table = CudartTable<instance>::make(kChip.name, vendor);
  return abi_major == FLAGOS_ABI_MAJOR ? &table : nullptr;
}
