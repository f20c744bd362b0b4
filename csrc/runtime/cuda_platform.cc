// cuda_platform.cc: Platform over PyTorch's own CUDA support (libtorch_fl_cuda.so; nothing else links libtorch_cuda).
//
// Device indices and stream ids are CUDA's, one to one; only the device type in the label differs. Memory is CUDA's
// caching allocator's, with a front for small blocks (cuda_alloc_front.h), so record_stream, pools, graph capture,
// statistics and expandable segments work unchanged.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/impl/CUDAGuardImpl.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <vector>

#include "csrc/aten/interop.h"
#include "csrc/runtime/cuda_alloc_front.h"
#include "csrc/runtime/fork.h"
#include "csrc/runtime/platform.h"

namespace flagos {
namespace {

namespace cache = c10::cuda::CUDACachingAllocator;

c10::Device cuda_device(c10::DeviceIndex index) { return device_at(c10::Device(c10::kCUDA), index); }
c10::Stream to_cuda(c10::Stream s) {
  TORCH_CHECK(s.device_type() == kFlagos, "Expected a 'flagos' stream but found one of '", s.device(), "'");
  return c10::Stream(c10::Stream::UNSAFE, cuda_device(s.device_index()), s.id());
}
c10::Stream to_flagos(c10::Stream s) {
  return c10::Stream(c10::Stream::UNSAFE, flagos_device(s.device_index()), s.id());
}

// CUDA's allocators and generators are created by PyTorch's lazy initialisation, which must come first.
void initialize() {
  check_fork();
  static std::atomic<bool> done{false};
  if (C10_LIKELY(done.load(std::memory_order_acquire))) return;
  at::globalContext().lazyInitDevice(c10::kCUDA);
  static const bool installed = (install_alloc_front(), true);  // once, whichever thread comes first
  (void)installed;
  done.store(true, std::memory_order_release);
}

// Calls in which the error of an earlier kernel surfaces, most of them waiting: it then names the last operators.
template <typename F>
auto waiting(const char* where, const F& wait) {
  check_fork();
  try {
    return wait();
  } catch (c10::AcceleratorError& error) {
    tell(error, where);
    throw;
  }
}

// CUDA's pinned memory; only the streams' label changes.
struct CudaHostAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t size) override { return inner().allocate(size); }
  at::DeleterFnPtr raw_deleter() const override { return inner().raw_deleter(); }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
  bool record_event(void* ptr, void* ctx, c10::Stream stream) override {
    return inner().record_event(ptr, ctx, stream.device_type() == kFlagos ? to_cuda(stream) : stream);
  }
  void empty_cache() override { inner().empty_cache(); }
  at::HostStats get_stats() override { return inner().get_stats(); }
  void reset_accumulated_stats() override { inner().reset_accumulated_stats(); }
  void reset_peak_stats() override { inner().reset_peak_stats(); }

 private:
  static at::HostAllocator& inner() {
    initialize();
    return *at::getHostAllocator(at::kCUDA);
  }
};

class CudaPlatform final : public Platform {
 public:
  const char* chip() const override { return "cuda"; }
  std::optional<c10::DeviceType> native_type() const override { return c10::kCUDA; }
  void start() override { initialize(); }

  // ---- devices
  c10::DeviceIndex device_count() const noexcept override { return c10::cuda::device_count(); }
  c10::DeviceIndex current_device() const override {
    check_fork();
    return one_device_ ? c10::DeviceIndex{0} : c10::cuda::current_device();
  }
  void set_device(c10::DeviceIndex index) override {
    check_fork();
    guard_.setDevice(cuda_device(index));
  }
  c10::DeviceIndex exchange_device(c10::DeviceIndex index) override {
    check_fork();
    return one_device_ ? c10::DeviceIndex{0} : c10::cuda::ExchangeDevice(index);
  }
  void return_to_device(c10::DeviceIndex index) override {
    if (!one_device_) C10_CUDA_CHECK(c10::cuda::MaybeSetDevice(index));
  }
  bool has_primary_context(c10::DeviceIndex index) const override { return hooks().hasPrimaryContext(index); }
  void device_info(c10::DeviceIndex index, flagos_device_info* info) const override;
  std::pair<size_t, size_t> mem_info(c10::DeviceIndex index) const override {
    initialize();
    const c10::cuda::CUDAGuard guard(index);
    size_t free_bytes = 0, total_bytes = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    return {free_bytes, total_bytes};
  }
  void synchronize_device(c10::DeviceIndex index) const override {
    waiting("synchronizing the device", [&] { guard_.synchronizeDevice(index); });
  }
  bool can_access_peer(c10::DeviceIndex index, c10::DeviceIndex peer) const override {
    int can = 0;
    C10_CUDA_CHECK(cudaDeviceCanAccessPeer(&can, index, peer));
    return can != 0;
  }

