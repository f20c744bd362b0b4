// cuda_plans.cc: how launch plans (csrc/aten/plan) start kernels on an NVIDIA GPU: through the driver, whose library is
// opened at run time, because a machine without a GPU does not have it.
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>

#include "csrc/aten/plan/backend.h"
#include "csrc/runtime/platform.h"

namespace flagos {
namespace {

// The driver's functions that are used here.
struct Driver {
  decltype(&::cuLaunchKernelEx) launch = nullptr;
  decltype(&::cuGetErrorString) error_string = nullptr;
  decltype(&::cuCtxGetCurrent) current_context = nullptr;
  decltype(&::cuCtxSetCurrent) set_context = nullptr;
  decltype(&::cuDevicePrimaryCtxRetain) retain_context = nullptr;
  decltype(&::cuFuncGetParamInfo) parameter = nullptr;
  decltype(&::cuFuncSetAttribute) set_attribute = nullptr;
  decltype(&::cuTensorMapReplaceAddress) replace_address = nullptr;

  bool open() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) return false;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    // cuFuncGetParamInfo came with CUDA 12.4, tensor maps with 12.0: without them there are no plans.
    return find(launch, "cuLaunchKernelEx") && find(error_string, "cuGetErrorString") &&
           find(current_context, "cuCtxGetCurrent") && find(set_context, "cuCtxSetCurrent") &&
           find(retain_context, "cuDevicePrimaryCtxRetain") && find(parameter, "cuFuncGetParamInfo") &&
           find(set_attribute, "cuFuncSetAttribute") && find(replace_address, "cuTensorMapReplaceAddress");
  }
  void check(CUresult status, const char* what) const {
    if (C10_LIKELY(status == CUDA_SUCCESS)) return;
    const char* text = nullptr;
    error_string(status, &text);
    TORCH_CHECK(false, "flagos: ", what, " of a launch plan failed: ", text ? text : "unknown error", " (", status,
                "); FLAGOS_PLAN=0 launches through Python");
  }
};

class CudaPlans final : public PlanBackend {
 public:
  explicit CudaPlans(const Driver& driver) : driver_(driver) {}

  bool parameters(void* function, std::vector<size_t>& sizes) const override {
    sizes.clear();
    size_t offset = 0, size = 0;
    while (driver_.parameter(static_cast<CUfunction>(function), sizes.size(), &offset, &size) == CUDA_SUCCESS) {
      sizes.push_back(size);
    }
    return !sizes.empty();
  }

  bool capturing(c10::Stream stream) const override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(native(stream), &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
  }

  void* enter(c10::Stream stream) const override {
    CUcontext context = nullptr;
    driver_.check(driver_.current_context(&context), "cuCtxGetCurrent");
    if (C10_UNLIKELY(context == nullptr)) {  // a thread that has not used CUDA yet
      driver_.check(driver_.retain_context(&context, stream.device_index()), "cuDevicePrimaryCtxRetain");
      driver_.check(driver_.set_context(context), "cuCtxSetCurrent");
    }
    return native(stream);
  }

  void launch(const LaunchConfig& config, void* stream, void** parameters) const override {
    CUlaunchAttribute attributes[4];
    CUlaunchConfig c{};
    c.gridDimX = config.grid[0] * config.ctas;
    c.gridDimY = config.grid[1];
    c.gridDimZ = config.grid[2];
    c.blockDimX = 32 * config.warps;
    c.blockDimY = c.blockDimZ = 1;
    c.sharedMemBytes = config.shared;
    c.hStream = static_cast<CUstream>(stream);
    c.attrs = attributes;
    const auto function = static_cast<CUfunction>(config.function);
    const auto attribute = [&](CUlaunchAttributeID id) -> CUlaunchAttributeValue& {
      auto& next = attributes[c.numAttrs++];
      next = CUlaunchAttribute{};
      next.id = id;
      return next.value;
    };
    if (config.pdl)
      attribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION).programmaticStreamSerializationAllowed = 1;
    if (config.cooperative) attribute(CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1;
    if (config.ctas != 1) {
      auto& cluster = attribute(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim;
      cluster.x = config.ctas;
      cluster.y = cluster.z = 1;
      attribute(CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE).clusterSchedulingPolicyPreference =
          CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
    }
    if (config.ctas == 16) {
      driver_.check(driver_.set_attribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
                    "cuFuncSetAttribute");
    }
    driver_.check(driver_.launch(&c, function, parameters, nullptr), "cuLaunchKernelEx");
  }

  void replace_address(void* tensor_map, void* address) const override {
    driver_.check(driver_.replace_address(static_cast<CUtensorMap*>(tensor_map), address), "cuTensorMapReplaceAddress");
  }

 private:
  static cudaStream_t native(c10::Stream stream) {
    const c10::Stream cuda(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, stream.device_index()), stream.id());
    return c10::cuda::CUDAStream(cuda).stream();
  }

  const Driver driver_;
};

// When this library is loaded, which is when the cuda chip was chosen.
const bool installed = [] {
  Driver driver;
  if (!driver.open()) return false;
  set_plan_backend(new CudaPlans(driver));
  return true;
}();

}  // namespace
}  // namespace flagos
