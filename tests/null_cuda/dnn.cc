// dnn.cc: cuDNN of the null CUDA: every function that torch takes from it succeeds, and those that stand for kernels
// leave a line in the log. Descriptors remember what torch asks them for again: a tensor's dimensions and the layout of
// a recurrent layer's weights, which is a layout of this file's own. Convolutions go through the interface of cuDNN 7
// (TORCH_CUDNN_V8_API_DISABLED, set by tests/common/null_cuda.py); the graph interface has no engine to offer, so what
// torch builds with it alone, attention, is not there. CUDNN_NAMES, made when this is built, is a file with one
// CALL(name) for each function that is not written out here, CUDNN_VERSION the version that torch was built with.
#include <cstring>
#include <string>
#include <vector>

#include "null_cuda.h"

namespace {

constexpr int kSuccess = 0, kNotSupported = 3000, kExecutionFailed = 5000;

struct Descriptor {
  int type = 0;
  std::vector<int> sizes, strides;
  // of a recurrent layer
  int mode = 0, bidirectional = 0, biases = 0, input = 0, hidden = 0, projection = 0, layers = 0;
};

size_t bytes_of(int type) {
  const size_t of[] = {4, 8, 2, 1, 4, 4, 1, 4, 32, 2, 8};  // float, double, half, int8, int32, ..., bfloat16, int64
  return type >= 0 && type < 11 ? of[type] : 4;
}

// How the recurrent layer of the next call is to be computed.
thread_local std::string recurrent_how;

int call(const char* name) {
  if (null_cuda::standing_error()) return kExecutionFailed;
  const bool kernel = strstr(name, "Forward") || strstr(name, "Backward") || strstr(name, "CTCLoss_v8") ||
                      !strcmp(name, "cudnnCTCLoss");
  if (kernel && !strstr(name, "cudnnBackend") && null_cuda::recording())
    null_cuda::record(name + (strstr(name, "cudnnRNN") ? recurrent_how : ""), nullptr);
  return kSuccess;
}

int create(void** out) {
  *out = new Descriptor;
  return kSuccess;
}
int destroy(void* descriptor) {
  delete static_cast<Descriptor*>(descriptor);
  return kSuccess;
}
int size(size_t* out, size_t bytes) {
  *out = bytes;
  return kSuccess;
}

// One weight of a recurrent layer: where it lies, in elements, and its sizes.
struct Part {
  size_t offset = 0;
  int rows = 0, columns = 0;
};
// Matrices of all layers, then biases; in a layer those of the input, those of the hidden state, the projection.
Part part_of(const Descriptor& d, int layer, int linear, bool bias, size_t* total = nullptr) {
  const int gates = d.mode == 2 ? 4 : d.mode == 3 ? 3 : 1;
  const int directions = d.bidirectional ? 2 : 1;
  const int state = d.projection ? d.projection : d.hidden;
  Part found;
  size_t offset = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int l = 0; l < d.layers * directions; ++l) {
      const int input = l < directions ? d.input : state * directions;
      for (int i = 0; i < 2 * gates + (d.projection ? 1 : 0); ++i) {
        Part part{offset, i == 2 * gates ? d.projection : d.hidden,
                  i == 2 * gates ? d.hidden
                  : i < gates    ? input
                                 : state};
        if (pass == 1) part.columns = 1;
        if (pass == 1 && i == 2 * gates) continue;
        if (pass == int(bias) && l == layer && i == linear) found = part;
        offset += size_t(part.rows) * part.columns;
      }
    }
    if (!d.biases) break;
  }
  if (total) *total = offset;
  return found;
}

}  // namespace