  // ---- streams and events
  c10::Stream current_stream(c10::DeviceIndex index) const override {
    return c10::Stream(c10::Stream::UNSAFE, flagos_device(index), c10::cuda::getCurrentCUDAStream(index).id());
  }
  c10::Stream default_stream(c10::DeviceIndex index) const override {
    return to_flagos(guard_.getDefaultStream(cuda_device(index)));
  }
  c10::Stream exchange_stream(c10::Stream stream) override { return to_flagos(guard_.exchangeStream(to_cuda(stream))); }
  c10::Stream new_stream(c10::DeviceIndex index, int priority) override {
    check_fork();
    return to_flagos(guard_.getNewStream(cuda_device(index), priority));
  }
  c10::Stream external_stream(c10::DeviceIndex index, void* native_handle) override {
    return to_flagos(c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(native_handle), index).unwrap());
  }
  bool query_stream(c10::Stream stream) const override {
    return waiting("querying a stream", [&] { return guard_.queryStream(to_cuda(stream)); });
  }
  void synchronize_stream(c10::Stream stream) const override {
    waiting("synchronizing a stream", [&] { guard_.synchronizeStream(to_cuda(stream)); });
  }
  void* native_handle(c10::Stream stream) const override { return c10::cuda::CUDAStream(to_cuda(stream)).stream(); }
  std::pair<int, int> stream_priority_range() const override {
    const auto range = c10::cuda::CUDAStream::priority_range();
    return {std::get<0>(range), std::get<1>(range)};
  }
  void record(void** event, c10::Stream stream, c10::EventFlag flag) const override {
    waiting("recording an event", [&] { guard_.record(event, to_cuda(stream), stream.device_index(), flag); });
  }
  void block(void* event, c10::Stream stream) const override {
    waiting("making a stream wait", [&] { guard_.block(event, to_cuda(stream)); });
  }
  bool query_event(void* event) const override {
    return waiting("querying an event", [&] { return guard_.queryEvent(event); });
  }
  void synchronize_event(void* event) const override {
    waiting("synchronizing an event", [&] { guard_.synchronizeEvent(event); });
  }
  double elapsed_ms(void* start, void* end, c10::DeviceIndex index) const override {
    return guard_.elapsedTime(start, end, index);
  }
  // Not the guard's, which ends the process where an earlier error has broken the device.
  void destroy_event(void* event, c10::DeviceIndex index) const noexcept override {
    int before = index;
    if (event == nullptr || in_bad_fork()) return;
    if (cudaGetDevice(&before) != cudaSuccess || before != index) cudaSetDevice(index);  // else it may make a context
    if (cudaEventDestroy(static_cast<cudaEvent_t>(event)) != cudaSuccess) cudaGetLastError();
    if (before != index) cudaSetDevice(before);
  }

  // ---- memory
  c10::DataPtr allocate(size_t nbytes) override {
    initialize();
    return allocate_through_front(nbytes);
  }
  c10::Allocator* native_allocator() override { return cache::get(); }
  void record_stream(const c10::DataPtr& native, c10::Stream stream) override {
    cache::recordStream(native, c10::cuda::CUDAStream(to_cuda(stream)));
  }
  c10::DeviceAllocator& allocator() override { return *cache::get(); }
  at::HostAllocator& host_allocator() override { return *host_allocator_; }
  bool is_pinned(const void* ptr) const override { return hooks().isPinnedPtr(ptr); }
  c10::Device device_of(const void* ptr) const override {
    cudaPointerAttributes attributes{};
    C10_CUDA_CHECK(cudaPointerGetAttributes(&attributes, ptr));
    TORCH_CHECK(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged, "flagos: ", ptr,
                " is not memory of a flagos device (cuda); pass an address that a flagos tensor shows");
    return flagos_device(static_cast<c10::DeviceIndex>(attributes.device));
  }
  void* raw_allocate(size_t nbytes, c10::Stream stream) override {
    initialize();
    const c10::cuda::CUDAGuard guard(stream.device_index());
    return cache::raw_alloc_with_stream(nbytes, c10::cuda::CUDAStream(to_cuda(stream)).stream());
  }
  void raw_free(void* ptr) override { cache::raw_delete(ptr); }
  void set_memory_fraction(c10::DeviceIndex index, double fraction) override {
    initialize();
    cache::setMemoryFraction(fraction, index);
  }
  double memory_fraction(c10::DeviceIndex index) const override {
    initialize();
    return cache::getMemoryFraction(index);
  }
  std::vector<MemorySegment> memory_snapshot() override;
  void copy_bytes(void* dst, c10::Device dst_device, const void* src, c10::Device src_device, size_t nbytes,
                  c10::Stream stream) override;

  // ---- random numbers
  at::Generator native_generator(c10::DeviceIndex index, bool fresh) override {
    return fresh ? at::cuda::detail::createCUDAGenerator(index) : at::cuda::detail::getDefaultCUDAGenerator(index);
  }

 private:
  static const at::AcceleratorHooksInterface& hooks() {
    return at::globalContext().getAcceleratorHooksInterface(c10::kCUDA);
  }

  const bool one_device_ = c10::cuda::device_count() == 1;  // the driver, which takes its time, need not be asked
  c10::cuda::impl::CUDAGuardImpl guard_;
  CudaHostAllocator* const host_allocator_ = new CudaHostAllocator();  // never destroyed: tensors may outlive statics
};

