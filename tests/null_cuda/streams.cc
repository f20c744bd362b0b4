// streams.cc: streams, events and graphs of the null CUDA. Work is done when the call returns, so what is left of them
// is which device they belong to, when events were recorded, and whether a stream captures: work on one that does is
// counted, not done, and waiting for it is refused as the driver refuses it.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <set>

#include "null_cuda.h"

using namespace null_cuda;

namespace {

std::mutex mutex;
std::set<Stream*> streams;
std::atomic<unsigned long long> captures{0};

struct Event {
  int device;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
};

struct Graph {
  size_t nodes;
};

}  // namespace

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
  ENTER(cudaStreamCreateWithPriority);
  Stream* stream = new Stream{current_device(), priority};
  std::lock_guard<std::mutex> lock(mutex);
  streams.insert(stream);
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!streams.erase(real(stream))) return fail(cudaErrorInvalidResourceHandle);
  delete real(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* out) {
  *out = real(stream) ? real(stream)->priority : 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  ENTER(cudaStreamQuery);
  return capturing(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER(cudaStreamSynchronize);
  return capturing(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
  if (recording()) {
    char text[64];
    snprintf(text, sizeof text, "wait on stream %p", static_cast<void*>(stream));
    record(text, nullptr);
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  ENTER(cudaEventCreateWithFlags);
  *out = reinterpret_cast<cudaEvent_t>(new Event{current_device()});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  ENTER(cudaEventRecord);
  Event* e = reinterpret_cast<Event*>(event);
  if (Stream* s = real(stream); s && s->device != e->device) return fail(cudaErrorInvalidResourceHandle);
  e->recorded = true;
  e->time = std::chrono::steady_clock::now();
  if (recording()) {
    char text[64];
    snprintf(text, sizeof text, "event on stream %p", static_cast<void*>(stream));
    record(text, nullptr);
  }
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  ENTER(cudaEventQuery);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ENTER(cudaEventSynchronize);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* out, cudaEvent_t start, cudaEvent_t end) {
  Event *a = reinterpret_cast<Event*>(start), *b = reinterpret_cast<Event*>(end);
  if (!a->recorded || !b->recorded) return fail(cudaErrorInvalidResourceHandle);
  *out = std::chrono::duration<float, std::milli>(b->time - a->time).count();
  return cudaSuccess;
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  ENTER(cudaStreamBeginCapture);
  Stream* s = real(stream);
  if (!s) return fail(cudaErrorStreamCaptureUnsupported);
  s->capture = cudaStreamCaptureStatusActive;
  s->id = ++captures;
  s->nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  Stream* s = real(stream);
  if (!s || !s->capture) return fail(cudaErrorIllegalState);
  s->capture = cudaStreamCaptureStatusNone;  // also when it fails
  ENTER(cudaStreamEndCapture);
  *out = reinterpret_cast<cudaGraph_t>(new Graph{s->nodes});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  ENTER(cudaStreamIsCapturing);
  *out = capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  *status = capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = real(stream) ? real(stream)->id : 0;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  ENTER(cudaGraphLaunch);
  char text[96];
  snprintf(text, sizeof text, "graph of %zu nodes stream %p", reinterpret_cast<Graph*>(graph)->nodes,
           static_cast<void*>(stream));
  record(text, stream);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