#define CALL(name) \
  NULL_CUDA_API int name() { return call(#name); }
#include CUDNN_NAMES

#define DESCRIPTOR(name)                                                              \
  NULL_CUDA_API int cudnnCreate##name##Descriptor(void** out) { return create(out); } \
  NULL_CUDA_API int cudnnDestroy##name##Descriptor(void* d) { return destroy(d); }
DESCRIPTOR(Tensor)
DESCRIPTOR(Filter)
DESCRIPTOR(Convolution)
DESCRIPTOR(Activation)
DESCRIPTOR(Dropout)
DESCRIPTOR(RNN)
DESCRIPTOR(RNNData)
DESCRIPTOR(SpatialTransformer)
DESCRIPTOR(CTCLoss)
NULL_CUDA_API int cudnnCreatePoolingDescriptor(void** out) { return create(out); }

NULL_CUDA_API int cudnnCreate(void** handle) { return null_cuda::standing_error() ? kExecutionFailed : create(handle); }
NULL_CUDA_API size_t cudnnGetVersion() { return CUDNN_VERSION; }
NULL_CUDA_API size_t cudnnGetCudartVersion() { return 13000; }
NULL_CUDA_API const char* cudnnGetErrorString(int status) {
  return status == kNotSupported ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_EXECUTION_FAILED";
}
NULL_CUDA_API void cudnnGetLastErrorString(char* text, size_t room) {
  if (room) *text = 0;
}
static thread_local void* the_stream = nullptr;
NULL_CUDA_API int cudnnSetStream(void*, void* stream) {
  if (stream != the_stream && null_cuda::recording())
    null_cuda::record("cudnn stream " + std::to_string(uintptr_t(stream)), nullptr);
  the_stream = stream;
  return kSuccess;
}
NULL_CUDA_API int cudnnGetStream(void*, void** stream) {
  *stream = the_stream;
  return kSuccess;
}
NULL_CUDA_API int cudnnBackendCreateDescriptor(int, void**) { return kNotSupported; }

NULL_CUDA_API int cudnnSetTensorNdDescriptor(Descriptor* d, int type, int n, const int* sizes, const int* strides) {
  d->type = type;
  d->sizes.assign(sizes, sizes + n);
  d->strides.assign(strides, strides + n);
  return kSuccess;
}
NULL_CUDA_API int cudnnGetTensorNdDescriptor(const Descriptor* d, int room, int* type, int* n, int* sizes,
                                             int* strides) {
  *type = d->type;
  *n = int(d->sizes.size());
  for (int i = 0; i < *n && i < room; ++i) sizes[i] = d->sizes[i], strides[i] = d->strides[i];
  return kSuccess;
}
NULL_CUDA_API int cudnnSetFilterNdDescriptor(Descriptor* d, int type, int, int n, const int* sizes) {
  d->type = type;
  d->sizes.assign(sizes, sizes + n);
  return kSuccess;
}
NULL_CUDA_API int cudnnGetFilterNdDescriptor(const Descriptor* d, int room, int* type, int* format, int* n,
                                             int* sizes) {
  *type = d->type;
  *format = 0;
  *n = int(d->sizes.size());
  for (int i = 0; i < *n && i < room; ++i) sizes[i] = d->sizes[i];
  return kSuccess;
}

// ---- convolutions: one algorithm, without a workspace

struct Performance {  // cudnnConvolution*AlgoPerf_t
  int algorithm, status;
  float time;
  size_t memory;
  int determinism, math, reserved[3];
};
static int found(int* n, Performance* performance) {
  *n = 1;
  *performance = {0, kSuccess, 1.f, 0, 1, 0, {}};
  return kSuccess;
}
#define CONVOLUTION(name)                                                                                           \
  NULL_CUDA_API int cudnnGetConvolution##name##Algorithm_v7(void*, void*, void*, void*, void*, int, int* n,         \
                                                            Performance* p) {                                       \
    return found(n, p);                                                                                             \
  }                                                                                                                 \
  NULL_CUDA_API int cudnnFindConvolution##name##AlgorithmEx(void*, void*, void*, void*, void*, void*, void*, void*, \
                                                            int, int* n, Performance* p, void*, size_t) {           \
    return found(n, p);                                                                                             \
  }                                                                                                                 \
  NULL_CUDA_API int cudnnGetConvolution##name##WorkspaceSize(void*, void*, void*, void*, void*, int, size_t* out) { \
    return size(out, 0);                                                                                            \
  }
CONVOLUTION(Forward)
CONVOLUTION(BackwardData)
CONVOLUTION(BackwardFilter)

// ---- sizes of workspaces: small ones, of their own each, so that a wrong one shows

NULL_CUDA_API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*,
                                                                           void*, size_t* out) {
  return size(out, 512);
}
NULL_CUDA_API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                                    void*, void*, size_t* out) {
  return size(out, 1024);
}
NULL_CUDA_API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* out) {
  return size(out, 1536);
}
NULL_CUDA_API int cudnnGetCTCLossWorkspaceSize(void*, void*, void*, void*, void*, void*, int, void*, size_t* out) {
  return size(out, 2048);
}
NULL_CUDA_API int cudnnGetCTCLossWorkspaceSize_v8(void*, int, void*, void*, void*, size_t* out) {
  return size(out, 2560);
}
// Fills a state from the seed, where there is one.
NULL_CUDA_API int cudnnSetDropoutDescriptor(void*, void*, float, void* state, size_t, unsigned long long) {
  return state ? call("cudnnSetDropoutDescriptorForward") : kSuccess;
}
NULL_CUDA_API int cudnnDropoutGetStatesSize(void*, size_t* out) { return size(out, 4096); }
NULL_CUDA_API int cudnnGetRNNTempSpaceSizes(void*, void*, int, void*, size_t* work, size_t* reserve) {
  if (reserve) *reserve = 3584;
  if (work) *work = 3072;
  return kSuccess;
}

// ---- recurrent layers

NULL_CUDA_API int cudnnSetRNNDescriptor_v8(Descriptor* d, int algorithm, int mode, int bias, int direction, int,
                                           int type, int, int math, int input, int hidden, int projection, int layers,
                                           void*, unsigned) {
  *d = Descriptor{};
  d->type = type, d->mode = mode, d->biases = bias != 0, d->bidirectional = direction;
  d->input = input, d->hidden = hidden, d->projection = projection == hidden ? 0 : projection, d->layers = layers;
  recurrent_how = " algorithm " + std::to_string(algorithm) + " math " + std::to_string(math);
  return kSuccess;
}
NULL_CUDA_API int cudnnGetRNNWeightSpaceSize(void*, const Descriptor* d, size_t* out) {
  size_t total = 0;
  part_of(*d, -1, -1, false, &total);
  return size(out, total * bytes_of(d->type));
}
NULL_CUDA_API int cudnnGetRNNWeightParams(void*, const Descriptor* d, int layer, size_t, void* space, int linear,
                                          Descriptor* matrix, void** matrix_address, Descriptor* bias,
                                          void** bias_address) {
  const auto describe = [&](bool of_bias, Descriptor* to, void** address) {
    if (!to) return;  // torch asks for one at a time
    const Part part = part_of(*d, layer, linear, of_bias);
    *address = part.rows ? static_cast<char*>(space) + part.offset * bytes_of(d->type) : nullptr;
    to->type = d->type;
    to->sizes = {1, part.rows, part.columns};
    to->strides = {part.rows * part.columns, part.columns, 1};
  };
  describe(false, matrix, matrix_address);
  describe(true, bias, bias_address);
  return kSuccess;
}
