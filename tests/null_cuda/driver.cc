// driver.cc: the driver's functions of the null CUDA, for those who load libcuda.so.1 (Triton, torch's run-time
// compiler): modules and functions with the parameters that the cubin itself declares, and launches, whose parameters
// are logged byte by byte; an address inside a known allocation is written as "offset in it + its size", so that two
// runs compare.
#include <elf.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "null_cuda.h"

using namespace null_cuda;

namespace {

struct Parameter {
  size_t offset, size;
};
struct Function {
  std::string name;
  std::vector<Parameter> parameters;
};
struct Module {
  std::map<std::string, Function> functions;
};

// A kernel's parameters are entries of its section .nv.info.NAME: attribute 0x17 with twelve bytes, of which the second
// word holds ordinal and offset and the third, from bit 18 on, the size.
constexpr unsigned char kSizedValue = 4, kParameterInfo = 0x17;

Module* parse(const void* image) {
  auto* bytes = static_cast<const char*>(image);
  Module* module = new Module;
  auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes);
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return module;
  auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
  const char* names = bytes + sections[header->e_shstrndx].sh_offset;
  const std::string prefix = ".nv.info.";
  for (int i = 0; i < header->e_shnum; ++i) {
    std::string name = names + sections[i].sh_name;
    if (name.compare(0, prefix.size(), prefix)) continue;
    Function& function = module->functions[name.substr(prefix.size())];
    function.name = name.substr(prefix.size());
    const char *at = bytes + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      unsigned char format = at[0], attribute = at[1];
      uint16_t length;
      memcpy(&length, at + 2, 2);
      if (format == kSizedValue && attribute == kParameterInfo) {
        uint16_t place[2];
        uint32_t flags;
        memcpy(place, at + 8, 4);
        memcpy(&flags, at + 12, 4);
        if (function.parameters.size() <= place[0]) function.parameters.resize(place[0] + 1);
        function.parameters[place[0]] = {place[1], (flags >> 18) & 0x3fff};
      }
      at += 4 + (format == kSizedValue ? length : 0);
    }
  }
  return module;
}

// Eight bytes that may be an address; "" when they are none.
std::string address_text(const void* value) {
  void* pointer;
  memcpy(&pointer, value, sizeof pointer);
  size_t base = 0, bytes = 0;
  if (!locate(pointer, &base, &bytes)) return "";
  char text[64];
  if (showing_addresses()) {
    snprintf(text, sizeof text, "@%zx", reinterpret_cast<size_t>(pointer));
  } else {
    snprintf(text, sizeof text, "[%zu of %zu]", base, bytes);
  }
  return text;
}

// Structures hold addresses too, at multiples of eight bytes.
std::string text_of(const void* value, size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(value);
  std::string out = " ";
  for (size_t word = 0; word < size; word += 8) {
    const std::string address = size - word >= 8 ? address_text(bytes + word) : "";
    out += address;
    for (size_t i = word; address.empty() && i < std::min(word + 8, size); ++i) {
      char text[4];
      snprintf(text, sizeof text, "%02x", bytes[i]);
      out += text;
    }
  }
  return out;
}

CUresult launch(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                unsigned shared, CUstream stream, void** parameters, const std::string& attributes) {
  if (cudaError_t error = enter("cuLaunchKernelEx")) return CUresult(error);  // whichever of the launch functions
  auto* function = reinterpret_cast<Function*>(f);
  count_launch();
  std::string line;
  if (recording()) {
    char text[160];
    snprintf(text, sizeof text, " <<<%u,%u,%u %u,%u,%u %u>>> device %d stream %p", gx, gy, gz, bx, by, bz, shared,
             current_device(), static_cast<void*>(stream));
    line = function->name + text + attributes + " (";
    for (size_t i = 0; parameters && i < function->parameters.size(); ++i)
      line += text_of(parameters[i], function->parameters[i].size);
    line += ")";
  }
  record(line, stream);
  return CUDA_SUCCESS;
}

thread_local std::vector<CUcontext> contexts;
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(uintptr_t(device) + 1); }

}  // namespace

#undef cuGetProcAddress

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* out) { return CUresult(cudaDriverGetVersion(out)); }
CUresult cuDeviceGet(CUdevice* out, int ordinal) {
  *out = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* out) {
  *out = device_count();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* out, CUdevice_attribute attribute, CUdevice device) {
  return CUresult(cudaDeviceGetAttribute(out, cudaDeviceAttr(attribute), device));
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
  *out = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* out) {
  *out = context_of(current_device());
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) set_current_device(int(uintptr_t(context)) - 1);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* out) {
  *out = current_device();
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* out, CUlimit) {
  *out = 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** out) {
  *out = cudaGetErrorString(cudaError_t(error));
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  int device = owner(reinterpret_cast<void*>(pointer));
  if (device == -2) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *static_cast<CUdeviceptr*>(out) = pointer;
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *static_cast<unsigned*>(out) = device >= 0 ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
    *static_cast<int*>(out) = device;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  *out = reinterpret_cast<CUmodule>(parse(image));
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(out, image);
}
CUresult cuModuleLoad(CUmodule*, const char*) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  auto& functions = reinterpret_cast<Module*>(module)->functions;
  auto found = functions.find(name);
  if (found == functions.end()) found = functions.emplace(name, Function{name, {}}).first;
  *out = reinterpret_cast<CUfunction>(&found->second);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t* offset, size_t* size) {
  auto* function = reinterpret_cast<Function*>(f);
  if (index >= function->parameters.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = function->parameters[index].offset;
  if (size) *size = function->parameters[index].size;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* out, CUfunction_attribute attribute, CUfunction) {
  *out = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, CUfunction, int, size_t) {
  *out = 8;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* out, CUfunction, const CUlaunchConfig*) {
  *out = 16;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void**) {
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, "");
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void**) {
  std::string attributes;
  for (unsigned i = 0; i < c->numAttrs; ++i) attributes += " attribute " + std::to_string(int(c->attrs[i].id));
  return launch(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
                c->hStream, parameters, attributes);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void** parameters) {
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, " cooperative");
}
// The map is 128 bytes; its first word is the address here, which is all that cuTensorMapReplaceAddress changes.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t*, const cuuint32_t* box, const cuuint32_t*,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address);
  uint64_t* words = reinterpret_cast<uint64_t*>(map);
  words[1] = type, words[2] = rank;
  for (cuuint32_t i = 0; i < rank && i < 5; ++i) words[3 + i] = dims[i], words[8 + i] = box[i];
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}
CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned, CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }

}  // extern "C"