void CudaPlatform::device_info(c10::DeviceIndex index, flagos_device_info* info) const {
  initialize();
  cudaDeviceProp p;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&p, index));
  *info = flagos_device_info{};
  info->struct_size = sizeof(*info);
  std::snprintf(info->name, sizeof(info->name), "%.127s", p.name);
  std::snprintf(info->arch, sizeof(info->arch), "sm_%d%d", p.major, p.minor);
  int driver = 0, runtime = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
  C10_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  std::snprintf(info->driver_version, sizeof(info->driver_version), "%d.%d", driver / 1000, driver % 1000 / 10);
  std::snprintf(info->runtime_version, sizeof(info->runtime_version), "%d.%d", runtime / 1000, runtime % 1000 / 10);
  info->total_memory = p.totalGlobalMem;
  info->major = p.major;
  info->minor = p.minor;
  info->warp_size = p.warpSize;
  info->multi_processor_count = p.multiProcessorCount;
  info->max_threads_per_multi_processor = p.maxThreadsPerMultiProcessor;
  info->malloc_alignment = p.textureAlignment;
}

std::vector<MemorySegment> CudaPlatform::memory_snapshot() {
  initialize();
  std::vector<MemorySegment> out;
  for (const auto& s : cache::snapshot().segments) {
    const c10::Stream stream(c10::Stream::UNSAFE, flagos_device(s.device), reinterpret_cast<c10::StreamId>(s.stream));
    out.push_back({s.address, s.total_size, stream, s.is_large, {}});
    for (const auto& b : s.blocks) {
      const auto state = b.allocated ? MemoryBlock::kAllocated
                         : b.active  ? MemoryBlock::kAwaitingFree
                                     : MemoryBlock::kInactive;
      out.back().blocks.push_back({b.size, b.requested_size, state});
    }
  }
  return out;
}

void CudaPlatform::copy_bytes(void* dst, c10::Device dst_device, const void* src, c10::Device src_device, size_t nbytes,
                              c10::Stream stream) {
  if (nbytes == 0) return;
  initialize();
  const c10::cuda::CUDAGuard guard(stream.device_index());
  const c10::cuda::CUDAStream cuda_stream(to_cuda(stream));
  C10_CUDA_CHECK(cudaMemcpyAsync(dst, src, nbytes, cudaMemcpyDefault, cuda_stream.stream()));
  const void* host = dst_device.type() == c10::kCPU ? dst : src_device.type() == c10::kCPU ? src : nullptr;
  // Pinned memory that CUDA's host allocator does not know by this address must not be reused before the copy is done.
  if (host != nullptr && is_pinned(host) && !host_allocator_->record_event(const_cast<void*>(host), nullptr, stream)) {
    cuda_stream.synchronize();
  }
}

}  // namespace
}  // namespace flagos

extern "C" __attribute__((visibility("default"))) flagos::Platform* flagos_make_cuda_platform() {
  TORCH_CHECK(
      c10::cuda::device_count() > 0,
      "flagos: the cuda chip was chosen, but PyTorch finds no CUDA device; 'python -m torch_fl doctor' shows why, "
      "FLAGOS_ACCELERATOR=host uses the simulated device");
  flagos::watch_forks();  // counting the devices has opened the driver, which a child cannot use from then on
  return new flagos::CudaPlatform();
}
